import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Gemma2Config

from t5g2convert.checkpoint.families.gemma3 import Gemma3, Gemma3Text, read_gemma3
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint, read_json_object
from t5g2convert.parity.checks.config import STUB, expected_config, flatten, generation_faults, judge_config
from tests.conftest import TwinFolder
from tests.models.twins import BY_NAME, TWINS

EVERY = [twin.name for twin in TWINS]
MOVED = {"image_token_index": 256_001}
"""What the shipped map declares of a source with the default image token."""

CUT = {"vocab_size": 262_144, **MOVED}
"""What it declares of a source with rows of random fill."""


def gemma3(folder: Path) -> Gemma3:
    return read_gemma3(open_checkpoint(folder).config, folder / "config.json")


def changes_of(name: str) -> dict[str, Any]:
    """Return the expected changes, written by hand so that no new change goes unnoticed."""
    if name.endswith("with-fill"):
        return CUT
    return {} if BY_NAME[name].vision is not None else MOVED


def set_path(config: dict[str, Any], path: str, value: object) -> None:
    *keys, last = path.split(".")
    for key in keys:
        config = config[key]
    config[last] = value


def with_setting(target: Checkpoint, path: str, value: object) -> Checkpoint:
    config = copy.deepcopy(dict(target.config))
    set_path(config, path, value)
    return replace(target, config=config)


# What is expected


def test_flatten_names_settings_by_their_path() -> None:
    nested = {"a": 1, "b": {"c": [1, {"x": 2}], "d": {"e": None, "f": {}}}}
    assert dict(flatten(nested)) == {"a": 1, "b.c": [1, {"x": 2}], "b.d.e": None, "b.d.f": {}}
    assert dict(flatten({})) == {}


