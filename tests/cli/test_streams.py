"""stdout and stderr that are closed, full or without a reader: results and errors stay the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5g2convert import convert
from tests.faults.scene import contents

FULL = Path("/dev/full")

pytestmark = pytest.mark.sampled
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")

CLOSED = [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"]


def run(*arguments: str | Path, unbuffered: bool, both: bool = False) -> subprocess.CompletedProcess[str]:
    with FULL.open("wb") as full:
        return subprocess.run(
            [sys.executable, *["-u"] * unbuffered, "-m", "t5g2convert", *map(str, arguments)],
            stdout=full,
            stderr=full if both else subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        )


@needs_full
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
@pytest.mark.parametrize("command", ["inspect", "plan", "mappings"])
def test_O2_a_full_disk_behind_stdout_is_exit_5_in_one_line(
    demo_source: Path, command: str, options: list[str], unbuffered: bool
) -> None:
    arguments = ["mappings", "list"] if command == "mappings" else [command, demo_source]
    ended = run(*arguments, *options, unbuffered=unbuffered)
    assert ended.returncode == 5
    assert ended.stderr == "t5g2: the operating system reports: No space left on device\n"


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_O2_a_conversion_with_lost_output_is_complete(demo_source: Path, tmp_path: Path, unbuffered: bool) -> None:
    ended = run("convert", "--no-verify", demo_source, tmp_path / "out", unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (0, "t5g2: cannot print the result: No space left on device\n")
    judged = subprocess.run(
        [sys.executable, "-m", "t5g2convert", "verify", tmp_path / "out", "--source", demo_source], capture_output=True
    )
    assert judged.returncode == 0


@needs_full
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_an_error_keeps_its_code_when_its_document_is_lost(tmp_path: Path, unbuffered: bool) -> None:
    ended = run("plan", tmp_path / "absent", "--json", unbuffered=unbuffered)
    assert ended.returncode == 3
    assert ended.stderr.count("\n") == 1
    assert "no such folder" in ended.stderr


@needs_full
@pytest.mark.parametrize("options", [[], ["--debug"], ["--json"]], ids=["plain", "debug", "json"])
def test_an_error_keeps_its_code_when_nothing_can_be_printed(tmp_path: Path, options: list[str]) -> None:
    assert run("plan", tmp_path / "absent", *options, unbuffered=False, both=True).returncode == 3


def shell(line: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash where `t5g2` is this tool and "$@" its arguments."""
    script = f't5g2() {{ "{sys.executable}" -m t5g2convert "$@"; }}; {line}'
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("closed", CLOSED)
def test_O13_a_conversion_with_closed_streams_is_the_same(demo_source: Path, tmp_path: Path, closed: str) -> None:
    """If a descriptor 0 to 2 were free, an output file would get it, and prints would go there."""
    convert(demo_source, tmp_path / "expected")
    ended = shell(f't5g2 convert --no-verify --no-card "$@" {closed}', demo_source, tmp_path / "out")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("command", ["--version", "inspect", "plan", "mappings list"])
def test_O13_a_quick_command_with_closed_streams_ends_quietly(demo_source: Path, command: str, closed: str) -> None:
    arguments = [demo_source] if command in ("inspect", "plan") else []
    ended = shell(f't5g2 {command} "$@" {closed}', *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("closed", CLOSED)
def test_O13_an_error_with_closed_streams_keeps_its_code(tmp_path: Path, closed: str) -> None:
    assert shell(f't5g2 inspect "$@" {closed}', tmp_path / "absent").returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "said"), [(">&-", 0), ("2>&-", 0), ("> >(true)", 0), ("> /dev/full", 1)])
@pytest.mark.parametrize("code", [0, 6])
def test_O13_the_exit_code_of_verify_is_its_verdict(
    demo_source: Path, tmp_path: Path, code: int, stream: str, said: int
) -> None:
    convert(demo_source, tmp_path / "out")
    if code:
        with (tmp_path / "out/config.json").open("a") as file:
            file.write("\n")
    ended = shell(f't5g2 verify "$@" {stream}', tmp_path / "out", "--source", demo_source)
    assert (ended.returncode, ended.stderr.count("cannot print the result")) == (code, said), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_O13_a_conversion_goes_on_when_its_reader_has_left(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "expected")
    line = 't5g2 convert "$@" --verify --no-card 2>&1 | true; exit "${PIPESTATUS[0]}"'
    ended = shell(line, demo_source, tmp_path / "out")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert (contents(tmp_path / "out") or {}).keys() == (contents(tmp_path / "expected") or {}).keys()


@needs_full
def test_O13_notes_that_are_lost_cost_no_result(demo_source: Path) -> None:
    ended = shell('t5g2 plan "$@" --json 2> /dev/full', demo_source)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["tensors"]
