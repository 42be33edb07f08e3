import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.pair_documents import PairDocument
from t5g2convert.adaptation.data.rows import Document, Fault
from t5g2convert.errors import DataError, OutputError, UsageError
from tests.adaptation.data.killed import killed_at
from tests.folders import contents

Given = Sequence[Document | PairDocument | Fault]


@pytest.fixture
def given(tmp_path: Path) -> list[Document | PairDocument]:
    """Ten documents without images and seven with one of three images, in turns, with a pair after every third."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / f"in/{name}.png" for name in ("red", "blue", "green")]
    for path in paths:
        Image.new("RGB", (8, 8), path.stem).save(path)
    texts = [Document(f"t:{number}", f"document {number} " * (number + 1)) for number in range(10)]
    pictured = [Document(f"p:{number}", f"picture {number}", (paths[number * 2 % 3],)) for number in range(7)]
    found: list[Document | PairDocument] = []
    for number, document in enumerate([each for both in zip(texts, pictured, strict=False) for each in both]):
        found.append(document)
        if number % 3 == 2:
            images = (paths[number % 2],) * (number % 2)
            source = ("pair", *[253] * len(images), str(number))
            found.append(PairDocument(f"q:{number}", source, ("target " * number,), images))
    return found + texts[7:]


Stored = list[tuple[list[int], int, list[bytes]]]


def read_back(folder: Path) -> tuple[list[list[int]], Stored, Stored]:
    """Return all documents without images, and with their targets and images those with images, and pairs."""
    packed = Packed.open(folder, verify=True)
    ends = np.fromfile(folder / "text.doc", "<u8").tolist()
    texts = [packed.read(start, stop).tolist() for start, stop in zip([0, *ends], ends, strict=False)]
    pictured = [(one.tokens.tolist(), one.split, [it.read().data for it in one.images]) for one in packed.images]
    pairs = [
        ([*one.source.tolist(), *one.target.tolist()], len(one.source), [it.read().data for it in one.images])
        for one in packed.pairs
    ]
    return texts, pictured, pairs


@pytest.mark.parametrize("cut", [1, 2, 4, 9, 16])
def test_append_has_the_documents_images_and_counts_of_one_packing(
    model: Path, tmp_path: Path, given: list[Document | PairDocument], cut: int
) -> None:
    whole = pack(model, tmp_path / "whole", given, shard_tokens=40, flush=False)
    pack(model, tmp_path / "out", given[:cut], shard_tokens=40, flush=False)
    done = pack(model, tmp_path / "out", given[cut:], shard_tokens=40, append=True, flush=True)
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")
    same = {"text.doc", "image.doc", "pair.doc", "counts.bin"}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in same} == {
        name: (tmp_path / "whole" / name).read_bytes() for name in same
    }
    for name in (
        "documents",
        "tokens",
        "image_documents",
        "image_tokens",
        "images",
        "pairs",
        "pair_tokens",
        "empty",
        "highest",
        "special",
    ):
        assert done.to_json()[name] == whole.to_json()[name]
    assert done.index.pictures.nbytes == whole.index.pictures.nbytes
    assert Packed.open(tmp_path / "out").sha256 == done.sha256


def test_shards_are_linked_and_data_that_a_run_reads_stays_as_it_is(
    model: Path, tmp_path: Path, given: list[Document | PairDocument]
) -> None:
    out = tmp_path / "out"
    pack(model, out, given[:9], shard_tokens=40, flush=False)
    shards = {path.name: (path.stat().st_ino, path.read_bytes()) for path in out.glob("*.bin")}
    del shards["counts.bin"]
    assert {name.split("-")[0] for name in shards} == {"text", "image", "pair", "pictures"}
    reading, expected = Packed.open(out), read_back(out)
    pack(model, out, given[9:], shard_tokens=1000, append=True, flush=False)
    for name, found in shards.items():
        assert ((out / name).stat().st_ino, (out / name).read_bytes()) == found
    starts = [0, *np.cumsum([len(text) for text in expected[0]]).tolist()]
    assert [reading.read(start, stop).tolist() for start, stop in pairwise(starts)] == expected[0]
    assert [(one.tokens.tolist(), one.split, [it.read().data for it in one.images]) for one in reading.images] == (
        expected[1]
    )
    with pytest.raises(DataError, match="has sha256 "):
        Packed.open(out, sha256=reading.sha256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_shards_are_copied_where_the_file_system_has_no_links(
    model: Path, tmp_path: Path, given: list[Document | PairDocument], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for name in ("linked", "copied"):
        pack(model, tmp_path / name, given[:9], shard_tokens=40, flush=False)
    pack(model, tmp_path / "linked", given[9:], shard_tokens=40, append=True, flush=False)
    monkeypatch.setattr(os, "link", refuse)
    pack(model, tmp_path / "copied", given[9:], shard_tokens=40, append=True, flush=False)
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")


def test_skipped_and_empty_documents_of_both_packings_are_listed(model: Path, tmp_path: Path) -> None:
    bad = [Document("a", "x"), Fault("b", "is not UTF-8"), Document("c", " ")]
    out = tmp_path / "out"
    pack(model, out, bad, skip_bad=1, flush=False)
    pack(model, out, [Document("d", "y")], append=True, flush=False)
    pack(model, out, [Document("e", " "), Document("f", "y"), Fault("g", "h")], append=True, skip_bad=1, flush=False)
    index = Packed.open(out, verify=True).index
    assert index.empty == 2
    assert index.skipped is not None
    assert index.skipped.documents == 2
    lines = (out / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in lines] == ["b", "g"]


def test_an_append_that_does_not_fit_changes_nothing(
    model: Path, tmp_path: Path, given: list[Document | PairDocument]
) -> None:
    out, text = tmp_path / "out", [Document("a", "b")]
    pack(model, out, given[:9], flush=False)
    before = contents(out)

    def refused(
        error: type[Exception], match: str, documents: Given = text, model: Path = model, **options: bool
    ) -> None:
        with pytest.raises(error, match=match):
            pack(model, out, documents, **{"append": True, "flush": False, **options})
        assert contents(out) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]

    refused(DataError, "was packed with --no-bos", bos=True)
    refused(UsageError, "either --append or --overwrite", overwrite=True)
    refused(OutputError, "exists and is not empty", append=False)
    refused(DataError, r"no document can be packed \(0 empty\)", [])
    refused(DataError, r"no document can be packed \(1 empty\)", [Document("a", " ")])
    refused(DataError, "is not UTF-8", [*text, Fault("b", "is not UTF-8")])
    other = tmp_path / "in/model"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    config["decoder"]["pad_token_id"] = 7
    (other / "config.json").write_text(json.dumps(config))
    refused(DataError, "model with other tokens", model=other)
    shutil.copy(model / "config.json", other)
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer + "\n")
    refused(DataError, "was packed with the tokenizer", model=other)


@pytest.mark.parametrize(
    "name", ["text.doc", "image.doc", "image.pic", "pair.doc", "pair.pic", "counts.bin", "skipped.jsonl"]
)
def test_tables_that_were_modified_are_refused(
    model: Path, tmp_path: Path, given: list[Document | PairDocument], name: str
) -> None:
    out = tmp_path / "out"
    pack(model, out, [*given, Fault("a", "is not UTF-8")], skip_bad=1, flush=False)
    data = bytearray((out / name).read_bytes())
    data[0] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(DataError, match="was modified after packing: its sha256 differs"):
        pack(model, out, [Document("a", "b")], append=True, flush=False)
    assert (out / name).read_bytes() == data


def test_only_packed_data_is_appended_to(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/novel.txt").write_text("Call me Ishmael.")
    (tmp_path / "empty").mkdir()
    for name, error in (("texts", OutputError), ("empty", DataError), ("missing/below", DataError)):
        with pytest.raises(error, match=r"other files than packed data|this is not a folder of packed data"):
            pack(model, tmp_path / name, [Document("a", "b")], append=True, flush=False)
    assert contents(tmp_path) == {"texts/novel.txt": b"Call me Ishmael."}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "texts"]


@pytest.mark.parametrize("call", ["link", "rename", "fsync", "rmdir"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_data(
    model: Path, tmp_path: Path, given: list[Document | PairDocument], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for name in ("old", "new"):
        pack(model, tmp_path / name, given[:9], shard_tokens=100, flush=False)
    pack(model, tmp_path / "new", given[9:], shard_tokens=100, append=True, flush=False)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    folder, kills, found_old = tmp_path / "work", 0, 0
    for number in range(1, 30):
        folder.mkdir()
        out = folder / "out"
        pack(model, out, given[:9], shard_tokens=100, flush=False)
        if not killed_at(os, call, number, lambda out=out: pack(model, out, given[9:], shard_tokens=100, append=True)):
            break
        kills += 1
        # Between two renames, the old data has the name of a work folder.
        assert contents(out if out.exists() else folder / ".out.t5g2-old") in (old, new)
        # The next packing puts old data back that was being replaced.
        with pytest.raises(DataError, match="no document can be packed"):
            pack(model, out, [], append=True, flush=False)
        assert contents(out) in (old, new)
        # Replaced data that was being removed goes at the next commit.
        assert {path.name for path in folder.iterdir()} <= {"out", ".out.t5g2-removed"}
        if contents(out) == old:
            found_old += 1
            pack(model, out, given[9:], shard_tokens=100, append=True, flush=False)
            assert list(folder.iterdir()) == [out]
        assert contents(out) == new
        shutil.rmtree(folder)
    assert kills >= {"link": 4, "rename": 3, "fsync": 8, "rmdir": 1}[call]
    assert found_old >= {"link": 4, "rename": 2, "fsync": 8, "rmdir": 0}[call]


def test_an_interrupted_append_leaves_the_old_data(
    model: Path, tmp_path: Path, given: list[Document | PairDocument]
) -> None:
    out = tmp_path / "out"
    pack(model, out, given[:9], flush=False)
    before = contents(out)

    def stopped() -> Iterator[Document]:
        yield from given[9:]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(model, out, stopped(), append=True, flush=False)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_append_that_is_done_is_not_made_again_by_resume(model: Path, tmp_path: Path, given: Given) -> None:
    out = tmp_path / "out"
    pack(model, out, given[:6], flush=False)
    done = pack(model, out, given[6:], append=True, resume=True, flush=False)
    before = contents(out)
    again = pack(model, out, given[6:], append=True, resume=True, flush=False)
    assert again.notes == ("these documents were appended before",)
    assert (again.sha256, again.index) == (done.sha256, done.index)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    # Other documents are new, and so are the same without --resume.
    assert pack(model, out, given[5:], append=True, resume=True, flush=False).sha256 != done.sha256
    assert pack(model, out, given[5:], append=True, flush=False).index.pair.documents > done.index.pair.documents
