"""The output's settings have the types that transformers declares, whatever the source's spelling of a number."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, T5Gemma2ForConditionalGeneration

from t5g2convert import convert
from t5g2convert.parity.verify import verify
from tests.conftest import TwinFolder
from tests.models.twins import rewrite_config


def with_other_number_types(text: dict[str, Any]) -> None:
    """Return integers as floats, and whole floats as integers."""
    text |= {
        "attention_dropout": 0, "initializer_range": 1, "rms_norm_eps": 1, "final_logit_softcapping": 30,
        "attn_logit_softcapping": 50, "query_pre_attn_scalar": 12.0, "sliding_window": 7.0, "vocab_size": 300.0,
        "hidden_size": 24.0, "num_hidden_layers": 8.0, "head_dim": 10.0, "max_position_embeddings": 128.0,
        "bos_token_id": 2.0, "eos_token_id": [1.0],
    }  # fmt: skip
    del text["layer_types"]
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000, "factor": 8},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000},
    }


def test_transformers_loads_a_conversion_of_other_number_types(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    rewrite_config(twin_folder("text-8"), source, with_other_number_types)
    convert(source, output)
    model = T5Gemma2ForConditionalGeneration.from_pretrained(output)
    assert (model.config.decoder.query_pre_attn_scalar, model.config.decoder.rms_norm_eps) == (12, 1.0)
    found = json.loads((output / "config.json").read_text())
    # The class itself would write the same types everywhere.
    theirs = AutoConfig.from_pretrained(output).to_dict()
    for section in (("encoder", "text_config"), ("decoder",)):
        ours, other = found, theirs
        for key in section:
            ours, other = ours[key], other[key]
        same = {key: (type(value), type(other[key])) for key, value in ours.items() if key in other}
        assert {key: types for key, types in same.items() if types[0] is not types[1]} == {}
    assert verify(output, source, record=False).passed
