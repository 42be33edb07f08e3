"""docs/adding-a-family.md lists the files of the Gemma 2 family, and quotes the real code."""

import re
from pathlib import Path

import yaml

from t5g2convert.checkpoint.families.registry import TARGETS
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.source_families import FAMILIES
from t5g2convert.parity.suites.selection import SUITES
from t5g2convert.parity.suites.t5gemma import TO_T5GEMMA

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding-a-family.md").read_text()
ROWS = dict(re.findall(r"^\| \[([^]]+)\]\([^)]+\) \| .* \| (\d+) \|$", PAGE, re.MULTILINE))


def test_no_file_of_the_family_is_left_out() -> None:
    own = {
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "mappings").iterdir(), *(ROOT / "t5g2convert").rglob("*.py")]
        if path.stem in {"gemma2", "t5gemma"} or path.stem.startswith("cross")
    }
    assert own == ROWS.keys()
    assert len(own) == 7


def test_the_entries_are_there() -> None:
    assert "gemma2" in FAMILIES
    assert "t5gemma" in TARGETS
    assert TO_T5GEMMA in SUITES


def test_the_row_is_in_the_map() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (row,) = yaml.safe_load(block)
    assert row in yaml.safe_load(find_map("gemma2").path.read_text())["weights"]


def test_the_checks_match_the_kind() -> None:
    assert re.findall(r"^\| (\w+_parity) \|", PAGE, re.MULTILINE) == [
        name for name in TO_T5GEMMA.checks if name.endswith("_parity")
    ]


def test_every_file_that_the_page_links_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert len(links) > len(ROWS)
    for target in links:
        assert (ROOT / "docs" / target).exists(), target
