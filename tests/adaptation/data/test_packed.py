import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t5g2convert import convert
from t5g2convert.adaptation.data import packed, pairs
from t5g2convert.adaptation.data.document_table import PICTURE
from t5g2convert.adaptation.data.documents import Document
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed, check_tokenizer
from t5g2convert.adaptation.data.pair_documents import PairDocument
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, and `data`, with three documents without images, two with images, and three pairs."""
    folder = tmp_path_factory.mktemp("made")
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "model", flush=False)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / name)
    documents = [
        PairDocument("6", ("in",), ("out",)),
        PairDocument("7", ("a", 253, "b", 253), ("c", 106), (folder / "a.png", folder / "b.png")),
        PairDocument("8", (2, "in"), ("out", 1)),
        Document("1", "one"),
        Document("2", "<start_of_image>red", (folder / "a.png",)),
        Document("3", "three"),
        Document("4", "both", (folder / "b.png", folder / "a.png")),
        Document("5", "five"),
    ]
    pack(folder / "model", folder / "data", documents, shard_tokens=7, flush=False)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy of the data that tests may damage."""
    shutil.copytree(made / "data", tmp_path / "data")
    return tmp_path / "data"


def test_documents_with_images_are_stored_separately(made: Path) -> None:
    packed = Packed.open(made / "data", verify=True)
    assert (packed.index.text.documents, packed.tokens, len(packed.images)) == (3, 15, 2)
    red, both = packed.images
    assert red.images == both.images[1:]
    assert [(image.ending, image.path.name) for image in both.images] == [("png", "pictures-00000.bin")] * 2
    assert [image.read().data for image in both.images] == [(made / name).read_bytes() for name in ("b.png", "a.png")]
    assert len(packed.images[-1].images) == 2 == len(packed.images[0:2])
    assert [document.tokens[document.split :].tolist()[-4:-1] for document in (red, both)] == [
        [86, 73, 72], [83, 88, 76]
    ]  # fmt: skip
    assert all(document.tokens[document.split - 1] == 254 for document in (red, both))
    assert 254 not in both.tokens[both.split :]
    with pytest.raises(IndexError):
        packed.images[2]
    for start, stop in ((-1, 2), (3, 2), (0, 16)):
        with pytest.raises(IndexError, match=f"tokens {start} to {stop} of 15"):
            packed.read(start, stop)


def test_another_process_opens_the_folder_again(data: Path) -> None:
    packed = Packed.open(data)
    text = pickle.dumps(packed)
    assert len(text) < 1000
    assert np.array_equal(pickle.loads(text).read(0, 15), packed.read(0, 15))
    index = data / "index.json"
    index.write_bytes(index.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"has sha256 \w+, expected"):
        pickle.loads(text)


FILES = [
    "text-00000.bin", "text-00002.bin", "text.doc", "image-00000.bin", "image.doc", "image.pic", "counts.bin",
    "pictures-00000.bin", "pair-00000.bin", "pair-00003.bin", "pair.doc", "pair.pic",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_of_another_size_is_named(data: Path, name: str) -> None:
    whole = (data / name).read_bytes()
    for damaged in (whole[:-1], whole + b"\0", b""):
        (data / name).write_bytes(damaged)
        message = rf"{name}: has {len(damaged)} bytes, but the index says {len(whole)}"
        with pytest.raises(DataError, match=message):
            Packed.open(data)
    (data / name).unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        Packed.open(data)


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_found_on_request(data: Path, name: str) -> None:
    path = data / name
    Packed.open(data, verify=True)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    Packed.open(data)
    with pytest.raises(DataError) as failed:
        Packed.open(data, verify=True)
    assert failed.value.details == (name,)


def test_several_processes_share_the_check_of_all_files(data: Path) -> None:
    packed = Packed.open(data)
    found: list[str] = []
    for path in (item for item in data.iterdir() if item.name != "index.json"):
        content = bytearray(path.read_bytes())
        content[16 if path.name in ("image.doc", "pair.doc") else 0] ^= 1  # its order stays right
        path.write_bytes(content)
    for part in range(3):
        with pytest.raises(DataError) as failed:
            packed.check_bytes(part=part, parts=3)
        found += failed.value.details
    assert sorted([*found, "index.json"]) == sorted(item.name for item in data.iterdir())


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([4, 4, 15], "document 1 ends before it begins"),
        ([9, 4, 15], "document 1 ends"),
        ([0, 4, 15], "document 0 ends"),
        ([4, 2**63, 15], "document 2 ends"),
        ([4, 10, 14], "the last document ends at 14, but the index says 15"),
    ],
)
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_ends_that_do_not_ascend_are_refused(
    data: Path, ends: list[int], message: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "CHECKED_AT_ONCE", at_once)
    (data / "text.doc").write_bytes(np.array(ends, "<u8").tobytes())
    with pytest.raises(DataError, match=message):
        Packed.open(data, verify=True)


