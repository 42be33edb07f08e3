"""The external judge: transformers loads a source and its conversion, and both must compute the same.

It knows nothing of t5g2convert, and runs as a script too, so that other versions of transformers can judge:

    python tests/interop/judge.py SOURCE OUTPUT DTYPE [PAIRING]

PAIRING is the JSON of a `Pairing`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    T5Gemma2ForConditionalGeneration,
    T5GemmaForConditionalGeneration,
)

LENGTH = 24
"""Tokens of an input: more than every twin's sliding window, and whole vector registers.

Hidden memory adds keys of weight zero after these. In float32 a row's sum keeps its order of additions then only if the
row itself fills the registers; at 23 tokens the same models differ by 2e-6, at 24 by nothing.
"""

MEMORY = 8
"""Tokens of the encoder input."""


WRITTEN = 20
"""Tokens that a model writes with a cache and without: more than every twin's sliding window."""


@dataclass(frozen=True)
class Pairing:
    """The origin of encoder and decoder, if not the whole source.

    Attributes:
        decoder_from: The folder of the decoder's parent.
        embedding_from: Whose table the target has, `source` or `decoder-from`.
        encoder_layers: The numbers of the source's layers that the encoder has.
        decoder_layers: The same for the decoder.
    """

    decoder_from: str | None = None
    embedding_from: str = "source"
    encoder_layers: list[int] | None = None
    decoder_layers: list[int] | None = None


@dataclass(frozen=True)
class Judgement:
    """Largest absolute differences (None if the model lacks the part), and the complaints of loading."""

    complaints: list[str]
    decoder: float
    encoder: float
    vision: float | None
    generated: list[int]
    finite: bool
    cross: float | None = None


def judge(source: Path, output: Path, dtype: torch.dtype, pairing: Pairing | None = None) -> Judgement:
    """Compare a Gemma folder and its conversion, both loaded in `dtype`, with eager attention.

    Image features are compared where the source has a vision tower. With a pairing each stack is compared with its own
    parent, cut to its own layers.
    """
    if json.loads((source / "config.json").read_text())["model_type"] == "gemma2":
        return judge_first_generation(source, output, dtype)
    parent, child, complaints = load(source, output, dtype)
    reader = writer = parent
    if pairing is not None:
        reader, writer = parents(source, pairing, dtype)
    config = json.loads((output / "config.json").read_text())
    ids, mask = _inputs(config, exact_eoi=config["dtype"] == str(dtype).removeprefix("torch."))
    with torch.no_grad():
        expected = writer(input_ids=ids, attention_mask=mask, use_cache=False).logits
        hidden_memory = child(
            input_ids=ids[:, :MEMORY],
            attention_mask=torch.zeros_like(ids[:, :MEMORY]),
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
        ).logits
        memory = child(input_ids=ids[:, :MEMORY], decoder_input_ids=ids[:, :2]).logits
        # Without padding: explicit masks replace the padding mask.
        states = _text_states(reader, ids)
        masks = _causal_masks(ids, config["encoder"]["text_config"]["sliding_window"], dtype)
        encoded = child.model.encoder(input_ids=ids, attention_mask=masks).last_hidden_state
        generated = child.generate(
            input_ids=ids[:1, :7], attention_mask=mask[:1, :7], max_new_tokens=4, do_sample=False
        )
    kept = mask.bool()
    return Judgement(
        complaints=complaints,
        decoder=_difference(expected[..., : config["vocab_size"]][kept], hidden_memory[kept]),
        encoder=_difference(states, encoded),
        vision=_vision_difference(parent, child, config, dtype) if hasattr(parent.model, "vision_tower") else None,
        generated=generated[0].tolist(),
        finite=bool(torch.isfinite(memory).all()),
    )


