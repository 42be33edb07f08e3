from collections import Counter
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

from t5g2convert.checkpoint.families.t5gemma import expected_tensors, read_t5gemma
from t5g2convert.errors import CheckpointError
from tests.checkpoint.families.test_gemma2 import PUBLISHED

Config = dict[str, Any]

WHERE = Path("somewhere/config.json")

STACK: Config = {
    "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5,
}  # fmt: skip


def config(encoder: Config | None = None, decoder: Config | None = None, **top: Any) -> Config:
    return {
        "model_type": "t5gemma",
        "encoder": {**STACK, **(encoder or {})},
        "decoder": {**STACK, **(decoder or {})},
        **top,
    }


def refusal(document: Config) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_t5gemma(document, WHERE)
    assert caught.value.where == str(WHERE)
    return caught.value


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("encoder", [{}, {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 6}], ids=str)
def test_the_tensors_are_those_that_transformers_saves(tied: bool, encoder: Config, tmp_path: Path) -> None:
    document = config(encoder, tie_word_embeddings=tied)
    fields = {key: value for key, value in deepcopy(document).items() if key != "model_type"}
    with torch.device("meta"):
        model = T5GemmaForConditionalGeneration(T5GemmaConfig(**fields, vocab_size=300))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        assert theirs.pop("lm_head.out_proj.weight") == theirs["model.decoder.embed_tokens.weight"]
    ours = list(expected_tensors(document, WHERE))
    assert len(ours) == len(theirs)
    assert {item.name: item.shape for item in ours} == theirs


def test_every_tensor_has_its_part() -> None:
    parts = {item.name: item.part for item in expected_tensors(config(tie_word_embeddings=False), WHERE)}
    embedding = {name for name, part in parts.items() if part == "embedding"}
    assert embedding == {
        "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.out_proj.weight",
    }  # fmt: skip
    assert {name.split(".")[1] for name, part in parts.items() if part == "encoder"} == {"encoder"}
    assert {name.split(".")[1] for name, part in parts.items() if part == "decoder"} == {"decoder"}


def test_a_balanced_2b_has_the_parameters_of_the_published_ablation() -> None:
    # arXiv 2512.14856, the ablation's baseline of Gemma 2 2B: 4417M model and 1180M embedding parameters.
    document = {"model_type": "t5gemma", "encoder": dict(PUBLISHED["2b"]), "decoder": dict(PUBLISHED["2b"])}
    parts: Counter[str] = Counter()
    for item in expected_tensors(document, WHERE):
        parts[item.part] += prod(item.shape)
    assert round((parts["encoder"] + parts["decoder"]) / 1e6) == 4417
    assert round(parts["embedding"] / 1e6) == 1180


def test_a_config_written_by_transformers_is_read() -> None:
    theirs = T5GemmaConfig(encoder=dict(STACK), decoder={**STACK, "attn_logit_softcapping": None})
    model = read_t5gemma(theirs.to_dict(), WHERE)
    assert (model.encoder.attn_logit_softcapping, model.decoder.attn_logit_softcapping) == (50.0, None)
    assert (model.encoder.final_logit_softcapping, model.tied) == (30.0, True)
    assert model.encoder.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_the_rope_base_is_read_where_older_versions_write_it() -> None:
    model = read_t5gemma(config({"rope_theta": 5e4}, {"rope_parameters": {"rope_theta": 6e4}}), WHERE)
    assert (model.encoder.rope_theta, model.decoder.rope_theta) == (5e4, 6e4)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"model_type": "t5gemma2"}, "model_type 't5gemma2' (T5Gemma 2, an encoder-decoder already) is not T5Gemma"),
        ({"model_type": "t5gemma"}, "encoder is missing"),
        ({**config(), "decoder": None}, "decoder is missing"),
        ({**config(), "decoder": []}, "decoder is not an object"),
        (config(tie_word_embeddings="yes"), "tie_word_embeddings: Input should be a valid boolean"),
        (config({"head_dim": 0}), "encoder.head_dim: Input should be greater than 0"),
        (
            config(None, {"layer_types": ["full_attention"]}),
            "decoder.layer_types lists 1 layers, num_hidden",
        ),
        (config(None, {"attention_bias": True}), "decoder.attention_bias is true; biases are not supported"),
        (config(None, {"num_attention_heads": 5}), "decoder.hidden_size 24 is not a multiple of num_attention_heads 5"),
        (
            config({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}),
            "encoder.rope_theta says 1.0 but encoder.rope_parameters.rope_theta says 2.0",
        ),
        (config({"rope_scaling": {"type": "yarn"}}), "encoder.rope_scaling has rope_type 'yarn'; only default"),
        (config({"rope_parameters": 3}), "encoder.rope_parameters is not an object"),
    ],
    ids=lambda item: item[:30] if isinstance(item, str) else "",
)
def test_invalid_settings_are_named_with_their_section(document: Config, message: str) -> None:
    assert message in refusal(document).message
