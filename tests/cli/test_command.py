"""What all commands share: their list, empty arguments, and folders that they never replace."""

from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from t5g2convert import cli
from t5g2convert.cli.command import Command, load
from t5g2convert.cli.main import COMMANDS, app
from tests.cli.commandline import CommandLine


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_has_the_help_of_each(name: str) -> None:
    root: Any = get_command(app)
    listed, command = root.commands[name], load(name)
    assert command.name == name
    assert COMMANDS[name] == command.get_short_help_str(10_000)
    for width in range(10, 200):
        assert listed.get_short_help_str(width) == command.get_short_help_str(width)
    assert (listed.hidden, listed.deprecated) == (command.hidden, command.deprecated)
    assert all(isinstance(each, Command) for each in getattr(command, "commands", {name: command}).values())


def test_every_module_of_a_command_is_listed() -> None:
    modules = {path.stem for path in Path(next(iter(cli.__path__))).glob("*.py")}
    others = {"__init__", "command", "console", "examples", "main", "options", "streams", "training"}
    assert {name.replace("-", "_") for name in COMMANDS} == modules - others


EMPTY = [
    ("convert", "", "out"),
    ("convert", "src", "", "--overwrite"),
    ("convert", "src", " ", "--overwrite"),
    ("convert", "src", "out", "--mapping", ""),
    ("convert", "src", "out", "--vision-from="),
    ("convert", "src", "out", "--decoder-from", ""),
    ("extract", "src", "", "--part", "decoder", "--overwrite"),
    ("average", "run", "", "--overwrite"),
    ("average", ""),
    ("average", "run", "--model", ""),
    ("pack", "model", "", "in", "--overwrite"),
    ("pack", "model", "out", ""),
    ("pack", "model", "out", "--dataset", ""),
    ("adapt", "model", "data", "", "--lr", "1e-4", "--steps", "2"),
    ("adapt", "model", "data", "run", "--lr", "1e-4", "--steps", "2", "--kd", ""),
    ("card", "", "--write"),
    ("demo", "--out", ""),
    ("demo", "--out="),
    ("verify", "out", "--source", ""),
    ("verify", "out", "--junit", ""),
    ("inspect", ""),
    ("plan", ""),
    ("upload", "", "me/model"),
    ("mappings", "check", ""),
]


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
def test_O9_an_empty_argument_is_a_usage_error(
    arguments: tuple[str, ...], t5g2: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").write_text("two years of work")
    result = t5g2(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "is empty (is a variable not set?)" in result.err
    assert result.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("target", [".", "..", "/", "~"])
def test_O9_folders_that_are_never_replaced(
    target: str, t5g2: CommandLine, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project/below").mkdir(parents=True)
    (tmp_path / "project/thesis.tex").write_text("two years of work")
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    monkeypatch.chdir(tmp_path / "project/below" if target == ".." else tmp_path / "project")
    target = str(tmp_path / "project") if target == "~" else target
    result = t5g2("convert", demo_source, target, "--overwrite")
    assert result.code == 5
    assert (tmp_path / "project/thesis.tex").read_text() == "two years of work"


def test_the_demo_writes_over_nothing(t5g2: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "gemma3-tiny").mkdir()
    (tmp_path / "gemma3-tiny/config.json").write_text("mine")
    result = t5g2("demo", "--out", tmp_path)
    assert (result.code, result.err.count("\n")) == (5, 1)
    assert "exists and is not an empty folder" in result.err
    assert (tmp_path / "gemma3-tiny/config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["gemma3-tiny"]


def test_a_card_that_was_written_by_hand_is_kept(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    t5g2("convert", demo_source, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("# My model\n\nWhat I measured.\n")
    (tmp_path / "out/README.md").chmod(0o600)
    assert t5g2("card", tmp_path / "out", "--write").code == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "What I measured." in text
    assert (tmp_path / "out/README.md").stat().st_mode & 0o777 == 0o600
    refused = t5g2("convert", demo_source, tmp_path / "out", "--overwrite")
    assert refused.code == 5
    assert "README.md" in refused.err
    assert (tmp_path / "out/README.md").read_text() == text


def test_the_record_of_a_verification_keeps_the_manifests_mode(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    t5g2("convert", demo_source, tmp_path / "out")
    manifest = tmp_path / "out/t5g2.json"
    manifest.chmod(0o640)
    before = manifest.read_bytes()
    assert t5g2("verify", tmp_path / "out", "--source", demo_source).code == 0
    assert manifest.read_bytes() != before
    assert manifest.stat().st_mode & 0o777 == 0o640
    assert t5g2("convert", demo_source, tmp_path / "out", "--overwrite").code == 0, "and it is still ours"


def test_a_report_does_not_overwrite_an_input(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    t5g2("convert", demo_source, tmp_path / "out")
    (tmp_path / "link.xml").symlink_to(demo_source / "config.json")
    (tmp_path / "text.txt").write_text("a text")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for report in ("out/t5g2.json", "demo-source/model.safetensors", "link.xml", "text.txt"):
        for option in ("--junit", "--html"):
            arguments = ("--source", demo_source, "--text", tmp_path / "text.txt", option, tmp_path / report)
            result = t5g2("verify", tmp_path / "out", *arguments)
            assert (result.code, result.err.count("\n")) == (5, 1)
            assert "would be overwritten" in result.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
