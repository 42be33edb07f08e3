import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from t5g2convert.adaptation.data import documents
from t5g2convert.adaptation.data.dataset_rows import read_dataset
from t5g2convert.adaptation.data.documents import files_of, read_files, unread_endings
from t5g2convert.adaptation.data.image_columns import IMAGE_KEYS, ImageBytes
from t5g2convert.adaptation.data.rows import Document, Fault
from t5g2convert.errors import DataError, HubError, T5g2Error, UsageError


def read(*paths: Path, column: str = "text") -> list[Document | Fault]:
    progress: list[int] = []
    found = list(read_files(paths, column, progress.append))
    assert sum(progress) == sum(path.stat().st_size for path in files_of(paths)), "progress comes to the end"
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


def test_a_jsonl_line_is_a_document_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": "a\nb"}, {"text": "ü", "images": []}, {"text": "", "other": [1]}, {"text": "x", "images": None}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\r\n \n")
    found = read(tmp_path / "a.jsonl")
    assert texts(found) == ["a\nb", "ü", "", "x"]
    assert [item.where.rpartition(":")[2] for item in found] == ["1", "3", "5", "7"]
    (tmp_path / "b.jsonl").write_text('{"body": "z"}')
    assert texts(read(tmp_path / "b.jsonl", column="body")) == ["z"]


def test_images_are_files_below_the_folder_of_the_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "images": ["a.png", "deep/b.png"]}))
    (document,) = read(tmp_path / "a.jsonl")
    assert isinstance(document, Document)
    assert document.images == (tmp_path / "a.png", tmp_path / "deep/b.png")


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "a/../../b.png", "", "a\0b", "\ud800.png"])
def test_images_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "images": [name]}))
    assert f"{tmp_path}/a.jsonl:1: " in reason(read(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
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
        (b'{"text": "a", "images": [1]}', "'images' is not a file name, or a list of them"),
        (b'{"text": "a", "image": {"path": null}}', "'image' is not a file name, or a list of them"),
        (b'{"text": "a", "image": "a.png", "images": ["b.png"]}', "has images under several keys: 'image', 'images'"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 2 + line + b"\n" + good)
    found = read(tmp_path / "a.jsonl")
    assert reason(found).startswith(f"{tmp_path}/a.jsonl:3: {message}")
    assert len(found) == 4


def test_an_invalid_text_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\xff\n")
    assert reason(read(tmp_path / "a.txt")) == f"{tmp_path}/a.txt:2: is not UTF-8: invalid start byte at byte 7"
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0\0")
    assert "contains NUL at character 4" in reason(read(tmp_path / "b.txt"))


def test_a_document_that_is_too_long_is_skipped_without_being_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    """A Parquet file with three row groups, an empty text and a null."""
    path = tmp_path / "a.parquet"
    values = [*(f"row {number}" for number in range(200)), "", None]
    parquet.write_table(pa.table({"text": values, "n": range(202)}), path, row_group_size=90)
    return path


def test_a_parquet_row_is_a_document(table: Path) -> None:
    found = read(table)
    assert [item.text for item in found if isinstance(item, Document)] == [f"row {n}" for n in range(200)] + [""]
    assert reason(found) == f"{table}:202: the text is null"


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_text_type_of_parquet_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), path)
    assert texts(read(path)) == ["a", "b", "a"]


def test_invalid_text_in_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    parquet.write_table(pa.table({"text": raw}), path)
    assert reason(read(path)) == f"{path}:2: is not UTF-8: invalid start byte at byte 0"


def test_parquet_that_is_damaged_or_lacks_the_column_is_refused(table: Path) -> None:
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