def test_opening_reads_only_the_last_row_of_each_table(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also no image: the number of files that are opened or looked at does not depend on their number."""
    rows = []

    class Counted(np.ndarray):  # type: ignore[type-arg]
        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            rows.append(1 if np.ndim(found) == 0 else 0)
            return found

    mapped = packed.mapped_array
    for module in (packed, pairs):
        monkeypatch.setattr(module, "mapped_array", lambda *arguments: mapped(*arguments).view(Counted))
    monkeypatch.setattr(packed, "sha256_of", None)
    Packed.open(data)
    assert sum(rows) == 5


def table(data: Path) -> Any:
    return np.fromfile(data / "image.doc", "<u8").reshape(-1, 3)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (0, 0, 2**63, "document 0: ends before it begins"),
        (0, 0, 10**6, "document 0: ends before it begins"),
        (0, 1, 0, "document 0: ends before it begins"),
        (0, 1, 4, "document 0: ends before it begins"),
        (0, 1, 2, "document 0: has 2 images and 1 end-of-image tokens"),
        (0, 2, 3, r"document 0: has its target at 3, but its last image ends at \d+"),
    ],
)
def test_a_wrong_row_of_a_document_with_images_is_refused_when_it_is_read(
    data: Path, row: int, column: int, value: int, message: str
) -> None:
    rows = table(data)
    rows[row, column] = value
    rows.tofile(data / "image.doc")
    opened = Packed.open(data)
    with pytest.raises(DataError, match=message):
        opened.images[row]


def test_sizes_of_documents_with_images_are_those_of_their_tokens(data: Path) -> None:
    images = Packed.open(data).images
    expected = [[each.split, len(each.tokens) - each.split, len(each.images)] for each in images]
    assert images.sizes(0, 2).tolist() == expected
    assert images.sizes(1, 2).tolist() == expected[1:]
    for column, value in ((0, 2**63), (0, 10**6), (1, 2**63), (1, 0), (2, 0), (2, 1000), (2, 2**63)):
        rows = table(data)
        kept = rows.copy()
        rows[0, column] = value
        rows.tofile(data / "image.doc")
        with pytest.raises(DataError, match=r"image\.doc: document [01]: ends before it begins, or its target"):
            Packed.open(data).images.sizes(0, 2)
        kept.tofile(data / "image.doc")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ending", b"/../", r"image\.pic: image 0 ends in '/../'"),
        ("shard", 1, "image 0 is not inside a shard"),
        ("offset", 10**6, "image 0 is not inside a shard"),
        ("nbytes", 2**64 - 1, "image 0 is not inside a shard"),
    ],
)
def test_an_image_outside_its_shard_is_refused(data: Path, field: str, value: Any, message: str) -> None:
    rows = np.fromfile(data / "image.pic", PICTURE)
    rows[field][0] = value
    rows.tofile(data / "image.pic")
    with pytest.raises(DataError, match=message):
        Packed.open(data).images[0]


def test_an_image_that_was_modified_is_refused_when_it_is_read(data: Path) -> None:
    image = Packed.open(data).images[1].images[0]
    content = bytearray(image.path.read_bytes())
    content[image.offset] ^= 1
    image.path.write_bytes(content)
    with pytest.raises(DataError, match=rf"image at byte {image.offset}: was modified after packing"):
        image.read()
    image.path.unlink()
    with pytest.raises(DataError, match=r"pictures-00000\.bin: cannot be read: No such file"):
        image.read()


def change(path: Path, act: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    act(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda index: index.update(format=1), "has format 1, but this version of t5g2 reads formats 2 and 3"),
        (lambda index: index["pictures"].update(nbytes=1), "of pictures have [0-9]+ bytes, but the index says 1"),
        (lambda index: index.update(format=2), "is not an index of packed data: Value error, format 2 has no pairs"),
        (lambda index: index["pair"].pop("places"), r"is not an index of packed data: pair\.places"),
        (lambda index: index.pop("text"), "is not an index of packed data: text"),
        (lambda index: index.update(more=1), "is not an index of packed data: more"),
        (lambda index: index["text"].update(tokens="15"), r"is not an index of packed data: text\.tokens"),
        (lambda index: index["text"].update(tokens=-1), r"is not an index of packed data: text\.tokens"),
        (lambda index: index["text"].update(tokens=16), "have 15 tokens, but the index says 16"),
        (lambda index: index["text"].update(ends="x"), r"is not an index of packed data: text\.ends"),
        (lambda index: index["special"].update(eos=1), "is not an index of packed data: special"),
    ],
)
def test_an_invalid_index_is_refused(data: Path, act: Callable[[dict[str, Any]], object], message: str) -> None:
    change(data / "index.json", act)
    with pytest.raises(DataError, match=message):
        Packed.open(data)


def test_a_folder_without_packed_data_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent/index\.json: is missing: this is not a folder of packed data"):
        Packed.open(tmp_path / "absent")
    with pytest.raises(DataError, match=r"got an address \(https://\.\.\.\)"):
        Packed.open(Path("https://x/y"))
    (data / "index.json").write_text("{")
    with pytest.raises(DataError, match="is not an index of packed data"):
        Packed.open(data)


def test_data_belongs_to_a_tokenizer_and_to_special_tokens(made: Path, tmp_path: Path) -> None:
    packed = Packed.open(made / "data")
    check_tokenizer(packed, made / "model")
    shutil.copytree(made / "model", tmp_path / "model")
    tokenizer = tmp_path / "model/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(DataError, match="was packed with the tokenizer"):
        check_tokenizer(packed, tmp_path / "model")
    shutil.copy(made / "model/tokenizer.json", tokenizer)
    change(tmp_path / "model/config.json", lambda config: config["encoder"].update(eoi_token_index=250))
    with pytest.raises(DataError, match=r"with other tokens \(data and model\): eoi 254 and 250"):
        check_tokenizer(packed, tmp_path / "model")


def test_pairs_are_complete_as_the_model_will_see_them(made: Path) -> None:
    """The demo's images have 4 tokens (255) between 253 and 254; bos is 2 and eos 1."""
    opened = Packed.open(made / "data", verify=True)
    picture = [253, 255, 255, 255, 255, 254]
    first, second, third = opened.pairs
    assert (first.source.tolist(), first.target.tolist()) == ([2, 77, 82], [83, 89, 88, 1])
    assert (third.source.tolist(), third.target.tolist()) == ([2, 77, 82], [83, 89, 88, 1])
    assert second.source.tolist() == [2, 69, *picture, 70, *picture]
    assert second.target.tolist() == [71, 106, 1]
    assert [image.read().data for image in second.images] == [(made / name).read_bytes() for name in ("a.png", "b.png")]
    assert second.images == opened.images[1].images[::-1]
    assert first.images == () == third.images
    assert opened.pairs.sizes(0, 3).tolist() == [[3, 4, 0], [15, 3, 2], [3, 4, 0]]
    assert opened.pairs.sizes(1, 2).tolist() == [[15, 3, 2]]
    assert len(opened.pairs[1:]) == 2
    assert opened.pairs[-1].source.tolist() == [2, 77, 82]
    assert (opened.index.pair.documents, opened.index.pair.tokens, opened.index.pair.places) == (3, 32, 2)
    assert opened.index.pictures.images == 2


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (0, 0, 0, "document 0: ends before it begins"),
        (1, 0, 2**63, "document 1: ends before it begins"),
        (1, 1, 3, "document 1: ends before it begins"),
        (1, 1, 1, "document 1: has 1 images and 2 end-of-image tokens"),
        (2, 1, 1, "document 2: ends before it begins"),
        (0, 2, 0, "document 0: has its target at 0 of 7, or an image in it"),
        (0, 2, 7, "document 0: has its target at 7 of 7, or an image in it"),
        (1, 2, 14, "document 1: has its target at 14 of 18, or an image in it"),
    ],
)
def test_a_wrong_row_of_a_pair_is_refused_when_it_is_read(
    data: Path, row: int, column: int, value: int, message: str
) -> None:
    rows = np.fromfile(data / "pair.doc", "<u8").reshape(-1, 3)
    opened = Packed.open(data)
    rows[row, column] = value
    rows.tofile(data / "pair.doc")
    with pytest.raises(DataError, match=message):
        opened.pairs[row]
    with pytest.raises(DataError, match=r"pair\.doc: document|were modified after packing"):
        opened.check_bytes()


