"""The closed world: the plan refuses and names any damaged tensor of any row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, MappingError, convert, plan
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.name_patterns import expand
from t5g2convert.mapping.schema import Row

Tensors = dict[str, torch.Tensor]

FIRST_SPELLINGS = {
    "text": "language_model.model.",
    "vision": "vision_tower.vision_model.",
    "projector": "multi_modal_projector.",
}
COUNTS = {"layers": 8, "vision_layers": 2}
ROWS = [row for row in find_map("gemma3").map.weights if row.from_ is not None and row.op.carries]
SOME_ROWS = [next(row for row in ROWS if part in row.to) for part in ("embedding", "decoder", "vision", "projector")]
"""A row of each kind; test_closed_world does the same to every tensor."""


def name_of(row: Row) -> str:
    """Return the last tensor in the demo source that a row matches."""
    assert row.from_ is not None
    return list(expand(row.from_, FIRST_SPELLINGS, COUNTS))[-1][1]


def edit(source: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def refusal(source: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    return caught.value


@pytest.mark.parametrize("row", SOME_ROWS, ids=lambda row: row.from_)
def test_I5_a_dropped_tensor_is_named(row: Row, demo_source: Path) -> None:
    name = name_of(row)
    edit(demo_source, lambda tensors: tensors.pop(name))
    assert refusal(demo_source).details == (f"missing: {name}",)


@pytest.mark.parametrize("row", SOME_ROWS, ids=lambda row: row.from_)
def test_I5_a_renamed_tensor_is_named_with_the_nearest_name(row: Row, demo_source: Path) -> None:
    name = name_of(row)
    wrong = f"{name}s"
    edit(demo_source, lambda tensors: tensors.update({wrong: tensors.pop(name)}))
    assert refusal(demo_source).details == (
        f"missing: {name} (did you mean {wrong}?)",
        f"unused: {wrong} (did you mean {name}?)",
    )


@pytest.mark.parametrize("row", SOME_ROWS, ids=lambda row: row.from_)
def test_I5_a_tensor_too_many_is_named(row: Row, demo_source: Path) -> None:
    name = name_of(row)
    twin = name.replace(".7.", ".8.").replace("layers.1.", "layers.2.") if "layers." in name else f"{name}_copy"
    edit(demo_source, lambda tensors: tensors.update({twin: tensors[name].clone()}))
    assert refusal(demo_source).details == (f"unused: {twin}",)


@pytest.mark.parametrize("row", SOME_ROWS, ids=lambda row: row.from_)
def test_I8_a_misshapen_tensor_is_named_with_both_shapes(row: Row, demo_source: Path) -> None:
    name = name_of(row)
    found: list[list[int]] = []

    def transpose(tensors: Tensors) -> None:
        tensor = tensors[name]
        changed = tensor.t() if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1] else tensor[..., :-1]
        tensors[name] = changed.contiguous()
        found.append(list(changed.shape))

    edit(demo_source, transpose)
    (detail,) = refusal(demo_source).details
    assert detail.startswith(f"misshapen: {name} has shape {found[0]}, expected [")


def test_I5_a_missing_and_an_extra_layer_are_reported_at_once(demo_source: Path) -> None:
    def shift(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.7." in name and name.startswith("language_model")]:
            tensors[name.replace(".7.", ".9.")] = tensors.pop(name)

    edit(demo_source, shift)
    error = refusal(demo_source)
    assert "13 missing, 13 unused" in error.message
    assert len(error.details) == 26


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_hidden_layers": 7}, "layers"),
        ({"hidden_size": 47}, "hidden"),
        ({"intermediate_size": 95}, "intermediate"),
        ({"head_dim": 15}, "head"),
        ({"num_key_value_heads": 1}, "key_value"),
        ({"vocab_size": 300}, "rows"),
    ],
)
def test_I8_a_config_that_does_not_fit_its_tensors_is_refused(
    change: dict[str, Any], field: str, demo_source: Path
) -> None:
    path = demo_source / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= change
    path.write_text(json.dumps(config))
    error = refusal(demo_source)
    assert any(field in detail for detail in error.details)


def test_I6_a_tied_head_is_dropped_with_its_reason(demo_source: Path) -> None:
    edit(demo_source, lambda tensors: tensors.update({"lm_head.weight": embedding(tensors).clone()}))
    made = plan(demo_source)
    assert [drop.name for drop in made.dropped] == ["lm_head.weight"]
    assert any("lm_head.weight is dropped" in note for note in made.notes)


def embedding(tensors: Tensors) -> torch.Tensor:
    return tensors["language_model.model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("language_model.model.layers.0.self_attn.q_proj.lora_A.weight", "merge"),
        ("language_model.model.layers.0.mlp.up_proj.SCB", "dequantise"),
        ("language_model.model.layers.0.mlp.up_proj.qweight", "dequantise"),
        ("language_model.model.layers.0.mlp.up_proj.weight_scale_inv", "dequantise"),
        ("language_model.model.layers.0.mlp.up_proj.weight.absmax", "dequantise"),
        ("_orig_mod.language_model.model.norm.weight", "unwrapped"),
    ],
)
def test_I7_an_altered_checkpoint_is_described(name: str, advice: str, demo_source: Path) -> None:
    edit(demo_source, lambda tensors: tensors.update({name: torch.zeros(3)}))
    assert advice in (refusal(demo_source).hint or "")


def test_an_integer_tensor_is_refused_with_its_dtype(demo_source: Path) -> None:
    name = "language_model.model.norm.weight"
    edit(demo_source, lambda tensors: tensors.update({name: torch.zeros(48, dtype=torch.int8)}))
    assert f"misshapen: {name} has dtype I8, expected one of BF16, F16, F32" in refusal(demo_source).details


def test_two_spellings_at_once_are_refused(demo_source: Path) -> None:
    stale = "model.language_model.layers.0.mlp.up_proj.weight"
    edit(demo_source, lambda tensors: tensors.update({stale: torch.zeros(96, 48, dtype=torch.bfloat16)}))
    assert "more than one way" in refusal(demo_source).message


def test_an_unknown_spelling_is_refused_with_the_names_found(demo_source: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"transformer.{name}"] = tensors.pop(name)

    edit(demo_source, rename)
    error = refusal(demo_source)
    assert "no text tensors under any known spelling" in error.message
    assert "transformer." in error.message


def test_a_map_for_another_family_is_refused(demo_source: Path, tmp_path: Path) -> None:
    text = (
        (find_map("gemma3").path).read_text().replace("model_type: [gemma3, gemma3_text]", "model_type: [gemma3_text]")
    )
    (tmp_path / "text-only.yaml").write_text(text)
    with pytest.raises(MappingError, match="is model_type 'gemma3'"):
        plan(demo_source, mapping=str(tmp_path / "text-only.yaml"))


@pytest.mark.sampled
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.from_)
def test_a_map_without_a_row_is_refused(row: Row, demo_source: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(find_map("gemma3").path.read_text())
    document["weights"] = [item for item in document["weights"] if item.get("from") != row.from_]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(CheckpointError) as caught:
        plan(demo_source, mapping=str(tmp_path / "short.yaml"))
    assert any(detail.startswith(f"unused: {name_of(row)}") for detail in caught.value.details)


@pytest.mark.sampled
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.from_)
def test_a_map_that_fills_one_target_less_is_refused(row: Row, demo_source: Path, tmp_path: Path) -> None:
    part, target = list(row.to.items())[-1]
    document = yaml.safe_load(find_map("gemma3").path.read_text())
    for item in document["weights"]:
        if item.get("from") == row.from_ and item["to"].get(part) == target:
            item["to"][part] = target.replace(".weight", ".wait").replace(".bias", ".bite").replace("_weight", "_wait")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(MappingError) as caught:
        plan(demo_source, mapping=str(tmp_path / "wrong.yaml"))
    name = list(expand(target, {}, COUNTS))[-1][1]
    assert any(detail.startswith(f"not filled: {name}") for detail in caught.value.details)


COPIES = """\
  - from: "{text}layers.{layer}.copy.weight"
    because: "it repeats the norm"
    must_equal: "{text}layers.{layer}.input_layernorm.weight"
