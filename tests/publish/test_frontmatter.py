import time
from contextlib import suppress

import pytest

from t5g2convert.errors import CheckpointError, OutputError
from t5g2convert.publish.frontmatter import Card, parse_card

WHOLE = """---
# a comment of the owner
language: no   # the language Norwegian
license: "apache-2.0"
tags:
- one
- 'two'
# about the next key
released: 2024-01-01
model-index:
  - name: x
    results: []
widget: {text: "a: b"}
note: |
  some text
  # no comment
empty:
---
# Title
"""


def parse(text: str) -> Card:
    return parse_card(text, error=OutputError, where="the card")


def test_keys_are_read_as_texts_and_lists_of_texts() -> None:
    card = parse(WHOLE)
    assert {key: entry.value for key, entry in card.entries.items() if entry.readable} == {
        "language": "no",
        "license": "apache-2.0",
        "tags": ("one", "two"),
        "released": "2024-01-01",
        "note": "some text\n# no comment\n",
        "empty": None,
    }
    assert {key for key, entry in card.entries.items() if not entry.readable} == {"model-index", "widget"}
    assert {key for key, entry in card.entries.items() if entry.empty} == {"empty"}
    assert card.body == "# Title\n"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("beginning", ["", "\n  \n", "\ufeff"])
def test_unchanged_text_stays_the_same_to_the_byte(newline: str, beginning: str) -> None:
    text = WHOLE.replace("\n", newline)
    card = parse(beginning + text)
    assert card.newline == newline
    assert card.joined({}, card.body) == text


def test_a_key_is_replaced_added_and_removed_and_its_neighbours_stay() -> None:
    card = parse(WHOLE)
    changed = card.joined({"tags": "tags:\n- three", "license": None, "new": "new: 1"}, card.body)
    expected = WHOLE.replace('license: "apache-2.0"\n', "").replace("- one\n- 'two'\n", "- three\n")
    assert changed == expected.replace("empty:\n", "empty:\nnew: 1\n")


def test_a_block_of_text_is_removed_as_a_whole() -> None:
    card = parse(WHOLE)
    assert card.joined({"note": None}, "") == WHOLE.replace("note: |\n  some text\n  # no comment\n", "").replace(
        "# Title\n", ""
    )


def test_metadata_that_are_indented_get_keys_that_are_too() -> None:
    card = parse("---\n  a: 1\n  b:\n    - 2\n---\n")
    changed = card.joined({"a": "a: 3", "c": "c:\n- 4"}, "")
    assert changed == "---\n  a: 3\n  b:\n    - 2\n  c:\n  - 4\n---\n"
    assert parse(changed).entries["c"].value == ("4",)


@pytest.mark.parametrize("text", ["", "# Title\n", "--- a\n", "---\n---\n", "text\n---\na: 1\n---\n"])
def test_a_card_without_metadata_gets_some(text: str) -> None:
    card = parse(text)
    assert (card.entries, card.body) == ({}, text)
    assert card.joined({"a": "a: 1"}, text) == f"---\na: 1\n---\n{text}"
    assert card.joined({}, text) == text


@pytest.mark.parametrize("inside", ["\n", "# nothing but a comment\n", "~\n", "null\n"])
def test_empty_metadata_has_no_keys(inside: str) -> None:
    assert parse(f"---\n{inside}---\nbody").entries == {}


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ("- a", "are not a mapping"),
        ("text", "are not a mapping"),
        ("{a: 1, b: 2}", "are in braces, expected one key per line"),
        ("a: 1\na: 2", "have the key 'a' twice"),
        ("[a]: 1", "have a key that is not text"),
        ("a: 1\n...\n--- {b: 2}", "have several documents"),
        ("a: 1\n...\nb: 2", "are not valid YAML"),
        ("a: [1", "are not valid YAML"),
        ("a: 1\n\tb: 2", "are not valid YAML"),
        ("a: \x01", "contain a character that YAML does not allow"),
        ("a: " + "[" * 40 + "]" * 40, "are nested more than 32 levels deep"),
    ],
)
def test_invalid_metadata_is_refused(inside: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match="the source's card: metadata") as error:
        parse_card(f"---\n{inside}\n---\n", error=CheckpointError, where="the source's card", hint="mend it")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.hint == "mend it"


def test_an_error_names_the_line_of_the_card() -> None:
    with pytest.raises(OutputError, match="line 4"):
        parse("---\na: 1\nb: 2\n'\n---\n")


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['x']", "&a [1, 2]", "!x y", "[*a]", "*a", "! z"])
def test_tags_and_anchors_build_nothing(value: str) -> None:
    entry = parse(f"---\na: {value}\nc: d\n---\n").entries["a"]
    assert entry.value in (None, ("1", "2"))


@pytest.mark.parametrize(
    "inside",
    [
        "a: " + "[" * 100_000,
        "a: " + "{a: " * 50_000,
        "\n".join(f"a{number}: &a{number} [*a{number - 1}, *a{number - 1}]" for number in range(1, 5000)),
        "a: " + "x" * 900_000,
        "\n".join(f"k{number}: v" for number in range(50_000)),
    ],
    ids=["lists", "mappings", "aliases", "long", "many"],
)
def test_metadata_cannot_make_it_slow(inside: str) -> None:
    begun = time.process_time()
    with suppress(OutputError):
        parse(f"---\n{inside}\n---\n")
    assert time.process_time() - begun < 5


def test_a_card_that_is_too_large_or_not_text_is_refused() -> None:
    with pytest.raises(OutputError, match="expected at most 1,048,576"):
        parse("x" * (1 << 20) + "x")
    with pytest.raises(OutputError, match="surrogate"):
        parse("a\ud800")
