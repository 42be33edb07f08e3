"""runs: the converted model, used as the encoder-decoder that it is."""

from collections.abc import Callable

import torch

from t5g2convert.parity.inputs import image_ids, pixels, token_batch
from t5g2convert.parity.report import Check
from t5g2convert.reference.encoderdecoder import EncoderDecoder

ENCODER_TOKENS = 24
DECODER_TOKENS = 12


@torch.inference_mode()
def judge_runs(target: EncoderDecoder, *, blind: bool = False, progress: Callable[[str], None]) -> Check:
    """Logits must be finite, and must change when the encoder reads another text, or another image.

    Three sequences with the same decoder input; the second has another image than the first (another text, where the
    model has no images), the third another text.

    Args:
        target: The model.
        blind: Whether its projector is declared to be zeros, so that all images are one to it.
        progress: Told what is being done.
    """
    progress("encoder and decoder together")
    never = target.reserved
    vocab, device = target.decoder.settings.vocab_size, target.weights.device
    texts_BT = token_batch(vocab, ENCODER_TOKENS, never=never).ids_BT
    written_BT = token_batch(vocab, DECODER_TOKENS, never=never).ids_BT[:1].expand(3, -1)
    features = None
    if target.vision is not None:
        dtype = target.weights.dtype or torch.float32
        token, count = target.vision.settings.image_token_index, target.vision.settings.mm_tokens_per_image
        image_T = torch.where((found := image_ids(vocab, count, never=never)) < 0, token, found)[0]
        ids_BT = torch.stack([torch.cat((texts_BT[row], image_T)) for row in (0, 0, 1)])
        features = target.vision.features(pixels(target.vision, 3, dtype).to(device)[[0, 1, 0]])
        differing = {"text": 2} if blind else {"image": 1, "text": 2}
    else:
        ids_BT = torch.stack([texts_BT[0], texts_BT[0].flip(0), texts_BT[1]])
        differing = {"text": 2}
        settings = target.encoder.settings
        if settings.sliding_window > 1 or "full_attention" in settings.layer_types:
            # An encoder whose tokens see only themselves knows no order.
            differing = {"order of words": 1, **differing}
    ids_BT = ids_BT.to(device)
    kept_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    memory_BMC = target.encode(ids_BT, kept_BT, features)
    written_BT = written_BT.to(device)
    states = target.decode(written_BT, torch.ones_like(written_BT, dtype=torch.bool), memory_BMC, kept_BT)
    logits = target.decoder.logits(states[:, -1])
    finite = all(bool(torch.isfinite(x).all()) for x in (memory_BMC, states, logits))
    deaf = [what for what, row in differing.items() if torch.equal(logits[0], logits[row])]
    if not finite:
        return Check("runs", False, "the logits of the encoder-decoder are not finite")
    if deaf:
        return Check("runs", False, f"the logits do not depend on the encoder's {' and '.join(deaf)}")
    return Check("runs", True, f"finite logits that depend on the encoder's {' and '.join(differing)}")
