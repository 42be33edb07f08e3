"""Every setting of the transformers classes is known, and is converted as the list of settings says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import plan
from t5g2convert.checkpoint.families.gemma3 import read_gemma3
from t5g2convert.checkpoint.families.known_settings import CONFIG_SECTIONS, GEMMA2, GEMMA3, GEMMA3_TEXT, ROPE, SIGLIP
from t5g2convert.checkpoint.families.setting_rules import (
    Outcome,
    Section,
    Setting,
    account,
    decides,
    left_note,
    present,
)
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.cli.demo import DEMO_CONFIG
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.errors import CheckpointError

WHERE: Final = Path("somewhere/config.json")
OLDER: Final = os.environ.get("T5G2_OLDER_PYTHON", "")
PYTHONS: Final = [
    pytest.param(sys.executable, id="installed"),
    pytest.param(
        OLDER,
        id="oldest",
        marks=pytest.mark.skipif(
            not OLDER, reason="T5G2_OLDER_PYTHON names no Python with transformers 5.0.0 (make test-oldest)"
        ),
    ),
]

FIELDS: Final = """
import dataclasses, inspect, json, transformers
from transformers import GenerationConfig

def fields(name):
    made = getattr(transformers, name)
    given = {key: it.default for key, it in inspect.signature(made.__init__).parameters.items()
             if key not in ("self", "args", "kwargs")}
    if dataclasses.is_dataclass(made):
        given |= {it.name: it.default for it in dataclasses.fields(made)}
    return given | made().to_dict()