def parents(source: Path, pairing: Pairing, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the parents of encoder and decoder, with the target's table and their stack's layers."""
    reader, writer = open_parent(source, dtype), open_parent(Path(pairing.decoder_from or source), dtype)
    given, other = (reader, writer) if pairing.embedding_from == "source" else (writer, reader)
    with torch.no_grad():
        # The softmax is tied to it.
        other.get_input_embeddings().weight.copy_(given.get_input_embeddings().weight)
    assert torch.equal(other.lm_head.weight, given.lm_head.weight)
    for model, layers in ((reader, pairing.encoder_layers), (writer, pairing.decoder_layers)):
        text = getattr(model.model, "language_model", model.model)
        numbers = list(range(len(text.layers))) if layers is None else layers
        kinds = [text.config.layer_types[number] for number in numbers]
        text.layers = torch.nn.ModuleList([text.layers[number] for number in numbers])
        text.config.num_hidden_layers, text.config.layer_types = len(kinds), kinds
    return reader, writer


def _family(source: Path) -> str:
    return str(json.loads((source / "config.json").read_text())["model_type"])


def open_parent(folder: Path, dtype: torch.dtype) -> Any:
    """Load a source with the class of its family."""
    parent_class, _ = CLASSES[_family(folder)]
    return parent_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def written(output: Path, dtype: torch.dtype, *, use_cache: bool) -> list[int]:
    """Return the greedy continuation of a text longer than the window."""
    child = T5Gemma2ForConditionalGeneration.from_pretrained(output, dtype=dtype, attn_implementation="eager").eval()
    ids = torch.randint(3, 280, (1, LENGTH), generator=torch.Generator().manual_seed(11))
    made = child.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=WRITTEN,
        max_new_tokens=WRITTEN,
        do_sample=False,
        use_cache=use_cache,
    )
    return list(made[0].tolist())


def judge_first_generation(source: Path, output: Path, dtype: torch.dtype) -> Judgement:
    """Compare a Gemma 2 folder and its T5Gemma as `judge` does, with cross-attention silenced."""
    parent, child, complaints = load(source, output, dtype)
    config = json.loads((output / "config.json").read_text())
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 280, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -6:] = 0
    with torch.no_grad():
        expected = parent(input_ids=ids, attention_mask=mask).logits
        with _cross_attention_silenced(child):
            alone = child(input_ids=ids[:, :MEMORY], decoder_input_ids=ids, decoder_attention_mask=mask).logits
        memory = child(input_ids=ids[:, :MEMORY], decoder_input_ids=ids[:, :2]).logits
        masks = _causal_masks(ids, config["encoder"]["sliding_window"], dtype)
        encoded = child.model.encoder(input_ids=ids, attention_mask=masks).last_hidden_state
        states = parent.model(input_ids=ids).last_hidden_state
        generated = child.generate(
            input_ids=ids[:1, :7], attention_mask=mask[:1, :7], max_new_tokens=4, do_sample=False
        )
        layers = zip(parent.model.layers, child.model.decoder.layers, strict=True)
        cross = max(_cross_difference(one, other, states) for one, other in layers)
    kept = mask.bool()
    return Judgement(
        complaints=complaints,
        decoder=_difference(expected[kept], alone[kept]),
        encoder=_difference(states, encoded),
        vision=None,
        generated=generated[0].tolist(),
        finite=bool(torch.isfinite(memory).all()),
        cross=cross,
    )


@contextmanager
def _cross_attention_silenced(child: Any) -> Iterator[None]:
    """The norm after a cross-attention multiplies by 1 + weight: -1 silences it."""
    norms = [layer.post_cross_attn_layernorm.weight for layer in child.model.decoder.layers]
    kept = [weight.clone() for weight in norms]
    for weight in norms:
        weight.fill_(-1)
    yield
    for weight, value in zip(norms, kept, strict=True):
        weight.copy_(value)


def _cross_difference(layer: Any, other: Any, states: torch.Tensor) -> float:
    """Compare a cross-attention on its own input with the self-attention it came from, without RoPE."""
    still = torch.ones_like(states[..., :1]), torch.zeros_like(states[..., :1])
    asked, asked_too = layer.input_layernorm(states), other.pre_cross_attn_layernorm(states)
    expected, *_ = layer.self_attn(hidden_states=asked, position_embeddings=still, attention_mask=None)
    found, *_ = other.cross_attn(hidden_states=asked_too, attention_mask=None, encoder_hidden_states=asked_too)
    return _difference(layer.post_attention_layernorm(expected), other.post_cross_attn_layernorm(found))


CLASSES: dict[str, tuple[Any, Any]] = {
    "gemma2": (Gemma2ForCausalLM, T5GemmaForConditionalGeneration),
    "gemma3": (Gemma3ForConditionalGeneration, T5Gemma2ForConditionalGeneration),
    "gemma3_text": (Gemma3ForCausalLM, T5Gemma2ForConditionalGeneration),
}
"""The classes of a source and of its conversion, by the source's `model_type`."""


def load(source: Path, output: Path, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """Return both models, and every complaint about loading the conversion."""
    parent, child_class = open_parent(source, dtype), CLASSES[_family(source)][1]
    child, loading = child_class.from_pretrained(
        output, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    complaints = [
        f"{kind}: {item}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        for item in loading.get(kind, ())
    ]
    return parent, child.eval(), complaints


def _inputs(config: dict[str, Any], *, exact_eoi: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeded ids without image tokens, with the end-of-image token if it is exact; one row is right-padded."""
    generator = torch.Generator().manual_seed(7)
    vocab, eoi = config["vocab_size"], config["eoi_token_index"]
    ids = torch.randint(3, min(vocab, eoi, config["image_token_index"], 280), (2, LENGTH), generator=generator)
    if exact_eoi and eoi < vocab:
        ids[:, 4] = eoi
        ids[0, -2] = eoi
    mask = torch.ones_like(ids)
    mask[1, -6:] = 0
    return ids, mask


def _causal_masks(ids: torch.Tensor, window: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return Gemma's additive masks [B, 1, T, T]: causal, and causal within the window."""
    distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])[None, :]
    seen = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance < window)}
    lowest = torch.finfo(dtype).min
    return {
        kind: torch.where(open_, 0.0, lowest).to(dtype).expand(ids.shape[0], 1, -1, -1) for kind, open_ in seen.items()
    }


