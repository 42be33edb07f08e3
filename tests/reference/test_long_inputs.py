"""Long inputs: 8,192 encoder tokens, past the window on both sides, with a linear factor, against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Gemma2ForConditionalGeneration

from t5g2convert import convert
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.models.twins import Twin, write_twin
from tests.reference.models import Batch, difference, padded_batch

ENCODER_TOKENS = 8192
DECODER_TOKENS = 1100
WINDOW = 513

TWIN = Twin(
    "long",
    {
        "vocab_size": 300,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "query_pre_attn_scalar": 12,
        "sliding_window": WINDOW,
        "max_position_embeddings": 2048,
    },
    dtype=torch.float32,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, T5Gemma2Reference]:
    """Return the conversion, loaded by transformers and by the reference."""
    root: Path = tmp_path_factory.mktemp("long")
    write_twin(TWIN, root / "source")
    convert(root / "source", root / "out", rope_scaling="linear:8", flush=False)
    theirs = T5Gemma2ForConditionalGeneration.from_pretrained(
        root / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert theirs.config.decoder.max_position_embeddings == 8 * 2048
    return theirs, T5Gemma2Reference(open_checkpoint(root / "out"), dtype=torch.float32)


def one_row(batch: Batch) -> Batch:
    """Use only the row with padding on the left: scores of one row take half a gigabyte at this length."""
    return Batch(batch.ids[1:2], batch.mask[1:2])


@pytest.mark.slow
@torch.no_grad()
def test_encoder_and_decoder_past_the_window_on_both_sides(models: tuple[Any, T5Gemma2Reference]) -> None:
    theirs, ours = models
    read = one_row(padded_batch(ENCODER_TOKENS, seed=1, left=5))
    written = one_row(padded_batch(DECODER_TOKENS, seed=2, left=2))
    expected = theirs(
        input_ids=read.ids,
        attention_mask=read.mask,
        decoder_input_ids=written.ids,
        decoder_attention_mask=written.mask,
    )
    memory = ours.encode(read.ids, read.kept)
    assert difference(memory[read.kept], expected.encoder_last_hidden_state[read.kept]) <= 1e-5
    logits = ours.decoder.logits(ours.decode(written.ids, written.kept, memory, read.kept))
    assert difference(logits[written.kept], expected.logits[written.kept]) <= 1e-5


@torch.no_grad()
def test_the_window_and_the_factor_are_felt_at_this_length(models: tuple[Any, T5Gemma2Reference]) -> None:
    """A token at the far end acts only through the full layer; without it the test above proves little."""
    _, ours = models
    read = padded_batch(2 * WINDOW, seed=3)
    changed = read.ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 280
    states, others = ours.encode(read.ids, read.kept), ours.encode(changed, read.kept)
    assert difference(states[:, :1], others[:, :1]) > 0
    sliding = ours.encoder_masks(read.kept)["sliding_attention"]
    assert not sliding[0, ..., 0, -1].any()
    plain = ours.model.encoder.rope_parameters["full_attention"]
    assert plain.linear_factor == 8.0
