"""The documentation: generated parts are current, commands run, links work, faults have tests."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Final

import pytest
import torch
import typer
from typer.main import get_command

import t5g2convert
from docs.generate import pages
from t5g2convert import convert
from t5g2convert.cli.command import load
from t5g2convert.cli.demo import DEMO_CONFIG, build_demo_source
from t5g2convert.cli.main import COMMANDS, app
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.adaptation.adapters import write_adapter
from tests.adaptation.runs import write_checkpoint, write_run
from tests.adaptation.test_sentinel_probe import trained
from tests.conftest import TwinFolder

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
FAULTS: Final = (DOCS / "faults.md").read_text()
ROWS: Final = re.findall(r"^\| ([A-Z]\d+) \|", FAULTS, re.MULTILINE)
TESTS: Final = [
    name
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
]
PAGES: Final = sorted([*DOCS.rglob("*.md"), ROOT / ".github/CONTRIBUTING.md"])
NOT_RUN: Final = {
    "network": "reads a model of the real Hub",
    "gpu": "needs a GPU",
    "hours": "trains a model",
    "make": "a target of the Makefile, which must exist",
}
"""Why a block of commands may be marked `<!-- not run: WHY -->`."""


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# docs/faults.md lists exactly the rows that have tests.


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_page_has_tests_named_after_it(row: str) -> None:
    assert [name for name in TESTS if name.startswith(f"test_{row}_")]


def test_every_row_with_tests_is_on_the_page_once() -> None:
    rows = {found[1] for name in TESTS if (found := re.match(r"test_([A-Z]\d+)_", name))}
    assert set(ROWS) == rows
    assert len(ROWS) == len(set(ROWS))


def test_the_page_counts_the_attacks_that_are_there() -> None:
    attacks = [path for path in (ROOT / "tests/attacks").glob("*/*") if path.is_file()]
    assert f"kept in [tests/attacks](../tests/attacks) | {len(attacks)} |" in FAULTS


# All pages


def anchors(path: Path) -> set[str]:
    """Return the anchors that a link to a page may have after #."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=named)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        found = (path.parent / file) if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_make_knows_the_targets_that_a_page_names(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)|^\$ make ([a-z-]+)", path.read_text(), re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_every_page_is_listed() -> None:
    assert "(docs/README.md)" in (ROOT / "README.md").read_text().rpartition("\n## ")[2]
    listed = set(re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert listed == {path.name for path in DOCS.glob("*.md") if path.name != "README.md"} | {"commands/README.md"}
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "commands/README.md").read_text()))
    assert listed == {path.name for path in (DOCS / "commands").glob("*.md") if path.name != "README.md"}


# What is made from the code


@pytest.mark.parametrize("path", sorted(pages()), ids=named)
def test_generated_parts_are_up_to_date(path: Path) -> None:
    assert path.is_file(), f"run make docs: {path.name} is missing"
    assert path.read_text() == pages()[path], "run make docs"


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    assert {path.stem for path in (DOCS / "commands").glob("*.md")} == {*COMMANDS, "README"}


def verbs() -> list[list[str]]:
    inner = {name: getattr(load(name), "commands", None) for name in COMMANDS}
    return [[name, *verb] for name in COMMANDS for verb in ([[it] for it in inner[name] or []] or [[]])]


@pytest.mark.sampled
@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_a_page_has_the_options_that_help_prints(verb: list[str]) -> None:
    command = [sys.executable, "-m", "t5g2convert", *verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
    printed = set(re.findall(r"^ +(--[\w-]+)", done.stdout, re.MULTILINE)) - {"--help"}
    section = (DOCS / f"commands/{verb[0]}.md").read_text()
    if verb[1:]:
        section = section.partition(f"## t5g2 {' '.join(verb)}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(--[\w-]+)", section, re.MULTILINE)) == printed


def test_a_new_option_and_one_without_help_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(deep: Annotated[bool, typer.Option("--deep", help="Look deeper.")] = False) -> None:
        """What a checkpoint is."""

    def silent(deep: Annotated[bool, typer.Option("--deep")] = False) -> None:
        """What a checkpoint is."""

    monkeypatch.setattr("t5g2convert.cli.inspect.inspect", changed)
    made = pages()[DOCS / "commands/inspect.md"]
    assert "| `--deep` | Look deeper. |  |" in made
    assert made != (DOCS / "commands/inspect.md").read_text()
    monkeypatch.setattr("t5g2convert.cli.inspect.inspect", silent)
    with pytest.raises(AssertionError, match="t5g2 inspect: deep has no help"):
        pages()


def test_the_exit_codes_of_page_and_errors_match() -> None:
    errors = [getattr(t5g2convert, name) for name in t5g2convert.__all__ if name.endswith("Error")]
    codes = {error.exit_code for error in errors}
    page = (DOCS / "commands/README.md").read_text()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == {0, *codes}
    assert "| 130, 143 |" in page


