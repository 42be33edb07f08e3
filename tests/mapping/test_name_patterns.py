from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2convert.mapping.name_patterns import INDEX_RANGES, expand, index_of, pattern_fault, placeholders, root_of

ROOTS = {"text": "model.", "vision": "tower."}
DIMS = {"layers": 3, "vision_layers": 2}


@pytest.mark.parametrize(
    ("pattern", "root", "index", "names"),
    [
        ("lm_head.weight", None, None, []),
        ("{text}norm.weight", "text", None, ["text"]),
        ("{text}layers.{layer}.mlp.weight", "text", "layer", ["text", "layer"]),
        ("{vision}encoder.layers.{vision_layer}.bias", "vision", "vision_layer", ["vision", "vision_layer"]),
        ("model.encoder.layers.{layer}.weight", None, "layer", ["layer"]),
        ("{layer}.weight", None, "layer", ["layer"]),
        ("{text}", "text", None, ["text"]),
        ("", None, None, []),
    ],
)
def test_a_pattern_is_taken_apart(pattern: str, root: str | None, index: str | None, names: list[str]) -> None:
    assert root_of(pattern) == root
    assert index_of(pattern) == index
    assert placeholders(pattern) == names
    assert pattern_fault(pattern, ROOTS, INDEX_RANGES.values()) is None


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("{text", "unbalanced braces"),
        ("text}", "unbalanced braces"),
        ("{text}layers.{layer", "unbalanced braces"),
        ("{{text}}layers", "unbalanced braces"),
        ("{text}a}b", "unbalanced braces"),
        ("{}norm", "unknown root or index {}"),
        ("{txt}norm", "unknown root or index {txt}"),
        ("{text}layers.{layr}.x", "unknown root or index {layr}"),
        ("{ text}norm", "unknown root or index { text}"),
        ("{TEXT}norm", "unknown root or index {TEXT}"),
        ("{layers}.x", "unknown root or index {layers}"),
        ("a.{text}norm", "the root {text} must come first"),
        ("{text}{vision}norm", "the root {vision} must come first"),
        ("{text}{text}norm", "the root {text} must come first"),
        ("{layer}.{text}norm", "the root {text} must come first"),
        ("{text}{layer}.{layer}", "more than one index"),
        ("{text}{layer}.{vision_layer}", "more than one index"),
    ],
)
def test_an_invalid_pattern_is_named(pattern: str, fault: str) -> None:
    assert pattern_fault(pattern, ROOTS, INDEX_RANGES.values()) == fault


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head.weight", [(None, "lm_head.weight")]),
        ("{text}norm.weight", [(None, "model.norm.weight")]),
        ("{text}layers.{layer}.w", [(0, "model.layers.0.w"), (1, "model.layers.1.w"), (2, "model.layers.2.w")]),
        ("layers.{layer}", [(0, "layers.0"), (1, "layers.1"), (2, "layers.2")]),
        ("{vision}{vision_layer}.b", [(0, "tower.0.b"), (1, "tower.1.b")]),
    ],
)
def test_a_pattern_expands_to_whole_names(pattern: str, expected: list[tuple[int | None, str]]) -> None:
    assert list(expand(pattern, ROOTS, DIMS)) == expected


def test_an_empty_spelling_leaves_the_rest_of_the_name() -> None:
    assert list(expand("{text}norm.weight", {"text": ""}, DIMS)) == [(None, "norm.weight")]


def test_a_model_without_layers_has_no_names() -> None:
    assert list(expand("{vision}{vision_layer}.b", ROOTS, {"vision_layers": 0})) == []


@pytest.mark.parametrize(("index", "dim"), INDEX_RANGES.items())
def test_an_index_counts_as_far_as_its_dim_says(index: str, dim: str) -> None:
    assert [layer for layer, _ in expand(f"x.{{{index}}}", {}, {dim: 120})] == list(range(120))


@pytest.mark.parametrize(("pattern", "dims"), [("x.{layer}", {}), ("{other}x", DIMS)])
def test_a_name_that_nothing_defines_does_not_expand(pattern: str, dims: Mapping[str, int]) -> None:
    with pytest.raises(KeyError):
        list(expand(pattern, ROOTS, dims))


LITERALS = st.text(alphabet="abc._0", max_size=6)


@given(LITERALS, LITERALS, LITERALS, st.integers(0, 130))
def test_an_expansion_has_one_distinct_name_for_each_layer(spelling: str, before: str, after: str, layers: int) -> None:
    pattern = f"{{text}}{before}.{{layer}}.{after}"
    assert pattern_fault(pattern, ROOTS, INDEX_RANGES.values()) is None
    found = dict(expand(pattern, {"text": spelling}, {"layers": layers}))
    assert found == {layer: f"{spelling}{before}.{layer}.{after}" for layer in range(layers)}
    assert len(set(found.values())) == layers


@given(st.text(alphabet="{}abtextlayer._", max_size=24))
def test_every_pattern_is_faulty_or_expands_without_braces(pattern: str) -> None:
    if pattern_fault(pattern, ROOTS, INDEX_RANGES.values()) is None:
        assert not [name for _, name in expand(pattern, ROOTS, DIMS) if "{" in name or "}" in name]
