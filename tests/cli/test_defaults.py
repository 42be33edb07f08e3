"""A command's options and what they are handed to have the same defaults, although the command line imports neither."""

import inspect
from dataclasses import fields
from typing import Any

import pytest

from t5g2convert.adaptation.adapt import Request
from t5g2convert.adaptation.average import LAST
from t5g2convert.adaptation.data.pack import SHARD_TOKENS
from t5g2convert.adaptation.sentinel_probe import FACTOR
from t5g2convert.adaptation.train.distributed import Hardware
from t5g2convert.adaptation.train.loop import LoopConfig
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.cli.adapt import adapt
from t5g2convert.cli.average import average
from t5g2convert.cli.pack import pack
from t5g2convert.cli.probe import probe_sentinels


def default(command: Any, option: str) -> object:
    return inspect.signature(command).parameters[option].default


@pytest.mark.parametrize(
    ("command", "option", "constant"),
    [
        (average, "last", LAST),
        (adapt, "keep", LAST),
        (pack, "shard_tokens", SHARD_TOKENS),
        (probe_sentinels, "factor", FACTOR),
    ],
)
def test_an_option_has_the_constant_that_the_library_names(command: Any, option: str, constant: object) -> None:
    assert default(command, option) == constant


@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if not field.is_required()])
def test_a_setting_has_the_same_default(name: str) -> None:
    expected = Settings.model_fields[name].default
    if name == "betas":
        assert (default(adapt, "beta1"), default(adapt, "beta2")) == expected
    elif name == "teacher":
        assert (default(adapt, "kd"), expected) == (None, None)
    elif name == "trainable":
        assert (default(adapt, name), expected) == (None, ())
    else:
        assert default(adapt, name) == expected


OPTIONS = {"micro": "micro_batch", "chunk": "loss_chunk"}
"""Fields whose options have longer names."""


@pytest.mark.parametrize(
    ("of", "name"),
    [
        *((LoopConfig, field.name) for field in fields(LoopConfig)),
        *((Hardware, name) for name in ("accelerator", "devices", "nodes")),
        *((Request, name) for name in ("rope_scaling", "resume", "chunk")),
    ],
)
def test_how_a_run_is_done_has_the_same_default(of: Any, name: str) -> None:
    (expected,) = (field.default for field in fields(of) if field.name == name)
    assert default(adapt, OPTIONS.get(name, name)) == expected
