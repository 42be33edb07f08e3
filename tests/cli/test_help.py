"""The help of all commands: -h, sections, whole summaries, placeholders in words, examples, the terminal's width."""

import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

from t5g2convert.cli.command import load
from t5g2convert.cli.examples import EXAMPLES
from t5g2convert.cli.main import COMMANDS, SECTIONS, app
from tests.cli.commandline import CommandLine

INNER = [(name, verb) for name in COMMANDS for verb in getattr(load(name), "commands", {})]
VERBS = [(name,) for name in COMMANDS] + INNER


@pytest.mark.parametrize("verb", [(), *VERBS], ids=" ".join)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_a_help_fits_the_terminal_and_names_values_in_words(
    verb: tuple[str, ...], columns: str, t5g2: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERMINAL_WIDTH", columns)
    short, long = t5g2(*verb, "-h"), t5g2(*verb, "--help")
    assert (short.code, short.err) == (long.code, long.err) == (0, "")
    assert short.out == long.out
    assert "  -h, --help" in short.out
    shown, _, examples = short.out.partition("\nExamples:\n")
    assert not re.search(r"<(str|path|int|float|\w+\|)|\{\w+\}", shown)
    if verb not in [("adapt",), ("finetune",)]:  # their epilogs are command lines, which are copied
        assert max(map(len, shown.splitlines())) <= int(columns)
    if "COMMAND" not in shown.splitlines()[0]:
        assert [line.strip() for line in examples.splitlines()][: len(EXAMPLES[" ".join(verb)])] == list(
            EXAMPLES[" ".join(verb)]
        )


def test_the_sections_have_each_command_once_with_its_whole_summary(t5g2: CommandLine) -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(COMMANDS)
    words = " ".join(t5g2("--help").out.split())
    for title in SECTIONS:
        assert f" {title}: " in words
    for name, summary in COMMANDS.items():
        assert f" {name} {summary}" in words


def test_a_command_without_a_section_is_listed_too() -> None:
    root: Any = get_command(app)
    root.commands["new"] = root.commands["doctor"]
    shown = " ".join(root.get_help(root.make_context("t5g2", ["doctor"])).split())
    assert "Other commands: new Check the installation" in shown


def test_every_command_has_examples_that_it_takes() -> None:
    assert set(EXAMPLES) == {" ".join(verb) for verb in VERBS} - {name for name, _ in INNER}
    root = get_command(app)
    for name, lines in EXAMPLES.items():
        for line in lines:
            tool, first, *rest = shlex.split(line.partition(" > ")[0])
            assert (tool, f"{first} {rest[0]}" if first == "mappings" else first) == ("t5g2", name)
            load(first).make_context(first, rest, parent=root.make_context("t5g2", [first]))


def test_the_options_of_convert_are_in_groups(t5g2: CommandLine) -> None:
    shown = t5g2("convert", "--help").out
    titles = re.findall(r"^(\w.*):$", shown, re.MULTILINE)
    assert titles == ["Arguments", "Map and settings", "Models and layers", "Files", "Options", "Examples"]
    assert "\nUsage: " in f"\n{shown}"
    assert "SOURCE OUTPUT\n" in shown
    for option in ("--mapping MAP", "--decoder-from MODEL", "--projector copy|zeros|aligned", "--sliding-window N"):
        assert f"  {option} " in shown
