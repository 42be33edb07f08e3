"""stdout on a full disk: the work is done or refused as ever, and one line says what happened to the words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


def run(*arguments: str | Path, unbuffered: bool, both: bool = False) -> subprocess.CompletedProcess[str]:
    with FULL.open("wb") as full:
        return subprocess.run(
            [sys.executable, *["-u"] * unbuffered, "-m", "t5g2convert", *map(str, arguments)],
            stdout=full,
            stderr=full if both else subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        )


@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
@pytest.mark.parametrize("command", ["inspect", "plan", "mappings"])
def test_O2_a_full_disk_behind_stdout_is_exit_5_in_one_line(
    demo_source: Path, command: str, options: list[str], unbuffered: bool
) -> None:
    arguments = ["mappings", "list"] if command == "mappings" else [command, demo_source]
    ended = run(*arguments, *options, unbuffered=unbuffered)
    assert ended.returncode == 5
    assert ended.stderr == "t5g2: the system says: No space left on device\n"


@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_O2_a_conversion_whose_words_are_lost_is_whole(demo_source: Path, tmp_path: Path, unbuffered: bool) -> None:
    ended = run("convert", demo_source, tmp_path / "out", unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (5, "t5g2: the system says: No space left on device\n")
    judged = subprocess.run(
        [sys.executable, "-m", "t5g2convert", "verify", tmp_path / "out", "--source", demo_source], capture_output=True
    )
    assert judged.returncode == 0


@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_an_error_keeps_its_code_when_its_document_is_lost(tmp_path: Path, unbuffered: bool) -> None:
    ended = run("plan", tmp_path / "absent", "--json", unbuffered=unbuffered)
    assert ended.returncode == 3
    assert ended.stderr.count("\n") == 1
    assert "no such folder" in ended.stderr


@pytest.mark.parametrize("options", [[], ["--debug"], ["--json"]], ids=["plain", "debug", "json"])
def test_an_error_keeps_its_code_when_nothing_can_be_said(tmp_path: Path, options: list[str]) -> None:
    assert run("plan", tmp_path / "absent", *options, unbuffered=False, both=True).returncode == 3
