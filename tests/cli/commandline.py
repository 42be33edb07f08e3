"""Run the command line in the test process."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.cli.main import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> dict[str, Any]:
        """Return the only document on stdout."""
        return dict(json.loads(self.out)["error"])


class CommandLine:
    """Run `t5g2` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> Result:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *self.capsys.readouterr())


def document(result: Result) -> dict[str, Any]:
    """Return the only document on stdout; refuse NaN and Infinity."""

    def refuse(number: str) -> None:
        raise AssertionError(f"{number} is not JSON")

    return dict(json.loads(result.out, parse_constant=refuse))


def assert_one_line_error(result: Result, code: int, *, printed: bool = False) -> None:
    """Require an exit code, one line on stderr that is not about a bug, and a result on stdout only if `printed`."""
    assert result.code == code, result.err
    assert bool(result.out) == printed
    assert result.err.startswith("t5g2: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1
    assert "a bug in t5g2" not in result.err


def unsafe(text: str) -> set[str]:
    """Return the characters that should never reach a terminal; line ends are allowed."""
    return {character for character in text if character != "\n" and not character.isprintable()}
