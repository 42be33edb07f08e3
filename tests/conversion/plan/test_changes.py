from pathlib import Path
from typing import Any

import pytest

from t5g2convert import MappingError
from t5g2convert.checkpoint.families.gemma3 import Gemma3, read_gemma3
from t5g2convert.conversion.options import PlanOptions
from t5g2convert.conversion.plan.changes import changed_values
from t5g2convert.mapping.schema import WeightMap
from tests.models.sizes import FIELDS, SIZES

RELEASES = {"t5gemma-2-270m-270m": "270m", "t5gemma-2-1b-1b": "1b", "t5gemma-2-4b-4b": "4b"}


def model(size: str = "270m", **fields: Any) -> Gemma3:
    window = 1024 if size == "4b" else 512
    made = {"max_position_embeddings": 32768, "sliding_window": window}
    config = {**dict(zip(FIELDS, SIZES[size], strict=True)), **made, **fields}
    return read_gemma3({"model_type": "gemma3_text", **config}, Path("config.json"))


def test_without_options_no_value_changes(gemma3_map: WeightMap) -> None:
    assert changed_values(PlanOptions(), model().values, gemma3_map) == {}


@pytest.mark.parametrize(
    ("scaling", "before", "expected"),
    [
        ("linear:8", {}, {"rope_full_factor": 8.0, "max_position_embeddings": 262144}),
        ("linear:1.5", {}, {"rope_full_factor": 1.5, "max_position_embeddings": 49152}),
        # The maximum length is the source's at the source's factor.
        (
            "linear:16",
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 131072},
            {"rope_full_factor": 16.0, "max_position_embeddings": 262144},
        ),
        ("linear:1e-9", {}, {"rope_full_factor": 1e-9, "max_position_embeddings": 1}),
        ("linear:1e9", {}, {"rope_full_factor": 1e9, "max_position_embeddings": 2**31 - 1}),
        (
            "linear:1e9",
            {"rope_scaling": {"rope_type": "linear", "factor": 1e-300}},
            {"rope_full_factor": 1e9, "max_position_embeddings": 2**31 - 1},
        ),
    ],
)
def test_a_linear_factor_allows_as_much_longer_inputs(
    scaling: str, before: dict[str, Any], expected: dict[str, Any], gemma3_map: WeightMap
) -> None:
    assert changed_values(PlanOptions(rope_scaling=scaling), model(**before).values, gemma3_map) == expected


@pytest.mark.parametrize(("preset", "size"), RELEASES.items())
def test_a_preset_gives_the_settings_of_the_release(preset: str, size: str, gemma3_map: WeightMap) -> None:
    settings = changed_values(PlanOptions(preset=preset), model(size).values, gemma3_map)
    assert settings == {"rope_full_factor": 8.0, "max_position_embeddings": 131072}
    assert gemma3_map.presets[preset].assumed == ["max_position_embeddings"]


def test_every_preset_is_a_release(gemma3_map: WeightMap) -> None:
    assert gemma3_map.presets.keys() == RELEASES.keys()


def test_options_win_over_a_preset(gemma3_map: WeightMap) -> None:
    options = PlanOptions(preset="t5gemma-2-270m-270m", rope_scaling="linear:4", sliding_window=256)
    assert changed_values(options, model().values, gemma3_map) == {
        "rope_full_factor": 4.0,
        "max_position_embeddings": 131072,
        "sliding_window": 256,
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sliding_window": 513}, "requires sliding_window 512, but the source has 513"),
        ({"rope_theta": 5e5}, "requires rope_full_theta 1000000, but the source has 500000.0"),
        ({"rope_local_base_freq": 2e4}, "requires rope_sliding_theta 10000, but the source has 20000.0"),
        ({"num_hidden_layers": 19}, "requires num_hidden_layers 18, but the source has 19"),
    ],
)
def test_the_source_must_have_the_values_that_a_release_inherits(
    fields: dict[str, Any], says: str, gemma3_map: WeightMap
) -> None:
    with pytest.raises(MappingError, match=says):
        changed_values(PlanOptions(preset="t5gemma-2-270m-270m"), model(**fields).values, gemma3_map)


def test_a_preset_of_another_size_is_refused(gemma3_map: WeightMap) -> None:
    with pytest.raises(MappingError, match="requires hidden_size 1152, but the source has 640"):
        changed_values(PlanOptions(preset="t5gemma-2-1b-1b"), model().values, gemma3_map)


def test_an_unknown_preset_is_refused_with_the_nearest(gemma3_map: WeightMap) -> None:
    with pytest.raises(MappingError, match="did you mean t5gemma-2-1b-1b"):
        changed_values(PlanOptions(preset="t5gemma-2-1b"), model().values, gemma3_map)
