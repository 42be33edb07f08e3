from pathlib import Path
from typing import Any

import pytest

from t5g2convert import UsageError
from t5g2convert.conversion.options import ConvertOptions, PlanOptions, WriteOptions
from t5g2convert.conversion.plan.layer_spec import LayerSpec


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "dtype: Input should be 'keep', 'bfloat16'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: Input should be greater"),
        ({"vision_from": Path("x"), "projector": "best"}, "projector: Input should be"),
        ({"projector": "zeros"}, "--vision-from"),
        ({"vision_from": Path("x"), "projector": "aligned", "ridge": -1.0}, "ridge"),
        ({"vision_from": Path("x"), "projector": "aligned", "ridge": float("nan")}, "ridge"),
        ({"vision_from": Path("x"), "projector": "aligned", "ridge": float("inf")}, "ridge"),
        ({"vision_from": Path("x"), "ridge": 0.1}, "--projector aligned"),
        ({"rope_scaling": "yarn:8"}, "linear:F"),
        ({"rope_scaling": "linear"}, "linear:F"),
        ({"rope_scaling": "linear:"}, "linear:F"),
        ({"rope_scaling": "linear:0"}, "factor of --rope-scaling"),
        ({"rope_scaling": "linear:-8"}, "factor of --rope-scaling"),
        ({"rope_scaling": "linear:nan"}, "linear:F"),
        ({"rope_scaling": "linear:inf"}, "factor of --rope-scaling"),
        ({"rope_scaling": "linear:1e308"}, "must be between 1/2147483647 and 2147483647, got 1e\\+308"),
        ({"rope_scaling": "linear:1e-308"}, "factor of --rope-scaling"),
        ({"rope_scaling": "8"}, "linear:F"),
        ({"sliding_window": 0}, "--sliding-window must be between 2 and 2147483647"),
        ({"sliding_window": True}, "sliding_window: Input should be a valid integer"),
        ({"encoder_layers": 3}, "--encoder-layers"),
        ({"decoder_from": 3}, "decoder_from: Input should be"),
        ({"window": 3}, "window: Extra inputs are not permitted"),
        ({"sliding_window": 2**31}, "--sliding-window must be between 2 and 2147483647"),
    ],
    ids=str,
)
def test_an_impossible_value_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        PlanOptions(**options)


def test_defaults_are_not_recorded() -> None:
    assert PlanOptions().record() == {}
    assert PlanOptions.of_record({}) == PlanOptions()


def test_a_record_gives_the_same_options_again() -> None:
    options = PlanOptions(dtype="float32", rope_scaling="linear:8", sliding_window=7, max_shard_bytes=10)
    assert options.record() == {
        "dtype": "float32",
        "rope_scaling": "linear:8",
        "sliding_window": 7,
        "max_shard_bytes": 10,
    }
    assert PlanOptions.of_record(options.record()) == options


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
    options = PlanOptions(rope_scaling=given)
    assert options.record() == {"rope_scaling": recorded}
    assert PlanOptions(rope_scaling=recorded) == options


def test_paths_are_not_recorded() -> None:
    options = PlanOptions(mapping="x.yaml", vision_from=Path("/home/me/donor"), projector="zeros")
    assert options.record() == {"projector": "zeros"}


@pytest.mark.parametrize(
    "record",
    [
        {"ridge": 0.0},
        {"dtype": "keep"},
        {"keep_rows": False},
        {"keep_rows": 1},
        {"encoder_layers": "first:3"},
        {"encoder_layers": [0, 1.0]},
        {"rope_scaling": "linear:8.0"},
        {"mapping": "gemma3"},
        {"part": "encoder"},
        {"sliding_window": "512"},
        {"windows": 2},
        {"overwrite": True},
    ],
    ids=str,
)
def test_a_record_that_no_conversion_writes_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PlanOptions.of_record(record)


def test_only_options_that_affect_the_bytes_are_recorded() -> None:
    assert ConvertOptions(hashing=False, overwrite=True, allow_nonfinite=True, dtype="float16").record() == {
        "dtype": "float16"
    }


def test_to_resume_takes_sha256() -> None:
    with pytest.raises(UsageError, match="--resume needs sha256"):
        WriteOptions(resume=True, hashing=False)


@pytest.mark.parametrize("spelling", ["first:3", "0:3", "0,1,2", [0, 1, 2], (0, 1, 2)], ids=str)
def test_layers_are_kept_as_numbers(spelling: LayerSpec) -> None:
    options = PlanOptions(encoder_layers=spelling)
    assert options.layers == {"encoder": (0, 1, 2)}
    assert options.record() == {"encoder_layers": [0, 1, 2]}
