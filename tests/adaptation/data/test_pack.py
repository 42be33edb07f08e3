import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from t5g2convert.adaptation.data import document_batches, packed_writer
from t5g2convert.adaptation.data.document_batches import MAX_FAULTS
from t5g2convert.adaptation.data.image_columns import ImageBytes
from t5g2convert.adaptation.data.pack import Packing, pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.rows import Document, Fault
from t5g2convert.errors import DataError, Interrupted, MachineError, OutputError, UsageError
from tests.folders import contents, largest_file

EOS, BOS = 1, 2
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34)


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(f"texts:{number}", text) for number, text in enumerate(texts, 1)]


def pack_texts(model: Path, output: Path, texts: Sequence[str], **options: int) -> Packing:
    return pack(model, output, documents(texts), flush=False, **options)


def decoded(packed: Packed, model: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    starts = [0, *np.fromfile(packed.folder / "text.doc", "<u8").tolist()]
    pieces = [packed.read(start, stop) for start, stop in pairwise(starts)]
    assert all(piece[-1] == EOS for piece in pieces)
    return [tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


@pytest.mark.parametrize("shard_tokens", [1, 2, 3, 7, 22, 95, 96, 1000])
def test_packed_documents_are_read_back_wherever_shards_end(model: Path, tmp_path: Path, shard_tokens: int) -> None:
    texts = ["ab" * (length // 2) + "c" * (length % 2) for length in LENGTHS]
    done = pack_texts(model, tmp_path / "out", texts, shard_tokens=shard_tokens)
    packed = Packed.open(tmp_path / "out", verify=True)
    assert packed.tokens == sum(LENGTHS) + len(LENGTHS) == 95
    assert len(packed.text.paths) == -(-95 // shard_tokens) == done.to_json()["shards"]
    assert decoded(packed, model) == texts
    whole = packed.read(0, 95)
    for start in range(0, 96, 5):
        for stop in range(start, 96, 3):
            assert np.array_equal(packed.read(start, stop), whole[start:stop])
    assert packed.highest == int(whole.max())
    assert packed.index.special == {str(EOS): len(LENGTHS)}
    assert np.array_equal(packed.counts, np.bincount(whole, minlength=256))


def test_bos_precedes_each_document_on_request(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "out", documents(["ab", "c"]), bos=True, flush=False)
    packed = Packed.open(tmp_path / "out")
    assert packed.read(0, packed.tokens).tolist() == [BOS, 69, 70, EOS, BOS, 71, EOS]
    assert packed.index.bos
    assert json.loads((tmp_path / "out/index.json").read_text())["special"] == {"1": 2, "2": 2}


@pytest.fixture
def mixed(tmp_path: Path) -> list[Document]:
    """Documents with and without images."""
    paths = []
    for name in ("red", "blue", "green"):
        (tmp_path / "in").mkdir(exist_ok=True)
        paths.append(tmp_path / f"in/{name}.png")
        Image.new("RGB", (8, 8), name).save(paths[-1])
    return [
        *documents([f"document {number} " * number for number in range(1, 30)]),
        *(Document(f"p:{number}", f"picture {number}", (paths[number % 3],)) for number in range(7)),
    ]


def test_the_same_input_gives_the_same_bytes_however_it_is_cut_into_batches(
    model: Path, tmp_path: Path, mixed: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(model, tmp_path / "a", mixed, shard_tokens=100, flush=False)
    expected = contents(tmp_path / "a")
    assert len(expected) > 50
    assert [name for name in expected if name.startswith("pictures-")] == ["pictures-00000.bin"]
    for number, (characters, count) in enumerate([(1, 4096), (50, 4096), (1 << 20, 5)]):
        monkeypatch.setattr(document_batches, "BATCH_CHARACTERS", characters)
        monkeypatch.setattr(document_batches, "BATCH_DOCUMENTS", count)
        pack(model, tmp_path / str(number), mixed, shard_tokens=100, flush=True)
        assert contents(tmp_path / str(number)) == expected


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    model: Path, tmp_path: Path, mixed: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_batches, "BATCH_DOCUMENTS", 3)
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/red.png").read_bytes()[:40])
    given = [Fault("a:1", "is not UTF-8"), *mixed[:9], Document("a:2", "x", (tmp_path / "in/cut.png",)), *mixed[9:]]
    done = [
        pack(model, tmp_path / f"{workers}", given, workers=workers, skip_bad=2, shard_tokens=100, flush=False)
        for workers in (0, 1, 3)
    ]
    assert len({(each.sha256, each.notes) for each in done}) == 1
    assert done[0].to_json()["skipped"] == 2
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_worker_that_dies_ends_the_packing_and_leaves_nothing(
    model: Path, tmp_path: Path, mixed: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_batches, "BATCH_DOCUMENTS", 3)

    def killing() -> Iterator[Document]:
        for number, document in enumerate(mixed):
            if number == 20:
                multiprocessing.active_children()[0].kill()
            yield document

    with pytest.raises(MachineError, match="a worker process of pack died") as failed:
        pack(model, tmp_path / "new/out", killing(), workers=2, flush=False)
    assert failed.value.exit_code == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert not multiprocessing.active_children()


HOSTILE = ["<eos>", "<bos>a<eos>b", "<pad>", "<unk>", "<start_of_image>", "<image_soft_token>x<end_of_image>"]


def test_names_of_special_tokens_in_texts_stay_text(model: Path, tmp_path: Path) -> None:
    pack_texts(model, tmp_path / "out", HOSTILE)
    packed = Packed.open(tmp_path / "out")
    assert decoded(packed, model) == HOSTILE
    assert packed.index.special == {str(EOS): len(HOSTILE)}, "the eos that ends each, and nothing else"
    assert not packed.counts[253:].any()


def test_unknown_tokens_are_counted(model: Path, tmp_path: Path) -> None:
    pack_texts(model, tmp_path / "out", ["aäöb", "ß"])
    assert Packed.open(tmp_path / "out").index.special == {str(EOS): 2, "3": 2}


def test_empty_documents_are_skipped_and_counted(model: Path, tmp_path: Path) -> None:
    done = pack_texts(model, tmp_path / "out", ["", "a", " \n\t", "b"])
    assert (done.index.empty, done.index.text.documents) == (2, 2)
    for texts in ([], ["", " "]):
        with pytest.raises(DataError, match=rf"no document can be packed \({len(texts)} empty\)"):
            pack_texts(model, tmp_path / "other", texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def with_tokenizer(model: Path, folder: Path, section: str, value: dict[str, object]) -> Path:
    """Write a copy of the model with another section in its tokenizer.json."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document[section] = {**(document[section] or {}), **value}
    path.write_text(json.dumps(document))
    return folder


def test_a_text_that_still_becomes_a_special_token_is_named(model: Path, tmp_path: Path) -> None:
    other = with_tokenizer(model, tmp_path / "model", "model", {"ignore_merges": True})
    with pytest.raises(DataError, match=r"texts:2: contains the special token 1 \(<eos>\)"):
        pack_texts(other, tmp_path / "out", ["a", "<eos>", "b"])


def test_a_text_without_any_token_is_empty(model: Path, tmp_path: Path) -> None:
    nothing = {"type": "Replace", "pattern": {"Regex": "x+"}, "content": ""}
    other = with_tokenizer(model, tmp_path / "model", "normalizer", nothing)
    index = pack_texts(other, tmp_path / "out", ["a", "xxx"]).index
    assert (index.empty, index.text.documents) == (1, 1)


def test_all_documents_that_cannot_be_packed_are_named(model: Path, tmp_path: Path, mixed: list[Document]) -> None:
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/red.png").read_bytes()[:40])
    red, cut = tmp_path / "in/red.png", tmp_path / "in/cut.png"
    bad = [
        Document("a:1", "x", (cut,)),
        Document("a:2", "<start_of_image>x", (red, red)),
        Document("a:3", "x<start_of_image>", (red,)),
        Document("a:4", "x", (tmp_path / "in/absent.png",)),
        Fault("a:5", "is not UTF-8"),
    ]
    with pytest.raises(DataError, match="a:1: 5 documents cannot be packed") as failed:
        pack(model, tmp_path / "out", [*mixed, *bad], flush=False)
    first, *others = failed.value.details
    assert first.startswith(f"a:1: {cut} ")
    assert others == [
        "a:2: has 2 image(s), but <start_of_image> 1 time(s)",
        "a:3: ends with an image: no text is left to learn",
        f"a:4: {tmp_path}/in/absent.png is missing",
        "a:5: is not UTF-8",
    ]
    with pytest.raises(DataError, match="a:5: is not UTF-8"):
        pack(model, tmp_path / "out", [*mixed, bad[-1]], flush=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_bad_documents_are_skipped_on_request_and_listed(model: Path, tmp_path: Path, mixed: list[Document]) -> None:
    red, cut = tmp_path / "in/red.png", tmp_path / "in/cut.png"
    yellow = tmp_path / "in/yellow.png"
    Image.new("RGB", (8, 8), "yellow").save(yellow)
    cut.write_bytes(red.read_bytes()[:40])
    bad = [Fault("a:1", "is not UTF-8"), Document("a:2", "x", (yellow, cut)), Document("a:3", "x", (red, cut))]
    with pytest.raises(DataError, match=r"a:1: 3 documents cannot be packed \(mend them, or .* --skip-bad N \(now 2\)"):
        pack(model, tmp_path / "out", [bad[0], *mixed, *bad[1:]], skip_bad=2, flush=False)
    done = pack(model, tmp_path / "out", [bad[0], *mixed, *bad[1:]], skip_bad=3, flush=False)
    assert done.to_json()["skipped"] == 3
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [item["where"] for item in skipped] == ["a:1", "a:2", "a:3"]
    assert skipped[1]["reason"].startswith(f"{cut} ")
    Packed.open(tmp_path / "out", verify=True)
    pack(model, tmp_path / "good", mixed, flush=False)
    found, good = contents(tmp_path / "out"), contents(tmp_path / "good")
    assert {name: data for name, data in found.items() if name not in ("index.json", "skipped.jsonl")} == {
        name: data for name, data in good.items() if name != "index.json"
    }
    pack(model, tmp_path / "out", mixed, overwrite=True, flush=False)
    assert contents(tmp_path / "out") == good


def test_images_inside_rows_are_packed_like_files(model: Path, tmp_path: Path, mixed: list[Document]) -> None:
    pack(model, tmp_path / "files", mixed, flush=False)
    inside = [
        replace(document, images=tuple(ImageBytes("image", Path(str(path)).read_bytes()) for path in document.images))
        for document in mixed
    ]
    pack(model, tmp_path / "bytes", inside, flush=False)
    assert contents(tmp_path / "files") == contents(tmp_path / "bytes")


def test_each_image_is_stored_once_in_shards_of_limited_size(
    model: Path, tmp_path: Path, mixed: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = {path: path.stat().st_size for path in (tmp_path / "in").iterdir()}
    largest = max(nbytes.values())
    for limit, shards in ((largest, 3), (2 * largest, 2), (3 * largest, 1)):
        monkeypatch.setattr(packed_writer, "PICTURE_SHARD_BYTES", limit)
        done = pack(model, tmp_path / str(limit), mixed, flush=False)
        packed = Packed.open(tmp_path / str(limit), verify=True)
        entry = packed.index.pictures
        assert (entry.places, entry.images, entry.nbytes, len(entry.shards)) == (7, 3, sum(nbytes.values()), shards)
        assert all(shard.nbytes <= limit for shard in entry.shards)
        assert done.to_json()["images"] == 3
        for document, given in zip(packed.images, mixed[-7:], strict=True):
            assert [image.read().data for image in document.images] == [
                Path(str(path)).read_bytes() for path in given.images
            ]
    monkeypatch.setattr(packed_writer, "PICTURE_SHARD_BYTES", largest - 1)
    with pytest.raises(DataError, match=rf"is larger than {largest - 1} bytes, the limit for an image"):
        pack(model, tmp_path / "out", [doc for doc in mixed if largest in map(nbytes.get, doc.images)][:1], flush=False)


def test_images_that_lose_something_in_8_bit_rgb_are_noted(model: Path, tmp_path: Path) -> None:
    images = {
        "deep": Image.new("I;16", (8, 8), 60_000),
        "clear": Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
        "plain": Image.new("RGB", (8, 8), "red"),
        "grey": Image.new("L", (8, 8), 7),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    found = [Document(name, f"image {name}", (tmp_path / f"{name}.png",)) for name in (*images, "deep")]
    (note,) = pack(model, tmp_path / "out", found, flush=False).notes
    assert note.startswith("2 image(s) have 16-bit or float values or transparency, which become 8-bit RGB")


def test_a_placeholder_without_an_image_is_noted(model: Path, tmp_path: Path) -> None:
    done = pack_texts(model, tmp_path / "out", ["<start_of_image> a cat", "a dog"])
    assert done.notes == ("1 document(s) without images contain <start_of_image>, packed as plain text",)


def test_reading_stops_after_a_hundred_faults(model: Path, tmp_path: Path) -> None:
    read = 0

    def faults() -> Iterator[Fault]:
        nonlocal read
        for read in range(1, 10_000):
            yield Fault(f"a:{read}", "is bad")

    with pytest.raises(DataError, match="100 documents or more cannot be packed") as failed:
        pack(model, tmp_path / "out", faults(), flush=False)
    assert read == len(failed.value.details) == MAX_FAULTS


def test_images_for_a_model_without_a_vision_tower_are_refused(
    model: Path, tmp_path: Path, mixed: list[Document]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["encoder"]["vision_config"]["num_hidden_layers"] = 0
    config["decoder"]["bos_token_id"] = None
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="7 documents cannot be packed") as failed:
        pack(tmp_path / "model", tmp_path / "out", mixed, flush=False)
    assert failed.value.details[0] == "p:0: has images, but the model has no vision tower"
    assert pack(tmp_path / "model", tmp_path / "out", mixed[:5], flush=False).index.text.documents == 5
    with pytest.raises(UsageError, match="--bos needs a model with a bos token"):
        pack(tmp_path / "model", tmp_path / "other", mixed[:5], bos=True, flush=False)


def test_an_existing_output_stays_unless_overwrite_is_set(model: Path, tmp_path: Path, mixed: list[Document]) -> None:
    pack_texts(model, tmp_path / "out", ["old"])
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        pack_texts(model, tmp_path / "out", ["new"])
    with pytest.raises(DataError):
        pack(model, tmp_path / "out", [Fault("a", "b")], overwrite=True, flush=False)
    assert contents(tmp_path / "out") == before
    pack(model, tmp_path / "out", mixed, overwrite=True, flush=False)
    assert Packed.open(tmp_path / "out", verify=True).index.text.documents == 29
    for target in (model, model / "inside", tmp_path / "in"):
        with pytest.raises(OutputError, match=r"(is|contains|lies inside) the source folder"):
            pack(model, target, mixed, sources=[tmp_path / "in"], overwrite=True, flush=False)


def test_a_folder_that_is_not_packed_data_is_never_replaced(model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "novel.txt").write_text("Call me Ishmael.")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="other files than packed data, and is not replaced"):
            pack(model, texts, [Document("a", "b")], overwrite=overwrite, flush=False)
    assert (texts / "novel.txt").read_text() == "Call me Ishmael."


def test_an_interruption_leaves_nothing(model: Path, tmp_path: Path, mixed: list[Document]) -> None:
    for number in (0, 3, len(mixed)):

        def stopped(number: int = number) -> Iterator[Document]:
            yield from mixed[:number]
            raise Interrupted(15)

        with pytest.raises(Interrupted):
            pack(model, tmp_path / "new/out", stopped(), flush=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, mixed: list[Document]) -> None:
    """The system refuses writes beyond a file size; the limit decides which file fails."""
    failed = set()
    for size in (0, 20, 79, 150, 300, 700, 1500, 2000, 2100):
        with largest_file(size), pytest.raises(OutputError, match="cannot be written: File too large") as error:
            pack(model, tmp_path / "new/out", mixed, shard_tokens=300)
        failed.add(Path(str(error.value.where)).name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    with largest_file(200), pytest.raises(OutputError, match="cannot be written: File too large") as error:
        pack(model, tmp_path / "new/out", mixed[-7:], shard_tokens=1)
    failed.add(Path(str(error.value.where)).name)
    assert failed >= {"pictures-00000.bin", "text-00000.bin", "index.json", "counts.bin"}


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_O2_any_call_that_fails_leaves_nothing(
    model: Path, tmp_path: Path, mixed: list[Document], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call, calls, number = getattr(os, name), 0, 0
    pack(model, tmp_path / "whole", mixed)

    def fail(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments, **options)

    refused = 0
    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        for turn in range(1, 40):
            number, calls = turn, 0
            try:
                pack(model, tmp_path / "out", mixed)
            except OutputError:
                refused += 1
            else:
                break
            if (tmp_path / "out").exists():  # the last call: the folder's parent could not be flushed
                break
            assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "whole"]
    assert refused >= {"fsync": 10, "rename": 1, "mkdir": 1}[name]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_has_at_least_one_token(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard_tokens: Input should be greater"):
        pack_texts(model, tmp_path / "out", ["a"], shard_tokens=0)