def _text_states(parent: Any, ids: torch.Tensor) -> torch.Tensor:
    model = parent.model
    model = getattr(model, "language_model", model)
    return model(input_ids=ids, use_cache=False).last_hidden_state


def _vision_difference(parent: Any, child: Any, config: dict[str, Any], dtype: torch.dtype) -> float:
    size = config["encoder"]["vision_config"]["image_size"]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        return _difference(_features(parent.model, pixels), _features(child.model.encoder, pixels))


def _features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    features = model.get_image_features(pixels)
    return getattr(features, "pooler_output", features)


def tower_difference(donor: Path, output: Path, dtype: torch.dtype) -> float:
    """Return the largest difference between the tower states of a conversion and its donor."""
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3)).to(dtype)
    seeing = Gemma3ForConditionalGeneration.from_pretrained(donor, dtype=dtype, attn_implementation="eager").eval()
    child = T5Gemma2ForConditionalGeneration.from_pretrained(output, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = seeing.model.vision_tower(pixels).last_hidden_state
        return _difference(expected, child.model.encoder.vision_tower(pixels).last_hidden_state)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape, f"{one.shape} against {other.shape}"
    assert one.abs().max() > 0, "nothing was compared"
    return (one.float() - other.float()).abs().max().item()


def main() -> None:
    """Run the judge from the command line."""
    source, output, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
    pairing = Pairing(**json.loads(sys.argv[4])) if len(sys.argv) > 4 else None
    result: dict[str, Any] = asdict(judge(source, output, dtype, pairing))
    if pairing is not None:
        result["written"] = [written(output, dtype, use_cache=use_cache) for use_cache in (True, False)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