names = ["Gemma3Config", "Gemma3TextConfig", "SiglipVisionConfig", "Gemma2Config"]
found = {name: fields(name) for name in names} | {"GenerationConfig": vars(GenerationConfig())}
print(json.dumps(found, default=lambda value: None))
"""
"""Prints all fields of the config classes with their defaults."""

_FOUND: dict[str, dict[str, dict[str, Any]]] = {}


def fields_of(python: str, name: str) -> dict[str, Any]:
    """Return the fields of a class, by introspection in another process."""
    if python not in _FOUND:
        done = subprocess.run([python, "-c", FIELDS], capture_output=True, text=True, check=True)
        _FOUND[python] = json.loads(done.stdout.splitlines()[-1])
    return _FOUND[python][name]


NAMED: Final[Mapping[str, Any]] = {
    "model_type": "llama",
    "dtype": "float16",
    "torch_dtype": "float16",
    "architectures": ["OtherModel"],
    "transformers_version": "4.50.0",
    "id2label": {"0": "good", "1": "bad", "2": "neither"},
    "label2id": {"good": 0, "bad": 1, "neither": 2},
    "problem_type": "regression",
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6}},
    "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    "final_logit_softcapping": 20.0,
    "attn_logit_softcapping": 20.0,
    "eos_token_id": [1, 4],
    "per_layer_config": {"0": {"sliding_window": 3}},
    "text_config": {"hidden_size": 9},
    "vision_config": {"hidden_size": 9},
}
"""Another legal value, where one does not follow from the default."""


GENERATION_VALUES: Final[Mapping[str, Any]] = {
    "do_sample": True,
    "use_cache": False,
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "cache_implementation": "static",
}
"""The same for generation_config.json, where the type does not follow from the default either."""


def another(name: str, value: Any) -> Any:
    """Return another legal value."""
    if name in NAMED:
        return NAMED[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {None: 3}.get(value, f"{value}x") if not isinstance(value, list | dict) else [*value, 1]


def planned(folder: Path) -> Plan | CheckpointError:
    try:
        return plan(folder)
    except CheckpointError as error:
        return error


def becomes(folder: Path, edit: Callable[[dict[str, Any]], object], name: str, setting: Setting) -> None:
    """Change a config.json and check that the setting is converted as the list says."""
    path = folder / "config.json"
    before, text = plan(folder), path.read_text()
    document = json.loads(text)
    edit(document)
    path.write_text(json.dumps(document))
    after = planned(folder)
    path.write_text(text)
    refused = isinstance(after, CheckpointError)
    if refused:
        assert setting.outcome in (Outcome.REFUSED, Outcome.USED, Outcome.CARRIED), f"{name}: {after}"
        return
    assert isinstance(after, Plan)
    noted = [note for note in after.notes if note not in before.notes and name in note]
    carried = after.config != before.config or after.generation_config != before.generation_config
    match setting.outcome:
        case Outcome.REFUSED:
            pytest.fail(f"{name} was not refused")
        case Outcome.NOTED:
            assert (bool(noted), carried) == (True, False), name
        case Outcome.CARRIED:
            assert carried or noted, name
        case Outcome.USED:
            assert carried or noted, name
        case Outcome.ABOUT:
            assert (noted, carried) == ([], False), name


PLACES: Final = {
    "Gemma3Config": (GEMMA3, None),
    "Gemma3TextConfig": (GEMMA3_TEXT, "text_config"),
    "SiglipVisionConfig": (SIGLIP, "vision_config"),
}


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", PLACES)
def test_every_transformers_field_is_converted_as_listed(name: str, python: str, demo_source: Path) -> None:
    section, key = PLACES[name]
    known = fields_of(python, name)
    assert len(known) > 15
    config = read_json_object(demo_source / "config.json")
    given = config if key is None else config[key]
    for field, default in known.items():
        setting = section.get(field)
        assert setting is not None, f"{field} of {name} is not in the list"
        value = another(field, given.get(field, default))

        def edit(document: dict[str, Any], field: str = field, value: Any = value) -> None:
            (document if key is None else document[key])[field] = value

        becomes(demo_source, edit, field, setting)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_field_of_gemma_2_is_known(python: str) -> None:
    unknown = [field for field in fields_of(python, "Gemma2Config") if GEMMA2.get(field) is None]
    assert unknown == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_field_of_generation_config_is_carried(python: str, demo_source: Path) -> None:
    known = fields_of(python, "GenerationConfig")
    assert len(known) > 50
    for field, default in known.items():
        value = GENERATION_VALUES.get(field, another(field, default))
        (demo_source / "generation_config.json").write_text(json.dumps({field: value}))
        made = plan(demo_source).generation_config
        assert made is not None
        assert made[field] == value


@pytest.mark.parametrize("key", [None, "text_config", "vision_config"])
def test_null_is_absent(key: str | None) -> None:
    sections = {None: GEMMA3, "text_config": GEMMA3_TEXT, "vision_config": SIGLIP}
    for setting in sections[key].settings:
        found: list[object] = []
        for null in (False, True):
            document = deepcopy(DEMO_CONFIG)
            fields = document if key is None else document[key]
            fields.pop(setting.name, None)
            if null:
                fields[setting.name] = None
            try:
                found.append(read_gemma3(document, WHERE))
            except CheckpointError as error:
                found.append(str(error))
        assert found[0] == found[1], setting.name


def test_every_setting_is_listed_once_with_its_reason() -> None:
    for section in CONFIG_SECTIONS:
        names = [setting.name for setting in section.settings]
        assert len(names) == len(set(names)), section.title
        assert all(setting.because for setting in section.settings)


# Unknown settings


def accounted(fields: dict[str, Any], section: Section = GEMMA3_TEXT) -> list[str]:
    return list(left_note(account(section, present(fields), WHERE, "text_config.")))


@pytest.mark.parametrize(
    "name",
    ["foo_attention", "attention_sinks", "mlp_multiplier", "num_experts", "ropeScaling", "embed_scale", "n_kv_heads",
     "altup_num_inputs", "query_rescale", "layer_skip", "residual_scale", "norm_after"],
)  # fmt: skip
def test_an_unknown_setting_that_computes_is_refused_with_its_place(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{WHERE}: text_config.{name} is 3, which is not a setting of Gemma 3"):
        account(GEMMA3_TEXT, {name: 3}, WHERE, "text_config.")
    assert accounted({name: None}) == []
    assert accounted({name: False}) == [f"config.json: settings left behind: text_config.{name} (unknown)"]


@pytest.mark.parametrize(
    "name", ["comment", "author", "train_batch_size", "base_model", "merged_from", "mlx_version", "learning_rate"]
)
def test_other_unknown_settings_are_noted_once(name: str) -> None:
    assert not decides(name)
    assert accounted({name: 3, "zebra": "x", "return_dict": False}) == [
        f"config.json: settings left behind: text_config.return_dict; text_config.{name}, text_config.zebra (unknown)"
    ]


def test_all_refused_settings_are_listed_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        account(GEMMA3_TEXT, {"pruned_heads": {"0": [1]}, "num_experts": 4, "hidden_size": 3}, WHERE, "text_config.")
    assert "and 1 more" in caught.value.message
    assert len(caught.value.details) == 2


def test_writer_metadata_is_not_noted(demo_source: Path) -> None:
    before = plan(demo_source).notes
    document = read_json_object(demo_source / "config.json")
    about = {"_name_or_path": "x", "transformers_version": "4.51.3", "unsloth_version": "2025.3", "unsloth_fixed": True}
    for fields in (document, document["text_config"], document["vision_config"]):
        fields |= about
    (demo_source / "config.json").write_text(json.dumps(document))
    assert plan(demo_source).notes == before


def test_thousands_of_unknown_settings_make_one_short_note() -> None:
    (note,) = accounted({f"x{number}": number for number in range(5000)})
    assert len(note) < 2000
    assert "and 4950 more" in note


def test_a_rope_section_is_closed() -> None:
    with pytest.raises(CheckpointError, match="is not a setting of a default or linear rotary embedding"):
        account(ROPE, {"comment": 1}, WHERE, "rope_scaling.")


@pytest.mark.parametrize(("value", "neutral"), [(1, True), (1.0, True), (True, False), ("1", False), (2, False)])
def test_numbers_are_compared_as_numbers(value: Any, neutral: bool) -> None:
    assert Setting("x", Outcome.REFUSED, "why", (1.0,)).is_neutral(value) is neutral