drop:
"""


def test_a_dropped_tensor_of_a_layer_must_equal_that_layers(demo_source: Path, tmp_path: Path) -> None:
    """Each layer's copy is compared with its own layer, not with the first."""
    first, *rest = find_map("gemma3").path.read_text().partition("drop:\n")
    (tmp_path / "map.yaml").write_text(first + "drop:\n" + COPIES.removesuffix("drop:\n") + rest[1])
    norm = "language_model.model.layers.{}.input_layernorm.weight"
    copy = "language_model.model.layers.{}.copy.weight"
    edit(
        demo_source,
        lambda tensors: tensors.update({copy.format(layer): tensors[norm.format(layer)].clone() for layer in range(8)}),
    )
    mapping = str(tmp_path / "map.yaml")
    convert(demo_source, tmp_path / "out", mapping=mapping)

    def exchange(tensors: Tensors) -> None:
        tensors[norm.format(3)] = tensors[norm.format(3)] + 1
        tensors[copy.format(5)] = tensors[norm.format(0)].clone()

    edit(demo_source, exchange)
    with pytest.raises(CheckpointError, match=r"layers\.[35]\.copy\.weight: differs"):
        convert(demo_source, tmp_path / "other", mapping=mapping)


@pytest.mark.parametrize("equals", ["embed_tokens.misspelt", "{vision}post_layernorm.weight"])
def test_I6_a_drop_with_a_missing_counterpart_is_refused(equals: str, demo_source: Path, tmp_path: Path) -> None:
    text = find_map("gemma3").path.read_text()
    mapping = tmp_path / "map.yaml"
    mapping.write_text(text.replace('must_equal: "{text}embed_tokens.weight"', f'must_equal: "{equals}"'))
    table = "language_model.model.embed_tokens.weight"
    edit(demo_source, lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}))
    if equals.startswith("{vision}"):
        with pytest.raises(CheckpointError) as caught:
            plan(demo_source, mapping=str(mapping))
        (detail,) = caught.value.details
        assert detail.startswith("misshapen: lm_head.weight has shape")
        assert "must repeat vision_tower.vision_model.post_layernorm.weight of shape" in detail
    else:
        with pytest.raises(
            MappingError, match=r"lm_head\.weight can be dropped only if it equals embed_tokens\.misspelt"
        ):
            plan(demo_source, mapping=str(mapping))


def test_I5_a_head_without_the_embedding_is_reported_as_a_missing_embedding(demo_source: Path) -> None:
    table = "language_model.model.embed_tokens.weight"
    edit(demo_source, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(table)}))
    error = refusal(demo_source)
    assert any(detail.startswith(f"missing: {table}") for detail in error.details)
