"""tokenizer.json with a moved token, compared with the same change to the parsed file."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from t5g2convert.checkpoint.tokenizer.files import TokenizerJson
from t5g2convert.conversion.assets.tokenizer import TokenChange, TokenMove, edit_tokenizer
from t5g2convert.errors import CheckpointError
from tests.models.gemma_tokenizer import LOOKALIKES, VOCABULARY, moved, tokenizer_text

MOVE = TokenMove("<image_soft_token>", "<unused99>", source=262_144, target=256_001)
MOVED = TokenChange("<image_soft_token>", 262_144, 256_001, "<unused99>")
MASKED = TokenChange("<mask>", 4, 4, None)

PUBLISHED = os.environ.get("T5G2_GEMMA3_TOKENIZER", "")
PUBLISHED_BYTES = 33_384_568
RELEASED_BYTES = 33_384_387
RELEASED_SHA256 = "f5b325224482ec441ec5fbe2a5ac08c3758e0f9605f6e54368e31f736fcfb01d"


Edited = tuple[bytes, tuple[TokenChange, ...]]


def edit(path: Path, *, required: bool = True, rows: int = VOCABULARY) -> Edited | None:
    return edit_tokenizer(TokenizerJson.read(path), [MOVE], ["<mask>"], rows=rows, required=required)


def edited(path: Path) -> Edited:
    """Return the text after the change, and the changes."""
    found = edit(path)
    assert found is not None
    return found


def result(folder: Path, text: str) -> str:
    """Return the text after the change."""
    (folder / "tokenizer.json").write_text(text)
    return edited(folder / "tokenizer.json")[0].decode()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, tuple[TokenChange, ...]]:
    path = tmp_path_factory.mktemp("made") / "tokenizer.json"
    path.write_text(tokenizer_text())
    text, changes = edited(path)
    return text.decode(), changes


@pytest.mark.slow
def test_the_result_equals_what_the_tokenizers_library_saves(
    made: tuple[str, tuple[TokenChange, ...]],
) -> None:
    text, changes = made
    assert json.loads(text) == moved(tokenizer_text())
    assert text == Tokenizer.from_str(text).to_str(pretty=True)
    assert text == Tokenizer.from_str(json.dumps(moved(tokenizer_text()))).to_str(pretty=True)
    assert changes == (MOVED, MASKED)


@pytest.mark.slow
def test_all_other_tokens_keep_their_ids(made: tuple[str, tuple[TokenChange, ...]]) -> None:
    before, after = Tokenizer.from_str(tokenizer_text()), Tokenizer.from_str(made[0])
    one, other = before.get_vocab(), after.get_vocab()
    assert (one.pop("<image_soft_token>"), one.pop("<unused99>")) == (262_144, 256_001)
    assert other.pop("<image_soft_token>") == 256_001
    assert one == other
    assert len(other) == VOCABULARY - 1
    for text in (
        "ab ab\n\nab",
        "a<start_of_image>b <end_of_turn>",
        "<unused98><unused100>",
        "東 <mask>",
        *LOOKALIKES[7:],
    ):
        assert before.encode(text).ids == after.encode(text).ids
        shown = (known.decode(known.encode(text).ids, skip_special_tokens=False) for known in (before, after))
        assert next(shown) == next(shown)
    assert after.encode("<image_soft_token>", add_special_tokens=False).ids == [256_001]
    assert after.encode("a<image_soft_token>").ids == [2, before.token_to_id("a"), 256_001]
    assert after.decode([256_001], skip_special_tokens=False) == "<image_soft_token>"
    assert after.decode([256_001, before.token_to_id("a")]) == "a"
    assert before.encode("<unused99>").ids == [2, 256_001]
    assert 256_001 not in after.encode("<unused99>").ids


def entry(number: int, content: str, *, special: bool = False) -> dict[str, Any]:
    return {"id": number, "content": content, "normalized": False, "special": special}


def small(*entries: dict[str, Any], vocabulary: dict[str, int] | None = None, **others: Any) -> str:
    """Return a tokenizer.json with few tokens."""
    known = {"a": 0, "<mask>": 4, "<unused99>": 256_001, "id": 7} if vocabulary is None else vocabulary
    return json.dumps({"added_tokens": list(entries), "model": {"vocab": known, "merges": []}, **others}, indent=2)


MASK, FREE, OLD = entry(4, "<mask>"), entry(256_001, "<unused99>"), entry(262_144, "<image_soft_token>", special=True)
NEW = entry(256_001, "<image_soft_token>", special=True)
NEW_VOCABULARY = {"a": 0, "<mask>": 4, "<image_soft_token>": 256_001, "id": 7}
SEEN = {**MASK, "special": True}


WRITERS: dict[str, Callable[[Any], str]] = {
    "compact": lambda document: json.dumps(document, separators=(",", ":"), ensure_ascii=False),
    "spaced": lambda document: json.dumps(document, ensure_ascii=False),
    "windows": lambda document: json.dumps(document, indent=4, ensure_ascii=False).replace("\n", "\r\n"),
    "sorted": lambda document: json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False),
    "blanks": lambda document: json.dumps(document, separators=(" , ", " : "), ensure_ascii=False),
}


@pytest.mark.parametrize("form", WRITERS)
def test_other_ways_to_write_the_same_json_are_kept(form: str, tmp_path: Path) -> None:
    before, after = (small(MASK, FREE, OLD), small(SEEN, NEW, vocabulary=NEW_VOCABULARY))
    written = result(tmp_path, WRITERS[form](json.loads(before)))
    assert json.loads(written) == json.loads(after)
    if form not in ("sorted", "blanks"):  # there the order of keys would be another, and a blank stays
        assert written == WRITERS[form](json.loads(after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param([MASK, FREE, OLD], [SEEN, NEW], id="last"),
        pytest.param([OLD, MASK, FREE], [SEEN, NEW], id="first"),
        pytest.param([MASK, OLD, FREE], [SEEN, NEW], id="between"),
        pytest.param([FREE, OLD], [NEW], id="without-a-mask"),
        pytest.param([MASK, FREE], [SEEN, NEW], id="text-only-export"),
        pytest.param([SEEN, {**FREE, "special": True}, OLD], [SEEN, NEW], id="special-already"),
    ],
)
def test_the_entry_of_the_old_id_is_removed_anywhere(
    before: list[dict[str, Any]], after: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert result(tmp_path, small(*before)) == small(*after, vocabulary=NEW_VOCABULARY)


def test_the_place_in_the_file_does_not_matter(tmp_path: Path) -> None:
    for shift in (0, 1, 5000):
        text = small(MASK, FREE, OLD) + " " * shift
        expected = small(SEEN, NEW, vocabulary=NEW_VOCABULARY) + " " * shift
        assert result(tmp_path, " " * shift + text) == " " * shift + expected


def test_a_file_with_the_token_in_place_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(small(SEEN, NEW, vocabulary=NEW_VOCABULARY))
    assert edited(path) == (path.read_bytes(), ())
    path.write_text(small(SEEN, {**NEW, "special": False}, vocabulary=NEW_VOCABULARY))
    text, changes = edited(path)
    assert changes == (TokenChange("<image_soft_token>", 256_001, 256_001, None),)
    assert text.decode() == small(SEEN, NEW, vocabulary=NEW_VOCABULARY)


REFUSED = [
    pytest.param(small(MASK, OLD), "<unused99>: 256001 in the vocabulary", id="no-added-token-gives-way"),
    pytest.param(small(FREE, OLD, vocabulary={"a": 0}), "<unused99>: added token 256001", id="not-in-the-vocabulary"),
    pytest.param(small(FREE, FREE, OLD), "<unused99>: added token 256001, added token 256001", id="twice"),
    pytest.param(small(FREE, OLD, OLD), "<image_soft_token>: added token 262144, added token 262144", id="old-twice"),
    pytest.param(small(FREE, {**OLD, "id": 262_145}), "<image_soft_token>: added token 262145", id="another-old-id"),
    pytest.param(small(FREE, {**OLD, "id": 77}), "<image_soft_token>: added token 77", id="an-id-of-its-own"),
    pytest.param(small({**FREE, "id": 5}, OLD), "<unused99>: added token 5", id="another-free-id"),
    pytest.param(
        small(FREE, OLD, vocabulary={"<unused99>": 5}), "5 in the vocabulary", id="another-id-in-the-vocabulary"
    ),
    pytest.param(small(FREE, NEW), "<image_soft_token>: added token 256001", id="half-moved"),
    pytest.param(
        small(FREE, OLD, vocabulary={"<unused99>": 256_001, "<image_soft_token>": 262_143}),
        "262143 in the vocabulary",
        id="old-in-the-vocabulary",
    ),
    pytest.param(small(FREE, OLD, more=["<unused99>"]), "1 other place(s)", id="in-use"),
    pytest.param(small(FREE, OLD, content="<unused99>"), "1 other place(s)", id="a-content-of-something-else"),
    pytest.param(small(FREE, OLD, more={"<unused99>": "a"}), "1 other place(s)", id="a-key-of-something-else"),
    pytest.param(small({"id": 256_001, "content": "<unused99>"}, OLD), "1 other place(s)", id="an-entry-without-flags"),
    pytest.param(small({**FREE, "special": 1}, OLD), "1 other place(s)", id="a-flag-that-is-none"),
    pytest.param(small({**FREE, "id": "256001"}, OLD), "1 other place(s)", id="an-id-that-is-a-text"),
    pytest.param("{}", "<image_soft_token>: nowhere; <unused99>: nowhere", id="empty"),
    pytest.param(small(FREE, OLD).replace("<", "\\u003c"), "nowhere", id="spelled-otherwise"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_I15_an_unexpected_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        edit(path)
    assert message in caught.value.message
    assert "\n" not in str(caught.value)
    assert caught.value.where == str(path)
    assert caught.value.hint is not None


def test_the_undamaged_file_is_accepted(tmp_path: Path) -> None:
    assert json.loads(result(tmp_path, small(FREE, OLD)))["added_tokens"] == [NEW]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        pytest.param("{}", True, id="empty"),
        pytest.param(
            small(entry(255, "<image_soft_token>"), vocabulary={"<image_soft_token>": 255}), True, id="its-own-id"
        ),
        pytest.param(small(MASK, FREE, OLD), False, id="gemma"),
        pytest.param(small(MASK, FREE), False, id="export"),
        pytest.param(small(NEW, vocabulary=NEW_VOCABULARY), False, id="in-place"),
    ],
)
def test_a_model_without_images_can_do_without_the_tokens(text: str, kept: bool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert (edit(tmp_path / "tokenizer.json", required=False) is None) is kept


@pytest.mark.parametrize("text", [small(OLD, vocabulary={}), small(FREE, FREE, OLD), small(entry(262_144, "<mine>"))])
def test_I15_a_model_without_images_may_not_have_a_token_beyond_the_table(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError):
        edit(tmp_path / "tokenizer.json", required=False)


def test_published_and_released_file_sizes_differ_by_the_exchanged_entries(
    made: tuple[str, tuple[TokenChange, ...]],
) -> None:
    """Uses the layout of the tokenizers library; other content does not matter."""
    gone = (
        ',\n    {\n      "id": 262144,\n      "content": "<image_soft_token>",\n      "single_word": false,\n'
        '      "lstrip": false,\n      "rstrip": false,\n      "normalized": false,\n      "special": true\n    }'
    )
    assert tokenizer_text().count(gone) == 1
    longer = 2 * (len("<image_soft_token>") - len("<unused99>"))
    flags = 2 * (len("true") - len("false"))  # of <unused99>, and of <mask>
    assert longer + flags - len(gone) == len(made[0]) - len(tokenizer_text()) == -181
    assert RELEASED_BYTES - PUBLISHED_BYTES == -181


@pytest.mark.skipif(not PUBLISHED, reason="T5G2_GEMMA3_TOKENIZER names no published tokenizer.json")
def test_the_published_file_becomes_the_released_one() -> None:
    path = Path(PUBLISHED)
    assert path.stat().st_size == PUBLISHED_BYTES
    text, changes = edited(path)
    assert len(text) == RELEASED_BYTES
    assert hashlib.sha256(text).hexdigest() == RELEASED_SHA256
    assert changes == (MOVED, MASKED)


def test_a_trimmed_vocabulary_may_have_the_other_token_at_another_id(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(small(entry(198, "<unused99>"), vocabulary={"<unused99>": 198}))
    assert edit(tmp_path / "tokenizer.json", required=False) is None
    with pytest.raises(CheckpointError):
        edit(tmp_path / "tokenizer.json")