def test_the_architecture_names_existing_modules() -> None:
    page = (DOCS / "architecture.md").read_text()
    packages = {
        path.parent.relative_to(ROOT / "t5g2convert").as_posix()
        for path in (ROOT / "t5g2convert").glob("*/**/__init__.py")
    }
    assert set(re.findall(r"^\| \*\*([\w/]+)/\*\* \|", page, re.MULTILINE)) == packages
    written = re.sub(r"<!-- modules: .*<!-- end of modules -->", "", page, flags=re.DOTALL)
    modules = set(re.findall(r"\b(?<!tests/)((?:\w+/)+\w+\.py)", written))
    modules = {name.removeprefix("t5g2convert/") for name in modules if not name.startswith("tests/")}
    assert len(modules) > 5
    for name in modules:
        assert (ROOT / "t5g2convert" / name).is_file(), name
    for package in re.findall(r"\|\"(\w+)/", written):
        assert package in packages


def test_the_architecture_has_every_check_of_a_conversion(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    build_demo_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    places = [(tmp_path / "out", tmp_path / "source"), (converted_twin("gemma2-5"), twin_folder("gemma2-5"))]
    checks = {
        check.name for output, source in places for check in t5g2convert.verify(output, source, record=False).checks
    }
    table = (DOCS / "architecture.md").read_text().partition("| check | holds when |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| (\w+) \|", table, re.MULTILINE)) == checks


# Commands


def blocks(path: Path) -> list[tuple[str | None, str]]:
    """Return every block of commands: why it is not run, and its text."""
    found = re.findall(r"(?:<!-- not run: (\w+) -->\n)?```console\n(.*?)```", path.read_text(), re.DOTALL)
    return [(why or None, text) for why, text in found]


WITH_COMMANDS: Final = [path for path in PAGES if any(why is None for why, _ in blocks(path))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints and files that the pages name, and its own home."""
    folder = tmp_path_factory.mktemp("docs")
    build_demo_source(folder / "gemma-3-4b-pt")
    convert(folder / "gemma-3-4b-pt", folder / "t5gemma-2-4b-4b")
    text = {**DEMO_CONFIG["text_config"], "hidden_size": 640, "num_hidden_layers": 18, "sliding_window": 512}
    (folder / "gemma-3-270m").mkdir()
    write_synthetic_source(folder / "gemma-3-270m", find_map("gemma3").map, text, seed=0)
    convert(folder / "gemma-3-270m", folder / "t5gemma-2-270m")
    trained(folder / "t5gemma-2-270m", folder / "t5gemma-2-270m-trained", range(200, 256))
    shutil.rmtree(folder / "t5gemma-2-270m")
    write_run(folder / "run-4b", folder / "t5gemma-2-4b-4b", 5)
    for step in range(1, 6):
        values = {"model.decoder.norm.weight": torch.full((48,), float(step))}
        write_checkpoint(folder / f"run-4b/checkpoints/step-{step:08d}", values, step)
    write_adapter(folder / "t5gemma-2-4b-4b", folder / "adapter", target_modules=["q_proj"])
    (folder / "novel.txt").write_text("an encoder-decoder reads, and writes what it has read; " * 4)
    for name in ("examples", "mappings"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "home").mkdir()
    return folder


def bash(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in a bash that stays its parent, as when a user types it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HOME": str(folder / "home")}
    script = f"{line}\nexit $?\n"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_COMMANDS, ids=named)
def test_the_commands_of_a_page_run_and_print_what_it_shows(path: Path, workplace: Path) -> None:
    for why, text in blocks(path):
        if why is not None:
            continue
        command, printed = "", ""
        for line in text.splitlines():
            if line.startswith("$ "):
                command = line[2:].partition(" #")[0].strip()
                done = bash(command, workplace)
                assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
                printed = done.stdout
            else:
                assert line in printed, f"{command} does not print {line!r}"


def test_commands_that_are_not_run_have_a_known_reason() -> None:
    assert WITH_COMMANDS
    marks = [why for path in PAGES for why in re.findall(r"<!-- not run: (.+) -->", path.read_text())]
    assert set(marks) <= set(NOT_RUN)
    assert len(marks) == sum(why is not None for path in PAGES for why, _ in blocks(path)), "a mark without its block"
    for path in PAGES:
        for why, text in blocks(path):
            lines = [line for line in text.splitlines() if line.startswith("$ ")]
            if why == "network":
                assert all(re.search(r"\b[\w-]+/[\w.-]+\d", line) for line in lines), "names no model of the Hub"
            if why == "make":
                assert all(line.startswith("$ make ") for line in lines)


def test_commands_that_are_not_run_are_called_rightly_all_the_same(tmp_path: Path) -> None:
    root = get_command(app)
    lines = [line for path in PAGES for why, text in blocks(path) if why for line in text.splitlines()]
    found = [found[1] for line in lines if (found := re.search(r"\bt5g2(?:convert)? ([a-z].*?)(?: #.*)?$", line))]
    assert found
    for command in found:
        name, *arguments = shlex.split(command)
        load(name).make_context(name, arguments, parent=root.make_context("t5g2", [name]))


def test_the_completion_of_the_page_was_installed(workplace: Path) -> None:
    assert bash("t5g2 --install-completion", workplace).returncode == 0
    installed = workplace / "home/.bash_completions/t5g2.sh"
    assert "complete -o default -F _t5g2_completion t5g2" in installed.read_text()
    assert str(installed) in (workplace / "home/.bashrc").read_text()
