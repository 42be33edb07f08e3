"""The command line, run in the process of the tests."""

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
        """The only document on stdout."""
        return dict(json.loads(self.out)["error"])


class CommandLine:
    """Runs `t5g2` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> Result:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *self.capsys.readouterr())
