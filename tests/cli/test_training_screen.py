"""What adapt and finetune show while they train: lines above the bar on a terminal, only lines elsewhere."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from t5g2convert.cli.training import Watched, run_and_print

LINES = [f"step {step}  loss {9 - step}.123" for step in range(1, 4)]


class Terminal(io.TextIOWrapper):
    """A terminal with the stream of bytes that libraries may write to."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]


def run(monkeypatch: pytest.MonkeyPatch, stdout: io.TextIOBase, stderr: io.TextIOBase) -> None:
    def start(watched: Watched) -> Any:
        watched.begun([], len(LINES))
        for step, line in enumerate(LINES, start=1):
            watched.report(SimpleNamespace(step=step, line=line))  # type: ignore[arg-type]
        watched.evaluated(SimpleNamespace(line="held out 4.5"))  # type: ignore[arg-type]
        return SimpleNamespace(first=False)

    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    run_and_print("adapt", start, every=1, as_json=False)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_on_a_terminal_each_line_is_printed_above_the_bar(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    stdout, stderr = Terminal(), Terminal()
    run(monkeypatch, stdout, stderr)
    assert stdout.shown() == "", "the bar redraws the line where the cursor is, so nothing may be printed around it"
    shown = stderr.shown()
    for line in [*LINES, "held out 4.5"]:
        assert f"{line}\n" in shown
        before = shown.partition(line)[0]
        assert not before or before.endswith(("\n", "\x1b[2K")), "a line starts where the bar was erased"


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_where_stdout_is_a_pipe_the_lines_go_there(variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable)
    stdout = io.StringIO()
    run(monkeypatch, stdout, Terminal())
    assert stdout.getvalue().splitlines() == [*LINES, "held out 4.5"]


def test_piped_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    run(monkeypatch, stdout, stderr)
    assert stdout.getvalue().splitlines() == [*LINES, "held out 4.5"]
    assert stderr.getvalue() == ""