def test_sizes_of_wrong_rows_of_pairs_are_refused(data: Path) -> None:
    for column, value in ((0, 2**63), (0, 10**6), (1, 2**63), (2, 0), (2, 1000), (2, 2**63)):
        rows = np.fromfile(data / "pair.doc", "<u8").reshape(-1, 3)
        kept = rows.copy()
        rows[1, column] = value
        rows.tofile(data / "pair.doc")
        with pytest.raises(DataError, match=r"pair\.doc: document [12]: ends before it begins, or its target"):
            Packed.open(data).pairs.sizes(0, 3)
        kept.tofile(data / "pair.doc")


def test_data_of_the_format_before_pairs_is_read(data: Path, made: Path) -> None:
    def older(index: dict[str, Any]) -> None:
        index["format"] = 2
        del index["pair"]

    for path in data.glob("pair*"):
        path.unlink()
    change(data / "index.json", older)
    opened = Packed.open(data, verify=True)
    assert len(opened.pairs) == 0
    assert opened.pairs.sizes(0, 0).tolist() == []
    assert (opened.index.text.documents, len(opened.images)) == (3, 2)
    more = [PairDocument("1", ("x",), ("y",)), Document("2", "z", (made / "a.png",))]
    pack(made / "model", data, more, append=True, flush=False)
    opened = Packed.open(data, verify=True)
    assert (opened.index.format, len(opened.pairs), len(opened.images), opened.index.pictures.images) == (3, 1, 3, 2)
    older_again = made / "model", data, [Document("1", "x")]
    pack(*older_again, overwrite=True, flush=False)
    assert Packed.open(data, verify=True).index.pair.documents == 0
