"""generation_config.json keeps every key; ids move with their tokens and must have a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import plan
from t5g2convert.conversion.assets.generation_config import check_tokens, generation_config
from t5g2convert.errors import CheckpointError

WHERE = Path("generation_config.json")
MOVES = {262_144: 256_001}


def made(given: dict[str, Any], gaps: dict[str, Any] | None = None, rows: int = 262_144) -> dict[str, Any]:
    return generation_config(given, gaps or {}, MOVES, rows, WHERE)


def test_every_key_is_carried_and_gaps_are_filled() -> None:
    given = {"do_sample": True, "top_k": 64, "of_a_fork": {"deep": [1, 2]}, "eos_token_id": [1, 106]}
    assert made(given, {"eos_token_id": 1, "pad_token_id": 0}) == {**given, "pad_token_id": 0}


def test_ids_move_and_other_numbers_do_not() -> None:
    given = {
        "suppress_tokens": [262_144, 5], "bad_words_ids": [[262_144]], "sequence_bias": [[[262_144], 262_144.0]],
        "pad_token_id": 262_144, "max_length": 262_144, "force_words_ids": [[[7, 262_144]]],
        "forced_decoder_ids": [[262_144, 262_144], [2, None]],
    }  # fmt: skip
    assert made(given) == {
        "suppress_tokens": [256_001, 5], "bad_words_ids": [[256_001]], "sequence_bias": [[[256_001], 262_144.0]],
        "pad_token_id": 256_001, "max_length": 262_144, "force_words_ids": [[[7, 256_001]]],
        "forced_decoder_ids": [[262_144, 256_001], [2, None]],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pad_token_id", 262_150, "pad_token_id has token 262150, but the embedding table keeps 262144 rows"),
        ("eos_token_id", [1, -1], "eos_token_id has token -1"),
        ("bad_words_ids", [[1], [2, 300_000]], "bad_words_ids has token 300000"),
        ("sequence_bias", [[[300_000], 1.0]], "sequence_bias has token 300000"),
        ("forced_decoder_ids", [[1, 300_000]], "forced_decoder_ids has token 300000"),
        ("decoder_start_token_id", "<bos>", "decoder_start_token_id has '<bos>', expected a token id"),
        ("forced_eos_token_id", 1.0, "forced_eos_token_id has 1.0, expected a token id"),
        ("suppress_tokens", [256_001], "suppress_tokens has token 256001, which is the new id"),
        ("image_token_id", True, "image_token_id has True"),
    ],
)
def test_an_id_without_a_row_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        made({key: value, "top_k": 3})
    assert message in caught.value.message


def test_all_ids_without_a_row_are_listed_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_tokens({"bos_token_id": 7, "eos_token_id": [8, 1]}, {}, 5, WHERE)
    assert len(caught.value.details) == 2


def test_a_plan_has_the_sources_settings(demo_source: Path) -> None:
    given = {"do_sample": True, "top_p": 0.95, "stop_strings": ["###"], "pad_token_id": None}
    (demo_source / "generation_config.json").write_text(json.dumps(given))
    found = plan(demo_source)
    assert found.generation_config is not None
    assert found.generation_config.items() >= {"do_sample": True, "top_p": 0.95, "pad_token_id": 0}.items()
    assert found.generation_config["stop_strings"] == ["###"]


def test_a_plan_refuses_an_id_past_its_table(demo_source: Path) -> None:
    (demo_source / "generation_config.json").write_text('{"suppress_tokens": [1, 99999999]}')
    with pytest.raises(CheckpointError, match="has suppress_tokens as 99999999, but the embedding table has 256 rows"):
        plan(demo_source)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token_id", [0]), ("bos_token_id", [2]), ("suppress_tokens", 5), ("max_new_tokens", "64"),
        ("max_new_tokens", 0), ("top_k", 2.5), ("do_sample", "yes"), ("cache_implementation", "nonsense"),
        ("temperature", "0.7"),
    ],
)  # fmt: skip
def test_a_value_that_transformers_does_not_load_is_refused(key: str, value: Any, demo_source: Path) -> None:
    (demo_source / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key}"):
        plan(demo_source)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(number: str, demo_source: Path) -> None:
    (demo_source / "generation_config.json").write_text(f'{{"temperature": {number}}}')
    with pytest.raises(CheckpointError, match="is not a finite number"):
        plan(demo_source)


@pytest.mark.parametrize(
    ("key", "value", "noted"),
    [("guidance_scale", 1.5, True), ("guidance_scale", 1, False), ("prefill_chunk_size", 4, True)],
)
def test_a_setting_that_fails_with_an_encoder_is_noted(key: str, value: Any, noted: bool, demo_source: Path) -> None:
    (demo_source / "generation_config.json").write_text(json.dumps({key: value}))
    made = plan(demo_source)
    assert made.generation_config is not None
    assert made.generation_config[key] == value
    assert any(note.startswith(f"generation_config.json: {key}") for note in made.notes) == noted
