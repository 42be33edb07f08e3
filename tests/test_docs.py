"""docs/faults.md tells of the rows that have tests, of all of them, and of no others."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/faults.md").read_text()
ROWS = re.findall(r"^\| ([A-Z]\d+) \|", PAGE, re.MULTILINE)
TESTS = [
    name
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_page_has_tests_named_after_it(row: str) -> None:
    assert [name for name in TESTS if name.startswith(f"test_{row}_")]


def test_every_row_that_has_tests_stands_on_the_page_once() -> None:
    named = {found[1] for name in TESTS if (found := re.match(r"test_([A-Z]\d+)_", name))}
    assert set(ROWS) == named
    assert len(ROWS) == len(set(ROWS))


def test_the_page_counts_the_attacks_that_are_there() -> None:
    attacks = [path for path in (ROOT / "tests/attacks").glob("*/*") if path.is_file()]
    assert f"kept in [tests/attacks](../tests/attacks) | {len(attacks)} |" in PAGE


def test_every_file_that_the_page_links_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def test_make_knows_the_targets_that_the_page_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", PAGE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
