"""runs: the model alone computes finite values that depend on all its inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from t5g2convert.parity.batches import image_ids, pixels, token_batch
from t5g2convert.parity.reports.report import Check
from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import EncoderReference
from t5g2convert.reference.weights import overflow

ENCODER_TOKENS = 24
DECODER_TOKENS = 12


@torch.inference_mode()
def judge_runs(target: EncoderDecoder, *, blind: bool = False, progress: Callable[[str], None]) -> Check:
    """Require finite logits that depend on the text and the image that the encoder reads.

    Three sequences have the same decoder input. The second has another image than the first (another word order if
    the model does not read images), the third another text.

    Args:
        target: The model.
        blind: Whether its projector is declared to be zeros, so that all images look the same to it.
        progress: Called once, with a few words.

    Raises:
        UsageError: float16 overflows.
    """
    progress("encoder and decoder together")
    never = target.reserved
    vocab, device = target.decoder.settings.vocab_size, target.weights.device
    texts_BT = token_batch(vocab, ENCODER_TOKENS, never=never).ids_BT
    written_BT = token_batch(vocab, DECODER_TOKENS, never=never).ids_BT[:1].expand(3, -1)
    features = None
    if target.vision is not None:
        dtype = target.weights.dtype or torch.float32
        token, count = target.vision.tokens.image_token_index, target.vision.tokens.mm_tokens_per_image
        image_T = torch.where((found := image_ids(vocab, count, never=never)) < 0, token, found)[0]
        ids_BT = torch.stack([torch.cat((texts_BT[row], image_T)) for row in (0, 0, 1)])
        features = target.vision.features(pixels(target.vision, 3, dtype).to(device)[[0, 1, 0]])
        differing = {"text": 2} if blind else {"image": 1, "text": 2}
    else:
        ids_BT = torch.stack([texts_BT[0], texts_BT[0].flip(0), texts_BT[1]])
        differing = {"text": 2}
        settings = target.encoder.settings
        if settings.sliding_window > 1 or "full_attention" in settings.layer_types:
            # If each token sees only itself, the encoder does not depend on order.
            differing = {"order of words": 1, **differing}
    ids_BT = ids_BT.to(device)
    kept_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    memory_BMC = target.encode(ids_BT, kept_BT, features)
    written_BT = written_BT.to(device)
    states = target.decode(written_BT, torch.ones_like(written_BT, dtype=torch.bool), memory_BMC, kept_BT)
    logits = target.decoder.logits(states[:, -1])
    finite = all(bool(torch.isfinite(x).all()) for x in (memory_BMC, states, logits))
    unused = [what for what, row in differing.items() if torch.equal(logits[0], logits[row])]
    if not finite:
        what = "the logits of the encoder-decoder"
        if (error := overflow(what, target.weights)) is not None:
            raise error
        return Check("runs", False, f"{what} are not finite")
    if unused:
        return Check("runs", False, f"the logits do not depend on the encoder's {' and '.join(unused)}")
    return Check("runs", True, f"finite logits that depend on the encoder's {' and '.join(differing)}")


@torch.inference_mode()
def judge_dependence(
    target: EncoderReference | Gemma3Reference, what: str, compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Check:
    """Require finite values, of a model with one stack, that depend on the text, its order and the image.

    Args:
        target: The model.
        what: The name of the values, for the detail.
        compute: From token ids and a mask that is False at padding, both [B, T], and image features, to [B, T, C].

    Raises:
        UsageError: float16 overflows.
    """
    vocab, device = target.stacks[0].settings.vocab_size, target.weights.device
    texts_BT = token_batch(vocab, ENCODER_TOKENS, never=target.reserved).ids_BT
    last = texts_BT[:1, -1:]
    # Only tokens before the last differ.
    rows = {"": texts_BT[0, :-1], "order of words": texts_BT[0, :-1].flip(0), "text": texts_BT[1, :-1]}
    settings = target.stacks[0].settings
    if settings.sliding_window == 1 and "full_attention" not in settings.layer_types:
        # A token that sees only itself depends on no other.
        rows = {"": texts_BT[0, :-1]}
    ids_BT = torch.cat([torch.stack(list(rows.values())), last.expand(len(rows), -1)], dim=1).to(device)
    found = compute(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), None)
    unused = [name for number, name in enumerate(rows) if number and torch.equal(found[0, -1], found[number, -1])]
    finite, seen = bool(torch.isfinite(found).all()), [name for name in rows if name]
    if target.vision is not None:
        token, count = target.vision.tokens.image_token_index, target.vision.tokens.mm_tokens_per_image
        image_BT = torch.where((ids := image_ids(vocab, count, never=target.reserved)) < 0, token, ids).to(device)
        dtype = target.weights.dtype or torch.float32
        features = target.vision.features(pixels(target.vision, 2, dtype).to(device))
        image_BT = image_BT.expand(2, -1)
        found = compute(image_BT, torch.ones_like(image_BT, dtype=torch.bool), features)
        finite &= bool(torch.isfinite(found).all())
        seen.append("image")
        unused += ["image"] if torch.equal(found[0], found[1]) else []
    if not finite:
        if (error := overflow(f"the {what}", target.weights)) is not None:
            raise error
        return Check("runs", False, f"the {what} are not finite")
    if unused:
        return Check("runs", False, f"the {what} do not depend on the {' and '.join(unused)}")
    return Check("runs", True, f"finite {what}" + (f" that depend on the {' and '.join(seen)}" if seen else ""))