@pytest.mark.parametrize("name", EVERY)
def test_transformers_reads_every_expected_setting_and_writes_it_again(
    name: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    expected = expected_config(gemma3(twin_folder(name)), changes_of(name))
    config = T5Gemma2Config.from_dict(copy.deepcopy(expected))
    config.save_pretrained(tmp_path)
    again = T5Gemma2Config.from_pretrained(tmp_path)
    for read in (config, again):
        found = dict(flatten(json.loads(read.to_json_string(use_diff=False))))
        assert {path: found.get(path, "missing") for path, _ in flatten(expected)} == dict(flatten(expected))


def test_a_source_without_images_gets_the_stub(twin_folder: TwinFolder) -> None:
    expected = expected_config(gemma3(twin_folder("text-8")), {})["encoder"]
    assert STUB.items() <= expected["vision_config"].items()
    assert expected["vision_config"]["num_hidden_layers"] == 0
    assert expected["mm_tokens_per_image"] == 4


def test_the_expected_tower_equals_the_sources(twin_folder: TwinFolder) -> None:
    expected = expected_config(gemma3(twin_folder("images-8")), {})["encoder"]
    vision = BY_NAME["images-8"].vision
    assert vision is not None
    assert vision.items() <= expected["vision_config"].items()
    assert expected["mm_tokens_per_image"] == 4
    assert [expected[f"{token}_token_index"] for token in ("boi", "eoi", "image")] == [290, 291, 292]


# Judgement


@pytest.mark.parametrize("name", EVERY)
def test_every_twins_conversion_has_the_expected_settings(
    name: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    target = open_checkpoint(converted_twin(name))
    check = judge_config(gemma3(twin_folder(name)), target, changes_of(name))
    assert check.passed, check.offenders
    assert str(len(dict(flatten(target.config)))) in check.detail
    assert all(field in check.detail for field in changes_of(name))
    declared = read_json_object(target.path / "t5g2.json")["changes"]
    assert {change["field"]: change["target"] for change in declared} == changes_of(name)


def test_an_undeclared_cut_is_a_fault(twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    name = "images-with-fill"
    target = open_checkpoint(converted_twin(name))
    check = judge_config(gemma3(twin_folder(name)), target, {})
    assert not check.passed
    assert "vocab_size is 262144, expected 262208" in check.offenders
    assert "encoder.image_token_index is 256001, expected 262144" in check.offenders


@pytest.fixture(scope="module")
def sound(twin_folder: TwinFolder, converted_twin: TwinFolder) -> tuple[Gemma3, Checkpoint]:
    target = open_checkpoint(converted_twin("images-8"))
    return gemma3(twin_folder("images-8")), target


def other(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, list):
        return [*value, "other"]
    return "other" if value is None else f"{value}x"


def test_every_single_setting_counts(sound: tuple[Gemma3, Checkpoint]) -> None:
    source, target = sound
    paths = dict(flatten(target.config))
    assert len(paths) > 90
    for path, value in paths.items():
        check = judge_config(source, with_setting(target, path, other(value)), {})
        assert not check.passed, path
        assert f"{path} is {other(value)!r}, expected {value!r}" in check.offenders


def test_missing_and_extra_settings_are_faults(sound: tuple[Gemma3, Checkpoint]) -> None:
    source, target = sound
    for path in dict(flatten(target.config)):
        config = copy.deepcopy(dict(target.config))
        *keys, last = path.split(".")
        section = config
        for key in keys:
            section = section[key]
        value = section.pop(last)
        check = judge_config(source, replace(target, config=config), {})
        assert f"{path} is missing, expected {value!r}" in check.offenders
    for path in ("new", "encoder.text_config.use_bidirectional_attention", "decoder.rope_scaling"):
        check = judge_config(source, with_setting(target, path, True), {})
        assert check.offenders == (f"{path} is True, which is not a setting of this model",)


@pytest.mark.parametrize(("path", "value"), [("decoder.use_cache", 1), ("decoder.num_key_value_heads", True)])
def test_a_boolean_is_not_a_number(path: str, value: object, sound: tuple[Gemma3, Checkpoint]) -> None:
    source, target = sound
    assert dict(flatten(target.config))[path] == value
    check = judge_config(source, with_setting(target, path, value), {})
    assert any(offender.startswith(f"{path} is {value!r}") for offender in check.offenders)


def test_dtype_must_match_the_tensors(sound: tuple[Gemma3, Checkpoint]) -> None:
    source, target = sound
    (fault,) = judge_config(source, with_setting(target, "dtype", "float32"), {}).offenders
    assert fault == "dtype is 'float32', expected 'bfloat16'"


def test_a_change_declared_by_name_is_expected_in_both_stacks(
    sound: tuple[Gemma3, Checkpoint],
) -> None:
    source, target = sound
    changes = {"sliding_window": 9}
    assert not judge_config(source, target, changes).passed
    half = with_setting(target, "decoder.sliding_window", 9)
    assert judge_config(source, half, changes).offenders == ("encoder.text_config.sliding_window is 5, expected 9",)
    check = judge_config(source, with_setting(half, "encoder.text_config.sliding_window", 9), changes | {"dtype": "x"})
    assert check.passed
    assert "sliding_window" in check.detail


def test_a_change_declared_by_path_is_expected_only_there(sound: tuple[Gemma3, Checkpoint]) -> None:
    source, target = sound
    path = "decoder.rope_parameters.full_attention.factor"
    changed = with_setting(target, path, 8.0)
    assert judge_config(source, changed, {path: 8.0}).passed
    assert not judge_config(source, changed, {path: 4.0}).passed
    assert not judge_config(source, target, {path: 8.0}).passed
    both = with_setting(changed, path.replace("decoder", "encoder.text_config"), 8.0)
    assert not judge_config(source, both, {path: 8.0}).passed


def test_a_declared_change_adds_no_setting(sound: tuple[Gemma3, Checkpoint]) -> None:
    source, target = sound
    changed = with_setting(target, "decoder.rope_parameters.full_attention.beta", 8.0)
    check = judge_config(source, changed, {"decoder.rope_parameters.full_attention.beta": 8.0})
    assert not check.passed


def test_tensors_that_the_config_does_not_imply_are_faults(
    sound: tuple[Gemma3, Checkpoint],
) -> None:
    source, target = sound
    tensors = dict(target.tensors)
    norm = tensors.pop("model.decoder.norm.weight")
    tensors["model.decoder.norm.bias"] = norm
    tensors["model.encoder.norm.weight"] = tensors["model.encoder.embed_tokens.weight"]
    check = judge_config(source, replace(target, tensors=tensors), {})
    assert check.offenders == (
        "tensors: model.encoder.norm.weight has shape [300, 24], expected [24]",
        "tensors: model.decoder.norm.weight is missing",
        "tensors: model.decoder.norm.bias is not a tensor of this model",
    )


def test_an_undeclared_type_is_a_fault(sound: tuple[Gemma3, Checkpoint]) -> None:
    """transformers 5.23 refuses 0 for 0.0 in most fields, and 16.0 for 16 in all."""
    source, target = sound
    for path, value in dict(flatten(target.config)).items():
        if type(value) in (int, float) and value == int(value):
            other_type = float(value) if type(value) is int else int(value)
            check = judge_config(source, with_setting(target, path, other_type), {})
            assert f"{path} is {other_type!r}, expected {value!r}" in check.offenders


def test_faults_of_generation_config(sound: tuple[Gemma3, Checkpoint]) -> None:
    check = judge_config(*sound, {}, generation=["top_k is 3, expected 64"])
    assert check.offenders == ("generation_config.json: top_k is 3, expected 64",)


GIVEN: dict[str, Any] = {
    "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "do_sample": True, "top_k": 64, "top_p": 0.95,
    "stop_strings": ["###"], "suppress_tokens": [262_144, 5], "sequence_bias": [[[262_144, 7], -1.0]],
    "watermarking_config": {"bias": 2.0, "context_width": 1}, "max_new_tokens": 262_144, "of_a_fork": {"deep": [1]},
}  # fmt: skip
MOVE = (262_144, 256_001)


@pytest.fixture
def writes() -> Gemma3Text:
    return read_gemma3({"model_type": "gemma3_text"}, Path("config.json")).text


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "generation_config.json").write_text(json.dumps(GIVEN))
    return source, target


def moved_ids() -> dict[str, Any]:
    return GIVEN | {"suppress_tokens": [256_001, 5], "sequence_bias": [[[256_001, 7], -1.0]]}


def faults_of(folders: tuple[Path, Path], writes: Gemma3Text, found: dict[str, Any]) -> list[str]:
    (folders[1] / "generation_config.json").write_text(json.dumps(found))
    return list(generation_faults(*folders, writes, MOVE))


def test_only_ids_move(folders: tuple[Path, Path], writes: Gemma3Text) -> None:
    assert faults_of(folders, writes, moved_ids()) == []
    assert [fault.partition(" ")[0] for fault in faults_of(folders, writes, GIVEN)] == [
        "sequence_bias",
        "suppress_tokens",
    ]


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {key: another(item) for key, item in value.items()}
    return [*value, 9] if isinstance(value, list) else value + 1


@pytest.mark.parametrize("name", GIVEN)
def test_every_value_counts(name: str, folders: tuple[Path, Path], writes: Gemma3Text) -> None:
    sound = moved_ids()
    (fault,) = faults_of(folders, writes, sound | {name: another(sound[name])})
    assert fault == f"{name} is {another(sound[name])!r}, expected {sound[name]!r}"
    (fault,) = faults_of(folders, writes, {key: value for key, value in sound.items() if key != name})
    assert fault.startswith(f"{name} is missing")


@pytest.mark.parametrize(("name", "value"), [("top_k", 64.0), ("do_sample", 1), ("bos_token_id", 2.0), ("new", 1)])
def test_changed_types_and_unknown_settings_are_faults(
    name: str, value: Any, folders: tuple[Path, Path], writes: Gemma3Text
) -> None:
    (fault,) = faults_of(folders, writes, moved_ids() | {name: value})
    assert fault.startswith(f"{name} is {value!r}")


def test_missing_values_are_taken_from_the_config(folders: tuple[Path, Path], writes: Gemma3Text) -> None:
    (folders[0] / "generation_config.json").write_text('{"eos_token_id": null, "top_k": 3}')
    assert faults_of(folders, writes, {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "top_k": 3}) == []
    (folders[0] / "generation_config.json").unlink()
    assert faults_of(folders, writes, {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}) == []
    assert faults_of(folders, writes, {}) != []
