import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from t5g2convert.adaptation.data import documents
from t5g2convert.adaptation.data.documents import Document, Fault, files_of, read_dataset, read_files
from t5g2convert.errors import DataError, HubError, T5g2Error, UsageError


def read(*paths: Path, column: str = "text") -> list[Document | Fault]:
    told: list[int] = []
    found = list(read_files(paths, column, told.append))
    assert sum(told) == sum(path.stat().st_size for path in files_of(paths)), "progress comes to the end"
    return found


def texts(found: list[Document | Fault]) -> list[str]:
    assert [item for item in found if isinstance(item, Fault)] == []
    return [item.text for item in found if isinstance(item, Document)]


def reason(found: list[Document | Fault]) -> str:
    (fault,) = (item for item in found if isinstance(item, Fault))
    return f"{fault.where}: {fault.reason}"


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n\ntwo ä\n".encode())
    assert texts(read(tmp_path / "a.txt")) == ["one\r\n\n\ntwo ä\n"]


def test_a_line_of_jsonl_is_a_document_and_blank_ones_are_none(tmp_path: Path) -> None:
    rows = [{"text": "a\nb"}, {"text": "ü", "images": []}, {"text": "", "other": [1]}, {"text": "x", "images": None}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\r\n \n")
    found = read(tmp_path / "a.jsonl")
    assert texts(found) == ["a\nb", "ü", "", "x"]
    assert [item.where.rpartition(":")[2] for item in found] == ["1", "3", "5", "7"]
    (tmp_path / "b.jsonl").write_text('{"body": "z"}')
    assert texts(read(tmp_path / "b.jsonl", column="body")) == ["z"]


def test_pictures_are_files_below_the_folder_of_the_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "images": ["a.png", "deep/b.png"]}))
    (document,) = read(tmp_path / "a.jsonl")
    assert isinstance(document, Document)
    assert document.images == (tmp_path / "a.png", tmp_path / "deep/b.png")


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "a/../../b.png", "", "a\0b", "\ud800.png"])
def test_pictures_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "images": [name]}))
    assert f"{tmp_path}/a.jsonl:1: " in reason(read(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "a', "is not valid JSON: Unterminated string starting at at column 10"),
        (b'["text"]', "is a JSON list, expected an object"),
        (b"{}", "has no 'text', but nothing"),
        (b'{"a": 1, "b": 2}', "has no 'text', but 'a', 'b'"),
        (b'{"text": null}', "the text is null"),
        (b'{"text": 3}', "the text is of type int"),
        (b'{"text": "a\\u0000b"}', "contains NUL at character 1: it is not text"),
        (b'{"text": "\\ud83d"}', "contains half of a surrogate pair"),
        (b'{"text": "a\xffb"}', "is not UTF-8: invalid start byte at byte 11 of the line"),
        (b'{"text": "a", "images": "a.png"}', "'images' is not a list of file names"),
        (b'{"text": "a", "images": [1]}', "'images' is not a list of file names"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, told: str) -> None:
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 2 + line + b"\n" + good)
    found = read(tmp_path / "a.jsonl")
    assert reason(found).startswith(f"{tmp_path}/a.jsonl:3: {told}")
    assert len(found) == 4


def test_a_text_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\xff\n")
    assert reason(read(tmp_path / "a.txt")) == f"{tmp_path}/a.txt:2: is not UTF-8: invalid start byte at byte 7"
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0\0")
    assert "contains NUL at character 4" in reason(read(tmp_path / "b.txt"))


def test_what_is_too_long_is_left_out_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    assert "a.txt: is longer than 100 bytes" in reason(read(tmp_path / "a.txt"))
    good = '{"text": "good"}\n'
    for length in (85, 189, 190, 191, 1000):
        (tmp_path / "b.jsonl").write_text(good + '{"text": "' + "x" * length + '"}\n' + good)
        found = read(tmp_path / "b.jsonl")
        assert "b.jsonl:2: " in reason(found) if length > 87 else len(texts(found)) == 3
        assert len(found) == 3
    (tmp_path / "c.jsonl").write_text("x" * 1000)
    assert "c.jsonl:1: is longer" in reason(read(tmp_path / "c.jsonl"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A Parquet file of three row groups, with an empty text and a null."""
    path = tmp_path / "a.parquet"
    values = [*(f"row {number}" for number in range(200)), "", None]
    parquet.write_table(pa.table({"text": values, "n": range(202)}), path, row_group_size=90)
    return path


def test_a_row_of_parquet_is_a_document(table: Path) -> None:
    found = read(table)
    assert [item.text for item in found if isinstance(item, Document)] == [f"row {n}" for n in range(200)] + [""]
    assert reason(found) == f"{table}:202: the text is null"


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_that_parquet_has_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), path)
    assert texts(read(path)) == ["a", "b", "a"]


def test_text_in_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    parquet.write_table(pa.table({"text": raw}), path)
    assert reason(read(path)) == f"{path}:2: is not UTF-8: invalid start byte at byte 0"


def test_parquet_without_the_column_or_damaged_is_refused(table: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'body', but 'n', 'text'"):
        read(table, column="body")
    data = bytearray(table.read_bytes())
    table.write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        read(table)
    data[4:200] = bytes(196)
    table.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(table)


def test_pictures_in_parquet_are_not_left_out_silently(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"], "images": [["a.png"]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has a column 'images', but images are read only from JSONL"):
        read(tmp_path / "a.parquet")


def test_folders_give_their_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.TXT", "a/b/c.jsonl", "c.png", ".hidden.txt", ".git/x.txt", "B.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "d.txt").symlink_to(tmp_path / "b.txt")
    found = [path.relative_to(tmp_path).as_posix() for path in files_of([tmp_path, tmp_path / "b.txt"])]
    assert found == ["B.parquet", "a/b/c.jsonl", "a/z.TXT", "b.txt", "d.txt", "b.txt"]


def special_files(folder: Path) -> Iterator[tuple[Path, type[Exception], str]]:
    (folder / "empty").mkdir()
    yield folder / "empty", DataError, "has no file that ends in .txt, .jsonl, .parquet"
    yield folder / "absent", DataError, "no such file or folder"
    (folder / "a.csv").touch()
    yield folder / "a.csv", UsageError, "ends in .csv, expected .txt, .jsonl, .parquet"
    os.mkfifo(folder / "a.txt")
    yield folder / "a.txt", DataError, "is not a readable file"
    (folder / "broken").mkdir()
    (folder / "broken/b.txt").symlink_to("nowhere")
    yield folder / "broken", DataError, "is a broken symlink"


def test_what_cannot_be_an_input_is_refused(tmp_path: Path) -> None:
    tried = 0
    for path, kind, told in special_files(tmp_path):
        with pytest.raises(kind, match=told):
            list(files_of([path]))
        tried += 1
    assert tried == 5


def test_a_data_set_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"body": f"text {n}"}) + "\n" for n in range(5)))
    found = list(read_dataset(str(tmp_path), "train", "body"))
    assert texts(found) == [f"text {n}" for n in range(5)]
    assert found[4].where == f"{tmp_path}[train]:5"
    with pytest.raises(DataError, match=r"\[train\]: has no column 'text', but 'body'"):
        list(read_dataset(str(tmp_path), "train", "text"))
    with pytest.raises(DataError, match=r"\[test\]: cannot be read as a data set: "):
        list(read_dataset(str(tmp_path), "test", "body"))


def test_without_the_extra_one_line_tells_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"datasets is not installed: pip install 't5g2convert\[adapt\]'"):
        list(read_dataset(str(tmp_path), "train", "text"))


def raised(*errors: Exception) -> Exception:
    """The last of these, with those before it behind it."""
    for behind, error in pairwise(errors):
        error.__cause__ = behind
    return errors[-1]


SPLITS = ValueError("Unknown split \"test\". Should be one of ['train', 'hf_secretsecret'].")
CONFIGS = ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (RuntimeError("you sent Bearer hf_secretsecret"), DataError, r"cannot be read as a data set \(RuntimeError\)$"),
        (SPLITS, DataError, r"has no such split \(--split takes one of train\)$"),
        (CONFIGS, DataError, r"several configurations, or none with that name \(--subset takes one of en, de\)$"),
        (raised(ConnectionError("hf_secretsecret"), ValueError("no data")), HubError, r"\(ConnectionError\)"),
    ],
)
def test_H6_of_a_data_set_of_the_hub_no_text_of_the_library_is_repeated(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[T5g2Error], told: str
) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind, match=told) as found:
        list(read_dataset("org/name", "train", "text"))
    assert "secret" not in str(found.value)
