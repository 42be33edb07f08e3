from pathlib import Path

import pytest

from t5g2convert import inspect, plan
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.library import map_for, shipped_maps
from t5g2convert.mapping.name_patterns import INDEX_RANGES
from t5g2convert.mapping.source_families import FAMILIES, source_variants
from t5g2convert.mapping.synthetic import write_synthetic_source
from t5g2convert.mapping.template import TARGET_VALUES


@pytest.fixture(params=FAMILIES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_example_of_a_family_is_read_as_that_family(model_type: str) -> None:
    family = FAMILIES[model_type]
    assert family.example["model_type"] == model_type
    assert family.terms.family == model_type


def test_a_family_refuses_the_other_families_and_no_config_at_all(model_type: str) -> None:
    for example in ({}, {"model_type": f"{model_type}_other"}):
        with pytest.raises(CheckpointError):
            FAMILIES[model_type].read(example, Path("config.json"))


def test_a_family_defines_the_dims_that_the_engine_asks_for(model_type: str) -> None:
    dims = FAMILIES[model_type].terms.dims.keys()
    assert "rows" in dims
    assert dims & set(INDEX_RANGES.values())


def test_the_dims_of_a_family_are_sizes(model_type: str) -> None:
    dims = FAMILIES[model_type].terms.dims
    assert {name: value for name, value in dims.items() if type(value) is not int or value < 0} == {}


def test_a_family_leaves_the_targets_own_names_free(model_type: str) -> None:
    terms = FAMILIES[model_type].terms
    assert terms.values.keys().isdisjoint(TARGET_VALUES)
    assert "vocab" not in terms.dims


def test_a_models_type_is_one_of_its_familys_variants(model_type: str) -> None:
    family = FAMILIES[model_type]
    assert family.terms.features in family.variants
    assert set(family.variants) <= set(source_variants(FAMILIES))


def test_a_model_has_images_or_has_none(model_type: str) -> None:
    assert all(len(variant & {"vision", "text_only"}) == 1 for variant in FAMILIES[model_type].variants)


def test_every_family_has_a_shipped_map_and_every_map_its_families(model_type: str) -> None:
    made = {each.map.extracts for each in shipped_maps() if model_type in each.map.source.model_type}
    assert made in ({None}, {"encoder", "decoder"})
    for part in made:
        loaded = map_for(FAMILIES[model_type].example, Path("config.json"), extracts=part)
        assert model_type in loaded.map.source.model_type
    named = {name for each in shipped_maps() for name in each.map.source.model_type}
    assert named == set(FAMILIES)


DECODER_ONLY = sorted(
    {name for each in shipped_maps() if each.map.extracts is None for name in each.map.source.model_type}
)


@pytest.mark.parametrize("model_type", DECODER_ONLY)
def test_the_example_of_a_family_can_be_inspected_and_planned(model_type: str, tmp_path: Path) -> None:
    example = FAMILIES[model_type].example
    write_synthetic_source(tmp_path, map_for(example, tmp_path).map, example, seed=None)
    inspection = inspect(tmp_path)
    assert (inspection.family, inspection.missing, inspection.unexpected) == (model_type, (), ())
    made = plan(tmp_path)
    assert made.source.family == model_type
    # A decoder has the same as its encoder, plus cross-attention in some families.
    assert made.parameters["decoder"] >= made.parameters["encoder"] == inspection.parameters["decoder"] > 0


def test_the_terms_of_a_family_are_read_once(model_type: str) -> None:
    assert FAMILIES[model_type].terms is FAMILIES[model_type].terms
