"""What generation_config.json of an output should say: the source's, with the ids of tokens that move moved."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.checkpoint.families.gemma3 import Gemma3Text, read_gemma3
from t5g2convert.parity.checks.config import generation_faults

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


def moved() -> dict[str, Any]:
    return GIVEN | {"suppress_tokens": [256_001, 5], "sequence_bias": [[[256_001, 7], -1.0]]}


def faults(folders: tuple[Path, Path], writes: Gemma3Text, found: dict[str, Any]) -> list[str]:
    (folders[1] / "generation_config.json").write_text(json.dumps(found))
    return list(generation_faults(*folders, writes, MOVE))


def test_ids_move_and_nothing_else(folders: tuple[Path, Path], writes: Gemma3Text) -> None:
    assert faults(folders, writes, moved()) == []
    assert [fault.partition(" ")[0] for fault in faults(folders, writes, GIVEN)] == ["sequence_bias", "suppress_tokens"]


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {key: other(item) for key, item in value.items()}
    return [*value, 9] if isinstance(value, list) else value + 1


@pytest.mark.parametrize("name", GIVEN)
def test_every_value_counts(name: str, folders: tuple[Path, Path], writes: Gemma3Text) -> None:
    sound = moved()
    (fault,) = faults(folders, writes, sound | {name: other(sound[name])})
    assert fault == f"{name} is {other(sound[name])!r}, expected {sound[name]!r}"
    (fault,) = faults(folders, writes, {key: value for key, value in sound.items() if key != name})
    assert fault.startswith(f"{name} is missing")


@pytest.mark.parametrize(("name", "value"), [("top_k", 64.0), ("do_sample", 1), ("bos_token_id", 2.0), ("new", 1)])
def test_types_count_and_strangers(name: str, value: Any, folders: tuple[Path, Path], writes: Gemma3Text) -> None:
    (fault,) = faults(folders, writes, moved() | {name: value})
    assert fault.startswith(f"{name} is {value!r}")


def test_what_the_source_lacks_is_that_of_its_config(folders: tuple[Path, Path], writes: Gemma3Text) -> None:
    (folders[0] / "generation_config.json").write_text('{"eos_token_id": null, "top_k": 3}')
    assert faults(folders, writes, {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "top_k": 3}) == []
    (folders[0] / "generation_config.json").unlink()
    assert faults(folders, writes, {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}) == []
    assert faults(folders, writes, {}) != []
