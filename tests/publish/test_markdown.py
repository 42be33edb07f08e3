import pytest
from markdown_it import MarkdownIt

from t5g2convert.publish.markdown import SHOWN_CHARACTERS, code, fenced, table
from tests.cli.test_hostile_text import PAYLOADS

ODD = [
    *PAYLOADS.values(),
    "`",
    "``a``",
    "\\",
    "a\\",
    "|",
    "\\|",
    "a | b",
    " a ",
    "*a*",
    "[a](https://b.c)",
    "<b>",
    "&lt;",
]


@pytest.mark.parametrize("text", ODD)
def test_text_from_outside_is_code_and_nothing_else(text: str) -> None:
    (paragraph,) = (token for token in MarkdownIt().parse(f"x {code(text)} y") if token.type == "inline")
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]


@pytest.mark.parametrize("text", ODD)
def test_it_fills_one_cell_of_a_table(text: str) -> None:
    tokens = MarkdownIt().enable("table").parse(table(["a", "b"], [[code(text), "c"]]))
    cells = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "td_open"]
    assert cells == [code(text), "c"]


@pytest.mark.parametrize("text", ["", " ", "   "])
def test_empty_text_is_marked_as_empty(text: str) -> None:
    assert code(text) == "(empty)"


def test_long_text_is_cut() -> None:
    assert code("x" * 10_000) == f"`{'x' * SHOWN_CHARACTERS}...`"


def test_a_line_cannot_end_its_block() -> None:
    assert fenced("console", ["$ a\n```\n# b"]) == "```console\n$ a\\n```\\n# b\n```"
    with pytest.raises(AssertionError, match="would end the block"):
        fenced("console", ["```"])


def test_a_row_that_is_too_short_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="as many columns"):
        table(["a", "b"], [["c"]])
