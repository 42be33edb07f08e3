from pathlib import Path
from typing import Any

import pytest

from t5g2convert import MappingError, UsageError
from t5g2convert.checkpoint.families.gemma3 import Gemma3, read_gemma3
from t5g2convert.conversion.options import Options, recorded_options
from t5g2convert.mapping.schema import WeightMap
from tests.sizes import FIELDS, SIZES

RELEASES = {"t5gemma-2-270m-270m": "270m", "t5gemma-2-1b-1b": "1b", "t5gemma-2-4b-4b": "4b"}


def model(size: str = "270m", **fields: Any) -> Gemma3:
    window = 1024 if size == "4b" else 512
    made = {"max_position_embeddings": 32768, "sliding_window": window}
    config = {**dict(zip(FIELDS, SIZES[size], strict=True)), **made, **fields}
    return read_gemma3({"model_type": "gemma3_text", **config}, Path("config.json"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "unknown dtype"),
        ({"max_shard_bytes": 0}, "holds nothing"),
        ({"vision_from": Path("x"), "projector": "best"}, "unknown projector"),
        ({"projector": "zeros"}, "--vision-from"),
        ({"vision_from": Path("x"), "projector": "aligned", "ridge": -1.0}, "ridge"),
        ({"vision_from": Path("x"), "projector": "aligned", "ridge": float("nan")}, "ridge"),
        ({"vision_from": Path("x"), "projector": "aligned", "ridge": float("inf")}, "ridge"),
        ({"vision_from": Path("x"), "ridge": 0.1}, "--projector aligned"),
        ({"rope_scaling": "yarn:8"}, "linear:F"),
        ({"rope_scaling": "linear"}, "linear:F"),
        ({"rope_scaling": "linear:"}, "linear:F"),
        ({"rope_scaling": "linear:0"}, "RoPE factor"),
        ({"rope_scaling": "linear:-8"}, "RoPE factor"),
        ({"rope_scaling": "linear:nan"}, "linear:F"),
        ({"rope_scaling": "linear:inf"}, "RoPE factor"),
        ({"rope_scaling": "linear:1e308"}, "a RoPE factor of 1e\\+308 has no meaning"),
        ({"rope_scaling": "linear:1e-308"}, "RoPE factor"),
        ({"rope_scaling": "8"}, "linear:F"),
        ({"sliding_window": 0}, "sliding window"),
        ({"sliding_window": 2**31}, "sliding window"),
    ],
    ids=str,
)
def test_an_option_without_meaning_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Options(**options)


def test_without_options_nothing_is_set_and_nothing_recorded(gemma3_map: WeightMap) -> None:
    assert Options().settings(model().values, gemma3_map) == {}
    assert Options().record() == {}


@pytest.mark.parametrize(
    ("scaling", "before", "expected"),
    [
        ("linear:8", {}, {"rope_full_factor": 8.0, "max_position_embeddings": 262144}),
        ("linear:1.5", {}, {"rope_full_factor": 1.5, "max_position_embeddings": 49152}),
        # The length is the source's for the source's factor.
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
    assert Options(rope_scaling=scaling).settings(model(**before).values, gemma3_map) == expected


@pytest.mark.parametrize(("preset", "size"), RELEASES.items())
def test_a_preset_gives_what_the_release_has(preset: str, size: str, gemma3_map: WeightMap) -> None:
    settings = Options(preset=preset).settings(model(size).values, gemma3_map)
    assert settings == {"rope_full_factor": 8.0, "max_position_embeddings": 131072}
    assert gemma3_map.presets[preset].assumed == ["max_position_embeddings"]


def test_every_preset_is_a_release(gemma3_map: WeightMap) -> None:
    assert gemma3_map.presets.keys() == RELEASES.keys()


def test_options_win_over_a_preset(gemma3_map: WeightMap) -> None:
    options = Options(preset="t5gemma-2-270m-270m", rope_scaling="linear:4", sliding_window=256)
    assert options.settings(model().values, gemma3_map) == {
        "rope_full_factor": 4.0,
        "max_position_embeddings": 131072,
        "sliding_window": 256,
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sliding_window": 513}, "is for sliding_window 512, the source has 513"),
        ({"rope_theta": 5e5}, "is for rope_full_theta 1000000, the source has 500000.0"),
        ({"rope_local_base_freq": 2e4}, "is for rope_sliding_theta 10000, the source has 20000.0"),
        ({"num_hidden_layers": 19}, "is for num_hidden_layers 18, the source has 19"),
    ],
)
def test_what_a_release_has_of_its_parent_is_asked_of_the_source(
    fields: dict[str, Any], says: str, gemma3_map: WeightMap
) -> None:
    with pytest.raises(MappingError, match=says):
        Options(preset="t5gemma-2-270m-270m").settings(model(**fields).values, gemma3_map)


def test_a_preset_of_another_size_is_refused(gemma3_map: WeightMap) -> None:
    with pytest.raises(MappingError, match="is for hidden_size 1152, the source has 640"):
        Options(preset="t5gemma-2-1b-1b").settings(model().values, gemma3_map)


def test_an_unknown_preset_is_refused_with_the_nearest(gemma3_map: WeightMap) -> None:
    with pytest.raises(MappingError, match="did you mean t5gemma-2-1b-1b"):
        Options(preset="t5gemma-2-1b").settings(model().values, gemma3_map)


def test_what_is_recorded_gives_the_same_options_again() -> None:
    options = Options(dtype="float32", rope_scaling="linear:8", sliding_window=7, max_shard_bytes=10)
    assert options.record() == {
        "dtype": "float32",
        "rope_scaling": "linear:8",
        "sliding_window": 7,
        "max_shard_bytes": 10,
    }
    assert Options(**recorded_options(options.record())) == options


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("linear:8.0", "linear:8"),
        ("linear:0.80e1", "linear:8"),
        ("linear: 1.50", "linear:1.5"),
        ("linear:1e9", "linear:1000000000"),
    ],
)
def test_one_factor_has_one_spelling(given: str, recorded: str) -> None:
    options = Options(rope_scaling=given)
    assert options.record() == {"rope_scaling": recorded}
    assert Options(rope_scaling=recorded) == options


def test_paths_are_not_recorded() -> None:
    options = Options(mapping="x.yaml", vision_from=Path("/home/me/donor"), projector="zeros")
    assert options.record() == {"projector": "zeros"}
