"""The commands that need no torch, where its import fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "inspect SOURCE",
    "plan SOURCE",
    "convert SOURCE out",
    "extract out encoder --part encoder",
    "extract out decoder --part decoder --no-verify",
    "card out",
    "card encoder --write",
    "mappings list",
    "mappings check gemma3 --against SOURCE",
    "upload --help",
    "verify --help",
)


@pytest.mark.parametrize("error", ["OSError('libtorch.so')", "ImportError('no torch')", "RuntimeError('no driver')"])
def test_commands_that_need_no_torch_run_where_it_is_broken(error: str, demo_source: Path, tmp_path: Path) -> None:
    (tmp_path / "stub/torch").mkdir(parents=True)
    (tmp_path / "stub/torch/__init__.py").write_text(f"raise {error}\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}{os.pathsep}{ROOT}"}

    def run(line: str) -> str:
        arguments = line.replace("SOURCE", str(demo_source)).split()
        command = [sys.executable, "-m", "t5g2convert", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stderr

    printed = {line: run(line) for line in COMMANDS}
    assert "not verified: torch cannot be imported" in printed["convert SOURCE out"]
    assert "not verified" not in printed["extract out decoder --part decoder --no-verify"]
