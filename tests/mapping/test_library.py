"""Shipped maps are found by name or by the source's config; only the chosen one is loaded."""

from pathlib import Path

import pytest

from t5g2convert import plan
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping import library
from t5g2convert.mapping.library import find_map, map_for, mappings_folder, shipped_maps
from t5g2convert.mapping.strictyaml import load_yaml
from t5g2convert.mapping.weightmap import LoadedMap

WHERE = Path("somewhere/config.json")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the loaded files, in order."""
    names: list[str] = []
    load = library.load_map

    def counted(path: Path) -> LoadedMap:
        names.append(path.name)
        return load(path)

    monkeypatch.setattr(library, "load_map", counted)
    return names


def test_every_shipped_map_is_found_by_name_and_by_its_sources() -> None:
    for each in shipped_maps():
        assert find_map(each.map.name) == each
        for model_type in each.map.source.model_type:
            assert map_for({"model_type": model_type}, WHERE, extracts=each.map.extracts) == each


@pytest.mark.parametrize(
    ("model_type", "extracts", "name"),
    [
        ("gemma3", None, "gemma3"),
        ("gemma3_text", None, "gemma3"),
        ("gemma2", None, "gemma2"),
        ("t5gemma2", "encoder", "t5gemma2-encoder"),
        ("t5gemma2", "decoder", "t5gemma2-decoder"),
    ],
)
def test_only_the_map_of_the_source_is_loaded(
    model_type: str, extracts: str | None, name: str, loaded: list[str]
) -> None:
    assert map_for({"model_type": model_type}, WHERE, extracts=extracts).map.name == name
    assert loaded == [f"{name}.yaml"]


def test_a_plan_loads_one_map(demo_source: Path, loaded: list[str]) -> None:
    plan(demo_source)
    assert loaded == ["gemma3.yaml"]


def test_a_source_without_a_map_is_refused_without_loading_any(loaded: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        map_for({"model_type": "t5gemma2"}, WHERE)
    assert caught.value.message.endswith(
        "cannot be converted; the shipped mappings convert gemma2, gemma3, gemma3_text"
    )
    assert caught.value.where == str(WHERE)
    assert loaded == []


@pytest.mark.parametrize(
    "text", ["source: 3\nweights: []\n", "[]\n", "weights: []\n", "source: {model_type: []}\n", "name: x\n"]
)
def test_a_damaged_header_raises_the_same_error_as_loading_the_map(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gemma3.yaml").write_text(text)
    monkeypatch.setattr(library, "mappings_folder", lambda: tmp_path)
    with pytest.raises(MappingError) as expected:
        library.load_map(tmp_path / "gemma3.yaml")
    with pytest.raises(MappingError) as caught:
        map_for({"model_type": "gemma3"}, WHERE)
    assert str(caught.value) == str(expected.value)


def test_nothing_behind_the_last_key_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("name: x\nsource: {weights: 1}\nweights:\n  - *alias\n")
    assert load_yaml(path, until="weights").data == {"name": "x", "source": {"weights": 1}}
    with pytest.raises(MappingError, match="an alias"):
        load_yaml(path)
    assert load_yaml(mappings_folder() / "gemma3.yaml", until="weights").data["name"] == "gemma3"
