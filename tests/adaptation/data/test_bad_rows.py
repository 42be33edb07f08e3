"""A thousand rows of all forms, valid or with one thing wrong: each is packed, or refused by its file and line."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from t5g2convert.adaptation.data import documents, rows
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.rows import Columns
from t5g2convert.errors import DataError
from tests.models.gemma_chat import write_chat_model

ROWS = 1000
LIMIT = 3000
"""Most characters of a text and bytes of a line, in these tests."""

TEXTS = (
    "a", "a b\n\nc", "<eos><bos>", "<start_of_image>", "<end_of_turn>\n<start_of_turn>model\n", "<unused99>",
    "é日本\u202e", "{{ bos_token }}", "{% raise %}", '"', "\\", "\x1b[31m", "t5g2name0x1x", "x" * 400,
    "\ufeffa", "<image>",
)  # fmt: skip
NOT_TEXTS = (None, 3, 1.5, float("nan"), True, {}, {"text": "a"}, "a\0b", "\ud800", "y" * (LIMIT + 1))
EMPTY = ("", " ", "\n\t ", "\u2003")
NOT_MESSAGES = (None, 3, "a", {}, [], [None], [[]], [{}], ["a"])
BAD_LINES = (
    b"{",
    b"\xff\xfe",
    b"[1]",
    b"3",
    b'"a"',
    b"null",
    b"[" * 2000,
    b'{"text": ' + b"[" * 2500,
    b"{'a': 1}",
    b"\x00",
)

Made = tuple[dict[str, Any] | bytes, str]
"""A row, and `pair`, `document`, `empty` or `refused`."""


def text_row(chance: random.Random) -> Made:
    kind = chance.choice(("good", "good", "empty", "bad"))
    if kind == "good":
        return {"text": chance.choice(TEXTS)}, "document"
    if kind == "empty":
        return {"text": chance.choice(EMPTY)}, "empty"
    return {"text": chance.choice((*NOT_TEXTS, [], ["a"]))}, "refused"


def pair_row(chance: random.Random) -> Made:
    keys = chance.choice((("input", "target"), ("prompt", "completion")))
    row: dict[str, Any] = {key: chance.choice(TEXTS) for key in keys}
    kind = chance.choice(("good", "good", "empty", "bad", "missing", "listed", "two"))
    key = chance.choice(keys)
    if kind == "empty":
        row[key] = chance.choice(EMPTY)
    elif kind == "bad":
        row[key] = chance.choice(NOT_TEXTS)
    elif kind == "missing":
        del row[key]
    elif kind == "listed":
        row[key] = chance.choice(([], ["a"], [{"role": "user", "content": "a"}]))
    elif kind == "two":
        row["text"] = "a"
    return row, "pair" if kind == "good" else "refused"


def chat_row(chance: random.Random) -> Made:
    """Return a conversation, of which at most one thing is wrong."""
    turns = [
        {"role": role, "content": chance.choice(TEXTS)}
        for _ in range(chance.randint(1, 4))
        for role in ("user", "assistant")
    ]
    first = [{"role": "system", "content": chance.choice((*TEXTS, *EMPTY))}] * chance.randint(0, 1)
    for message in turns:
        if chance.random() < 0.3:
            message["content"] = [{"type": "text", "text": message["content"]}]
    messages: list[Any] = [*first, *turns]
    break_it: dict[str, Callable[[], object]] = {
        "role": lambda: messages[-1].update(role=chance.choice((None, 3, "", "robot", [], {}))),
        "content": lambda: messages[-2].update(
            content=chance.choice((*NOT_TEXTS[:-3], *NOT_TEXTS[-3:], [3], [None], [{}]))
        ),
        "empty": lambda: messages[-1].update(content=chance.choice((*EMPTY, [], [{"type": "text", "text": " "}]))),
        "part": lambda: messages[-2].update(
            content=[{"type": chance.choice((None, 3, "video", "text", [])), "text": None}]
        ),
        "image": lambda: messages[-2].update(
            content=[{"type": "image", "image": chance.choice((3, [], "", "/x", "../x", "no.png"))}]
        ),
        "place": lambda: messages[-2].update(content=[{"type": "image"}]),
        "answer": lambda: messages.pop(),
        "order": lambda: messages.insert(len(first), messages[len(first)]),
        "image in target": lambda: messages[-1].update(
            content=[{"type": "image", "image": "red.png"}, {"type": "text", "text": "a"}]
        ),
        "missing": lambda: messages[-1].pop(chance.choice(("role", "content"))),
        "not a message": lambda: messages.append(chance.choice((None, 3, "a", []))),
    }
    kind = chance.choice(("good",) * 6 + tuple(break_it))
    if kind != "good":
        break_it[kind]()
    elif chance.random() < 0.3:
        parts = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "a"}]
        messages[-2]["content"] = parts
    row: dict[str, Any] = {"messages": messages}
    if kind == "good" and chance.random() < 0.2:
        row = {"conversations": [{"from": each["role"], "value": each["content"]} for each in messages]}
    elif kind == "good" and chance.random() < 0.2:
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    return row, "pair" if kind == "good" else "refused"


def other_row(chance: random.Random) -> Made:
    kind = chance.choice(("line", "messages", "keys"))
    if kind == "line":
        return chance.choice((*BAD_LINES, b'{"text": "' + b"z" * LIMIT + b'"}')), "refused"
    if kind == "messages":
        return {"messages": chance.choice(NOT_MESSAGES)}, "refused"
    return {chance.choice(("txt", "", "question", "inputs", "\ud800", "input")): chance.choice(TEXTS)}, "refused"


def made_rows(seed: int, count: int) -> Iterator[Made]:
    chance = random.Random(seed)
    for _ in range(count):
        yield chance.choice((text_row, pair_row, pair_row, chat_row, chat_row, other_row))(chance)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, rows):
        monkeypatch.setattr(module, "LONGEST", LIMIT)


def line_of(row: dict[str, Any] | bytes) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.mark.usefixtures("short")
def test_a_thousand_rows_are_packed_or_refused_by_file_and_line(model: Path, tmp_path: Path) -> None:
    made = list(made_rows(0, ROWS))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line_of(row) + b"\n" for row, _ in made))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    read = read_files([path], Columns(), lambda _: None)
    index = pack(model, tmp_path / "out", read, skip_bad=ROWS, max_input=512, truncate="input", flush=False).index
    expected = Counter(kind for _, kind in made)
    assert min(expected[kind] for kind in ("pair", "document", "empty", "refused")) > 20
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    wrong = [number for number, (_, kind) in enumerate(made, 1) if kind == "refused"]
    assert [each["where"] for each in skipped] == [f"{path}:{number}" for number in wrong]
    assert index.skipped is not None
    found = {
        "pair": index.pair.documents,
        "document": index.text.documents,
        "empty": index.empty,
        "refused": index.skipped.documents,
    }
    assert found == expected
    assert len({each["reason"] for each in skipped}) > 60, "and for many reasons"
    Packed.open(tmp_path / "out", verify=True)
    print(f"{ROWS} rows: {dict(expected)}, refused for {len({each['reason'] for each in skipped})} reasons")


@pytest.mark.usefixtures("short")
def test_a_row_that_is_refused_ends_the_packing(model: Path, tmp_path: Path) -> None:
    tried = 0
    for number, (row, kind) in enumerate(made_rows(1, 100)):
        if kind != "refused":
            continue
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(b'{"text": "a"}\n' + line_of(row))
        with pytest.raises(DataError) as failed:
            pack(model, tmp_path / "out", read_files([path], Columns(), lambda _: None), flush=False)
        assert failed.value.where == f"{path}:2"
        assert "\n" not in str(failed.value)
        tried += 1
    assert tried > 30
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("short")
def test_lines_of_a_csv_are_packed_or_refused(model: Path, tmp_path: Path) -> None:
    chance = random.Random(2)
    lines: list[tuple[bytes, str]] = []
    for _ in range(300):
        good = [chance.choice(("a", "a b", '"a,b"', '"a ""b"""', "<eos>", "é")) for _ in range(2)]
        kind = chance.choice(("pair", "pair", "fields", "quote", "bytes", "empty", "long", "nul"))
        fields = [field.encode() for field in good]
        if kind == "fields":
            fields = fields[:1] if chance.random() < 0.5 else [*fields, b"c"]
        elif kind != "pair":
            fields[chance.randint(0, 1)] = {
                "quote": b'"a"b', "bytes": b"\xff", "empty": b" ", "long": b"z" * (LIMIT + 1), "nul": b"a\0",
            }[kind]  # fmt: skip
        lines.append((b",".join(fields), kind))
    path = tmp_path / "rows.csv"
    path.write_bytes(b"input,target\n" + b"".join(line + b"\r\n" for line, _ in lines))
    index = pack(
        model, tmp_path / "out", read_files([path], Columns(), lambda _: None), skip_bad=300, flush=False
    ).index
    wrong = [number for number, (_, kind) in enumerate(lines, 2) if kind != "pair"]
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [each["where"] for each in skipped] == [f"{path}:{number}" for number in wrong]
    assert index.pair.documents == 300 - len(wrong) > 50
