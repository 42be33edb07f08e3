"""Token ids of every tokenizer file are found; invalid ids are refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.tokenizer.files import Tokenizer, read_pieces
from t5g2convert.checkpoint.tokenizer.ids_in_use import IdsInUse, UsedId
from t5g2convert.errors import CheckpointError

START, ROWS = 6, 9


def entry(number: Any, content: Any) -> dict[str, Any]:
    return {
        "id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }  # fmt: skip


def words(count: int) -> dict[str, int]:
    return {f"w{number}": number for number in range(count)}


def tokenizer(vocabulary: Any, *added: Any, kind: str = "BPE", **more: Any) -> dict[str, Any]:
    model = {"type": kind, "vocab": vocabulary, "merges": [["a", "b"], "c d"], **more}
    return {"version": "1.0", "added_tokens": list(added), "normalizer": {"type": "NFC"}, "model": model}


def found(folder: Path, moved: Mapping[str, int] | None = None) -> IdsInUse:
    ids = IdsInUse(START, ROWS, moved or {})
    ids.add_tokenizer(Tokenizer(Checkpoint(folder, {}, b"{}", {}, {}, ())))
    return ids


def write(folder: Path, **documents: Any) -> Path:
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def varint(number: int) -> bytes:
    text = b""
    while number > 127:
        text, number = text + bytes([number & 127 | 128]), number >> 7
    return text + bytes([number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece(*pieces: str) -> bytes:
    """Return a SentencePiece model: pieces with scores and types, followed by settings."""
    made = (field(1, field(1, piece.encode()) + b"\x15" + bytes(4) + b"\x18\x01") for piece in pieces)
    return b"".join(made) + field(2, b"\x18\x80\x80\x10") + field(3, field(1, b"identity"))


FOUND: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"tokenizer": tokenizer(words(8))}, "tokenizer.json has the token 'w6' as 6"),
    "one-beyond-a-hole": ({"tokenizer": tokenizer({"a": 0, "b": 7})}, "tokenizer.json has the token 'b' as 7"),
    "wordpiece": ({"tokenizer": tokenizer(words(7), kind="WordPiece")}, "tokenizer.json has the token 'w6' as 6"),
    "unigram": (
        {"tokenizer": tokenizer([[f"p{number}", -1.5] for number in range(8)], kind="Unigram")},
        "tokenizer.json has the token 'p6' as 6",
    ),
    "added": ({"tokenizer": tokenizer(words(6), entry(6, "[PAD]"))}, "tokenizer.json has the token '[PAD]' as 6"),
    "added-behind-the-model": (
        dict(reversed(tokenizer(words(6), entry(6, "[PAD]")).items())), "tokenizer.json has the token '[PAD]' as 6",
    ),
    "added-under-an-id-that-no-loader-gives": (
        {"tokenizer": tokenizer(words(7), entry(2, "[PAD]"), entry(0, "w6"))},
        "tokenizer.json has the token 'w6' as 6",
    ),
    "settings": (
        {"tokenizer": tokenizer(words(6)), "tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<t>"}}}},
        "tokenizer_config.json has the token '<t>' as 7",
    ),
    "added-file": ({"added_tokens": {"<t>": 8, "<u>": 7}}, "added_tokens.json has the token '<u>' as 7"),
    "name-in-the-settings": (
        {"tokenizer": tokenizer(words(6)), "tokenizer_config": {"pad_token": "[PAD]", "eos_token": "w1"}},
        "tokenizer_config.json has the token '[PAD]' (loaders assign it the id 6)",
    ),
    "name-in-the-map": (
        {"tokenizer": tokenizer(words(6)), "special_tokens_map": {"pad_token": {"content": "[PAD]"}}},
        "special_tokens_map.json has the token '[PAD]' (loaders assign it the id 6)",
    ),
    "names-in-lists": (
        {"tokenizer": tokenizer(words(6)), "tokenizer_config": {"extra_special_tokens": {"a_token": "<a>"},
                                                               "additional_special_tokens": ["w0"]}},
        "tokenizer_config.json has the token '<a>' (loaders assign it the id 6)",
    ),
    "escapes": ({"tokenizer": tokenizer({**words(6), '"\\é': 6})}, "tokenizer.json has the token '\"\\\\é' as 6"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_an_id_is_found_in_whichever_file_it_is(case: str, tmp_path: Path) -> None:
    documents, expected = FOUND[case]
    if "model" in documents:
        documents = {"tokenizer": documents}
    ids = found(write(tmp_path, **documents))
    assert str(ids.spare) == expected
    assert ids.beyond is None
    assert ids.has_vocabulary == ("tokenizer" in documents)


def test_ids_below_do_not_count(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        tokenizer=tokenizer(words(5), entry(5, "<t>"), entry(2, "w2")),
        tokenizer_config={"added_tokens_decoder": {"5": {"content": "<t>"}, "1": "w1"}, "pad_token": "<t>"},
        special_tokens_map={"eos_token": "w3", "cls_token": None},
        added_tokens={"<t>": 5},
    )
    ids = found(folder)
    assert (ids.spare, ids.beyond, ids.has_vocabulary) == (None, None, True)


def test_an_id_without_a_row_is_distinguished_from_a_spare_row(tmp_path: Path) -> None:
    ids = found(write(tmp_path, added_tokens={"<c>": 20, "<b>": 9, "<a>": 7}))
    assert (str(ids.spare), str(ids.beyond)) == (
        "added_tokens.json has the token '<a>' as 7", "added_tokens.json has the token '<b>' as 9",
    )  # fmt: skip


def test_a_token_that_moves_counts_only_elsewhere(tmp_path: Path) -> None:
    moved = {"<image>": 6}
    folder = write(tmp_path, tokenizer=tokenizer(words(6), entry(6, "<image>")), added_tokens={"<image>": 6})
    assert found(folder, moved).spare is None
    assert [*found(folder, moved).at_moved] == ["<image>"]
    write(folder, added_tokens={"<image>": 7})
    assert str(found(folder, moved).spare) == "added_tokens.json has the token '<image>' as 7"
    write(folder, added_tokens={"<other>": 6})
    assert str(found(folder, moved).spare) == "added_tokens.json has the token '<other>' as 6"


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (0, 1, 2, 9), (4, 5, 6, 7)])
def test_the_tokenizers_library_gives_new_tokens_the_same_ids(numbers: tuple[int, ...], tmp_path: Path) -> None:
    vocabulary = {f"w{number}": number for number in numbers}
    document = tokenizer(vocabulary, entry(30, "<x>"), entry(1, "<y>"), entry(9, "w9"), merges=[])
    write(tmp_path, tokenizer=document)
    library = tokenizers.Tokenizer.from_str(json.dumps({**document, "normalizer": None}))
    given: dict[str, int] = {}

    class All(IdsInUse):
        def add(self, used: UsedId) -> None:
            given.update({used.what: used.number} if used.assigned else {})

    All(0, 1).add_tokenizer(Tokenizer(Checkpoint(tmp_path, {}, b"{}", {}, {}, ())))
    expected = {token: library.token_to_id(token) for token in ("<x>", "<y>", "w9") if token not in vocabulary}
    assert given == {f"the token {token!r}": number for token, number in expected.items()}


def test_the_pieces_of_a_sentencepiece_model_count_where_they_are_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(*words(8)))
    ids = found(tmp_path)
    assert (str(ids.spare), ids.has_vocabulary, ids.remarks) == ("tokenizer.model has the token 'w6' as 6", True, [])
    write(tmp_path, special_tokens_map={"pad_token": "[PAD]"})
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(*words(6)))
    assert str(found(tmp_path).spare) == "special_tokens_map.json has the token '[PAD]' (loaders assign it the id 6)"
    write(tmp_path, special_tokens_map={}, tokenizer=tokenizer(words(5)))
    assert found(tmp_path).spare is None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"sentencepiece", b"\x0a", b"\x0a\x05abc", b"\x00" * 20, b"{}", field(2, b""), field(1, b"x"),
        sentencepiece("a", "b")[:-1], sentencepiece("a") + b"\x0b", b"\x0a" + b"\xff" * 12,
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_sentencepiece_model_is_reported(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert read_pieces(tmp_path / "tokenizer.model") is None
    ids = found(tmp_path)
    assert (ids.has_vocabulary, ids.spare) == (False, None)
    assert ids.remarks == ["tokenizer.model is not a SentencePiece model and was not read"]


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a-list": ("tokenizer_config", {"added_tokens_decoder": {"7": ["<t>"]}}, "has a list as 7, expected a token"),
    "a-content-that-is-a-list": (
        "tokenizer_config", {"added_tokens_decoder": {"7": {"content": ["<t>"]}}},
        "has an object with a list as content as 7, expected a token",
    ),
    "no-content": ("tokenizer_config", {"added_tokens_decoder": {"7": {}}}, "an object with null as content as 7"),
    "a-number": ("tokenizer_config", {"added_tokens_decoder": {"7": 3}}, "has a number as 7"),
    "null": ("tokenizer_config", {"added_tokens_decoder": {"7": None}}, "has null as 7"),
    "a-word": ("tokenizer_config", {"added_tokens_decoder": {"seven": {"content": "<t>"}}}, "has the key 'seven'"),
    "a-negative-key": ("tokenizer_config", {"added_tokens_decoder": {"-7": {"content": "<t>"}}}, "has the key '-7'"),
    "a-long-key": ("tokenizer_config", {"added_tokens_decoder": {"7" * 5000: {"content": "<t>"}}}, "has the key '777"),
    "another-digit": ("tokenizer_config", {"added_tokens_decoder": {"²": {"content": "<t>"}}}, "has the key '²'"),
    "a-list-of-all": ("tokenizer_config", {"added_tokens_decoder": []}, "is a list, expected an object"),
    "added-text": ("added_tokens", {"<t>": "7"}, "'<t>' has id \"7\", expected an integer"),
    "added-true": ("added_tokens", {"<t>": True}, "'<t>' has id true"),
    "added-negative": ("added_tokens", {"<t>": -1}, "'<t>' has id -1"),
    "added-huge": ("added_tokens", {"<t>": 2**40}, "'<t>' has id 1099511627776"),
    "added-fraction": ("added_tokens", {"<t>": 7.0}, "'<t>' has id 7.0"),
    "entry-without-id": ("tokenizer", tokenizer({}, {"content": "<t>"}), "the added token '<t>' has id null"),
    "entry-without-content": ("tokenizer", tokenizer({}, {"id": 7}), "an entry without content (with id 7)"),
    "entry-that-is-a-text": ("tokenizer", tokenizer({}, "<t>"), "an entry without content (a string)"),
    "vocabulary-text": ("tokenizer", tokenizer({"a": 0, "b": "1"}), "'b' has id \"1\""),
    "vocabulary-negative": ("tokenizer", tokenizer({"a": 0, "b": -1}), "'b' has id -1"),
    "vocabulary-null": ("tokenizer", tokenizer({"a": 0, "b": None}), "'b' has id null"),
    "vocabulary-huge": ("tokenizer", tokenizer({"a": 0, "b": 10**12}), "'b' has id 1000000000000"),
    "vocabulary-beyond-all": ("tokenizer", tokenizer({"a": 0, "b": 10**20}), "'b' has id 100000000000000000000"),
    "vocabulary-true": ("tokenizer", tokenizer({"a": True}), "'a' has id true"),
    "vocabulary-that-is-a-text": ("tokenizer", tokenizer("a"), "model.vocab is not an object or a list"),
    "unigram-of-texts": ("tokenizer", tokenizer(["a"]), "model.vocab has no string as token 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_I16_an_invalid_id_is_refused_with_file_and_token(case: str, tmp_path: Path) -> None:
    name, document, message = REFUSED[case]
    write(tmp_path, **{name: document})
    with pytest.raises(CheckpointError) as caught:
        found(tmp_path)
    assert message in caught.value.message
    assert caught.value.where == str(tmp_path / f"{name}.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"model"', '{"model": {"vocab": {"a": 1', '{"model": {"vocab": {"a": 1,}}}',
        '{"model": {"vocab":',
        '{"a": 1} x', '{"a": 1,}', '{"a" 1}', '{"a": nope}', '{"added_tokens": [{"id": 1]}', '{"a": [1, {"b": [2]}',
        '{"model": {"vocab": {"a\\x": 9}, "x": tru}}', '{"a": "', "{'a': 1}", '{"added_tokens": [1 2]}',
    ],
)  # fmt: skip
def test_invalid_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is not valid JSON|is a JSON list|without content"):
        found(tmp_path)


SPECIAL = {"[A]": {"id": "[A]", "ids": [2, 7], "tokens": ["[A]", "[B]"]}}
TEMPLATE = {"type": "Sequence", "processors": [{"type": "TemplateProcessing", "special_tokens": SPECIAL}]}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"post_processor": TEMPLATE}, "tokenizer.json has the token '[A]' as 7"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["[S]", 8], "cls": ["[C]", 1]}}, "the token '[S]' as 8"),
        ({"padding": {"strategy": "BatchLongest", "pad_id": 6, "pad_token": "[P]"}}, "the token '[P]' as 6"),
    ],
)
def test_ids_added_to_every_text_count(part: dict[str, Any], message: str, tmp_path: Path) -> None:
    ids = found(write(tmp_path, tokenizer={**tokenizer(words(6)), **part}))
    assert message in str(ids.spare)


@pytest.mark.parametrize("part", [{"added_tokens": None}, {"added_tokens": {}}, {"model": None}, {"model": []}])
def test_a_tokenizer_that_no_library_loads_is_refused(part: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: (added_tokens|model) is not"):
        found(write(tmp_path, tokenizer={**tokenizer(words(6)), **part}))
