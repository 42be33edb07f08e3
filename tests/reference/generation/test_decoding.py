import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from t5g2convert import CheckpointError, UsageError
from t5g2convert.reference.generation.decoding import NOT_APPLIED, Decoding, read_decoding
from t5g2convert.reference.options import GenerateOptions

GEMMA = {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 106]}
"""What Gemma 3's own generation_config.json says."""


def read(folder: Path, document: dict[str, Any] | None, eos: int | list[int] | None = 7, **options: Any) -> Decoding:
    if document is not None:
        (folder / "generation_config.json").write_text(json.dumps(document))
    return read_decoding(folder, GenerateOptions(**options), eos=eos)


def test_without_settings_it_is_greedy_and_ends_with_the_decoders_eos(tmp_path: Path) -> None:
    assert read(tmp_path, None) == Decoding(ends=frozenset({7}))
    assert read(tmp_path, None, eos=[7, 8]).ends == {7, 8}
    assert read(tmp_path, None, eos=None).ends == set()


def test_the_folders_settings_are_the_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, {**GEMMA, "temperature": 0.5, "max_new_tokens": 9})
    assert found == Decoding(0.5, 64, 0.95, 0, 9, frozenset({1, 106}))


def test_options_replace_the_folders_settings(tmp_path: Path) -> None:
    found = read(tmp_path, GEMMA, temperature=2.0, top_k=0, top_p=1.0, seed=4, max_new_tokens=3, stop=("x",))
    assert found == Decoding(2.0, 0, 1.0, 4, 3, frozenset({1, 106}), ("x",))
    assert read(tmp_path, GEMMA, temperature=0.0).greedy


def test_a_sampling_option_samples(tmp_path: Path) -> None:
    assert read(tmp_path, None, temperature=0.5).temperature == 0.5
    assert read(tmp_path, None, top_k=3) == Decoding(1.0, 3, 1.0, ends=frozenset({7}))
    assert read(tmp_path, None, top_p=0.5).top_p == 0.5
    # The settings of the folder are used, even if it does not sample by itself.
    assert read(tmp_path, {"temperature": 0.25, "top_k": 8}, top_p=0.5) == Decoding(0.25, 8, 0.5, ends=frozenset({7}))


def test_what_is_not_set_is_as_in_transformers(tmp_path: Path) -> None:
    found = read(tmp_path, None, temperature=1.0)
    theirs = GenerationConfig._get_default_generation_params()
    assert (found.top_k, found.top_p, found.temperature) == tuple(
        theirs[key] for key in ("top_k", "top_p", "temperature")
    )


@pytest.mark.parametrize("option", ["top_k", "top_p", "seed"])
def test_a_sampling_option_without_sampling_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} applies only to sampling"):
        read(tmp_path, GEMMA, temperature=0.0, **{option: 1})
    with pytest.raises(UsageError, match="--seed applies only to sampling"):
        read(tmp_path, {}, seed=3)


def test_an_empty_stop_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--stop must not be empty"):
        read(tmp_path, None, stop=("a", ""))


@pytest.mark.parametrize(
    "document",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 2},
        {"eos_token_id": "x"},
        {"max_new_tokens": 0},
        {"do_sample": True, "temperature": 0},
    ],
    ids=str,
)
def test_invalid_settings_are_the_folders_fault(document: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read(tmp_path, document)


def test_settings_that_are_not_applied_are_named(tmp_path: Path) -> None:
    found = read(tmp_path, {"num_beams": 4, "repetition_penalty": 1.1, "min_p": None, "typical_p": 1.0})
    assert found.ignored == ("num_beams", "repetition_penalty")


def test_the_settings_that_are_not_applied_exist_and_have_no_effect_by_default(tmp_path: Path) -> None:
    config = GenerationConfig()
    defaults = GenerationConfig._get_default_generation_params()
    for name, neutral in NOT_APPLIED.items():
        assert hasattr(config, name) or name in defaults or name in {"penalty_alpha", "dola_layers"}, name
        assert defaults.get(name) is None or defaults[name] in neutral, name
