from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.adaptation.research import ResearchModel
from t5g2convert.checkpoint.families.research import read_research, research_tensors
from t5g2convert.errors import CheckpointError

Config = dict[str, Any]

WHERE = Path("somewhere/config.json")

STACK: Config = {
    "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
}  # fmt: skip
SLIDING = {**STACK, "layer_types": ["sliding_attention"] * 3}
FORMS = [
    {"tied": tied, "attention": attention, "cross_layers": layers}
    for tied in (True, False)
    for attention in ("merged", "separate")
    for layers in ("all", "full")
]


def config(encoder: Config | None = None, decoder: Config | None = None, **top: Any) -> Config:
    return {
        "model_type": "t5g2_research", "tied": True, "attention": "merged", "cross_layers": "all",
        "encoder": {**STACK, **(encoder or {})}, "decoder": {**STACK, **(decoder or {})}, **top,
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_tensors_are_the_parameters_of_the_model(form: Config) -> None:
    document = config({"num_hidden_layers": 2, "layer_types": STACK["layer_types"][:2], "head_dim": 6}, **form)
    model = ResearchModel(read_research(document, WHERE))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = list(research_tensors(document, WHERE))
    assert len(ours) == len(theirs)
    assert {item.name: item.shape for item in ours} == theirs


def test_every_tensor_has_its_part() -> None:
    items = list(research_tensors(config(tied=False, attention="separate", cross_layers="full"), WHERE))
    parts = {item.name: item.part for item in items}
    assert {name for name, part in parts.items() if part == "embedding"} == {
        "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
    }  # fmt: skip
    assert {name for name in parts if "cross_attn" in name} == {
        f"model.decoder.layers.1.{name}.weight"
        for name in (
            *(f"cross_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            "pre_cross_attn_layernorm", "post_cross_attn_layernorm",
        )
    }  # fmt: skip
    assert all(parts[name] == name.split(".")[1] for name in parts if "embed" not in name)


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (
            {"model_type": "t5gemma2"},
            "model_type 't5gemma2' (T5Gemma 2, an encoder-decoder already) is no research model",
        ),
        (config(attention="both"), "attention: Input should be 'merged' or 'separate'"),
        (config(cross_layers="some"), "cross_layers: Input should be 'all' or 'full'"),
        (config(tied=1), "tied: Input should be a valid boolean"),
        (config(encoder={"hidden_size": 20}), "decoder.hidden_size is 24, expected the encoder's 20"),
        (config(decoder={"vocab_size": 20}), "decoder.vocab_size is 20, expected the encoder's 300"),
        (config(decoder={"num_hidden_layers": 4}), "decoder.layer_types lists 3 layers, num_hidden_layers is 4"),
        (config(decoder=SLIDING, cross_layers="full"), "has no full_attention: nothing would read the encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_config_is_refused_in_one_line(document: Config, told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_research(document, WHERE)
    assert told in caught.value.message
    assert caught.value.where == str(WHERE)


def test_sliding_layers_alone_may_read_the_encoder_where_all_layers_do() -> None:
    model = read_research(config(decoder=deepcopy(SLIDING)), WHERE)
    assert [model.reads_encoder(layer) for layer in range(3)] == [True] * 3
