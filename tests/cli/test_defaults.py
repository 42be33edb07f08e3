"""Options of commands that do not import the library use the library's constants."""

import inspect
from typing import Any

import pytest

from t5g2convert.adaptation.options import LAST
from t5g2convert.adaptation.pack_options import SHARD_TOKENS
from t5g2convert.adaptation.sentinel_probe import FACTOR
from t5g2convert.cli.adapt import adapt
from t5g2convert.cli.average import average
from t5g2convert.cli.pack import pack
from t5g2convert.cli.probe_sentinels import probe_sentinels


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
    assert inspect.signature(command).parameters[option].default == constant