@pytest.mark.parametrize("key", IMAGE_KEYS)
def test_every_image_key_is_read(key: str, tmp_path: Path) -> None:
    rows = [{"text": "x", key: "a.png"}, {"text": "x", key: ["a.png", "b.png"]}, {"text": "x", key: {"path": "a.png"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three = read(tmp_path / "a.jsonl")
    assert isinstance(one, Document)
    assert isinstance(two, Document)
    assert isinstance(three, Document)
    assert one.images == three.images == (tmp_path / "a.png",)
    assert two.images == (tmp_path / "a.png", tmp_path / "b.png")


def test_the_rows_of_an_image_folder_name_their_files(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "a.png", "text": "a cat"})
    for name in ("metadata.jsonl", "other.jsonl"):
        (tmp_path / name).write_text(row)
    image_folder, other = read(tmp_path / "metadata.jsonl", tmp_path / "other.jsonl")
    assert image_folder == Document(f"{tmp_path}/metadata.jsonl:1", "a cat", (tmp_path / "a.png",))
    assert other == Document(f"{tmp_path}/other.jsonl:1", "a cat")


def test_images_in_parquet_are_files_or_bytes(tmp_path: Path) -> None:
    images = [[{"bytes": b"1", "path": "one.png"}], [{"bytes": None, "path": "two.png"}], None, []]
    parquet.write_table(pa.table({"text": ["a", "b", "c", "d"], "images": images}), tmp_path / "a.parquet")
    found = [document.images for document in read(tmp_path / "a.parquet") if isinstance(document, Document)]
    assert found == [(ImageBytes("one.png", b"1"),), (tmp_path / "two.png",), (), ()]


def test_images_of_a_data_set_are_read_with_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"images/{name}.png")
    (tmp_path / "images/metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{name}.png", "text": f"all {name}"}) + "\n" for name in ("red", "blue"))
    )
    found = {}
    for document in read_dataset(str(tmp_path / "images"), "train", "text"):
        assert isinstance(document, Document)
        (image,) = document.images
        found[document.text] = image.data if isinstance(image, ImageBytes) else image.read_bytes()
    assert found == {f"all {name}": (tmp_path / f"images/{name}.png").read_bytes() for name in ("red", "blue")}


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_files_are_read(ending: str, tmp_path: Path) -> None:
    compress = COMPRESSIONS[ending]
    rows = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(3000))
    (tmp_path / f"a.jsonl{ending}").write_bytes(compress(rows.encode()))
    (tmp_path / f"b.txt{ending}").write_bytes(compress("one ä\n".encode()))
    assert texts(read(tmp_path)) == [*(f"row {number}" for number in range(3000)), "one ä\n"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_a_compressed_file_that_is_cut_short_is_refused(ending: str, tmp_path: Path) -> None:
    whole = COMPRESSIONS[ending](os.urandom(40_000).hex().encode() + b"\n")
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+: cannot be decompressed: "):
        read(tmp_path)


def test_other_files_of_a_folder_are_counted_by_their_ending(tmp_path: Path) -> None:
    for name in ("a.txt", "b.png", "deep/c.PNG", "d.parquet.gz", "README", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert unread_endings([tmp_path, tmp_path / "a.txt"]) == {".png": 2, ".gz": 1, "no ending": 1}


def test_files_of_a_folder_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.TXT", "a/b/c.jsonl", "c.png", ".hidden.txt", ".git/x.txt", "B.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "d.txt").symlink_to(tmp_path / "b.txt")
    found = [path.relative_to(tmp_path).as_posix() for path in files_of([tmp_path, tmp_path / "b.txt"])]
    assert found == ["B.parquet", "a/b/c.jsonl", "a/z.TXT", "b.txt", "d.txt", "b.txt"]


def special_files(folder: Path) -> Iterator[tuple[Path, type[Exception], str]]:
    (folder / "empty").mkdir()
    yield folder / "empty", DataError, "has no file that ends in .txt, .jsonl, .csv, .parquet"
    yield folder / "absent", DataError, "no such file or folder"
    (folder / "a.tsv").touch()
    yield folder / "a.tsv", UsageError, "ends in .tsv, expected .txt, .jsonl, .csv, .parquet"
    os.mkfifo(folder / "a.txt")
    yield folder / "a.txt", DataError, "is not a readable file"
    (folder / "broken").mkdir()
    (folder / "broken/b.txt").symlink_to("nowhere")
    yield folder / "broken", DataError, "is a broken symlink"


def test_invalid_inputs_are_refused(tmp_path: Path) -> None:
    tried = 0
    for path, kind, message in special_files(tmp_path):
        with pytest.raises(kind, match=message):
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


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"datasets is not installed: pip install '\.\[adapt\]'"):
        list(read_dataset(str(tmp_path), "train", "text"))


def chained(*errors: Exception) -> Exception:
    """Return the last error; each is caused by the one before."""
    for cause, error in pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


SPLITS = ValueError("Unknown split \"test\". Should be one of ['train', 'hf_secretsecret'].")
CONFIGS = ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("you sent Bearer hf_secretsecret"), DataError, r"cannot be read as a data set \(RuntimeError\)$"),
        (SPLITS, DataError, r"has no such split \(--split takes one of train\)$"),
        (CONFIGS, DataError, r"several configurations, or none with that name \(--subset takes one of en, de\)$"),
        (chained(ConnectionError("hf_secretsecret"), ValueError("no data")), HubError, r"\(ConnectionError\)"),
    ],
)
def test_H6_errors_of_the_library_are_not_quoted_for_a_data_set_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[T5g2Error], message: str
) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind, match=message) as found:
        list(read_dataset("org/name", "train", "text"))
    assert "secret" not in str(found.value)
