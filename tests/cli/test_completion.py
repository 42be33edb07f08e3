"""Shell completion: the scripts, the answers, and their import cost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from t5g2convert.cli.main import COMMANDS
from tests.processes.forked import run_t5g2
from tests.project.test_package import HEAVY, loaded_after, modules_after

COMMAND: Final = [sys.executable, "-m", "t5g2convert"]


def answer(**env: str) -> str:
    done = run_t5g2(env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def bash(words: str) -> list[str]:
    """Return bash's completions for the last word."""
    at = str(len(words.split(" ")) - 1)
    return answer(_T5G2_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=at).split()


@pytest.mark.slow
def test_bash_gets_a_function_that_asks_t5g2() -> None:
    script = answer(_T5G2_COMPLETE="source_bash")
    assert "_T5G2_COMPLETE=complete_bash" in script
    assert script.rstrip().endswith("complete -o default -F _t5g2_completion t5g2")


def test_zsh_gets_a_function_that_asks_t5g2() -> None:
    script = answer(_T5G2_COMPLETE="source_zsh")
    assert script.lstrip().startswith("#compdef t5g2\n")
    assert "_T5G2_COMPLETE=complete_zsh t5g2" in script
    assert script.rstrip().endswith("compdef _t5g2_completion t5g2")


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("t5g2 ver", ["verify"]),
        ("t5g2 mappings s", ["show", "schema"]),
        ("t5g2 convert --vis", ["--vision-from"]),
        ("t5g2 verify --dtype b", ["bfloat16"]),
        ("t5g2 verify --dtype nothing", []),
        ("t5g2 convert --dtype f", ["float16", "float32"]),
        ("t5g2 convert --preset t5gemma-2-1", ["t5gemma-2-1b-1b"]),
        ("t5g2 plan --mapping t5gemma2-e", ["t5gemma2-encoder"]),
        ("t5g2 mappings show gemma2", ["gemma2"]),
        ("t5g2 extract --part e", ["encoder"]),
        ("t5g2 nothing", []),
    ],
)
def test_bash_gets_commands_options_and_values(words: str, completions: list[str]) -> None:
    assert bash(words) == completions


def test_zsh_gets_commands_with_descriptions() -> None:
    answered = answer(_T5G2_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="t5g2 ver")
    assert '"verify":"Judge a conversion' in answered
    answered = answer(_T5G2_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="t5g2 convert --rid")
    assert '"--ridge"' in answered


@pytest.mark.slow
def test_the_tab_key_completes_in_bash(tmp_path: Path) -> None:
    # bash calls the function as on tab: with the command, the word and the word before it.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/t5g2").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m t5g2convert "$@"\n')
    (tmp_path / "bin/t5g2").chmod(0o755)
    script = (
        'eval "$(_T5G2_COMPLETE=source_bash t5g2)"\n'
        "COMP_WORDS=(t5g2 mappings che) COMP_CWORD=2\n"
        "_t5g2_completion t5g2 che mappings\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "check\n"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_asks_t5g2_once_it_has_read_the_script(tmp_path: Path) -> None:
    path = tmp_path / "_t5g2"
    path.write_text(answer(_T5G2_COMPLETE="source_zsh"))
    script = f'autoload -Uz compinit; compinit -u -D; source "{path}"; print $_comps[t5g2]'
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "_t5g2_completion\n"


def test_the_shell_is_shown_what_would_be_installed() -> None:
    script = f'"{sys.executable}" -m t5g2convert --show-completion\nexit $?\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F _t5g2_completion t5g2" in done.stdout


@pytest.mark.parametrize(
    "env",
    [
        {"_T5G2_COMPLETE": "source_bash"},
        {"_T5G2_COMPLETE": "complete_bash", "COMP_WORDS": "t5g2 verify --d", "COMP_CWORD": "2"},
        {"_T5G2_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "t5g2 convert --"},
    ],
    ids=lambda env: env["_T5G2_COMPLETE"],
)
def test_completion_loads_no_heavy_library(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert not modules_after([], tmp_path) & HEAVY


def test_completion_of_a_commands_name_loads_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_T5G2_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "t5g2 ")
    names = loaded_after([], tmp_path)
    assert not {name for name in COMMANDS if f"t5g2convert.cli.{name.replace('-', '_')}" in names}
