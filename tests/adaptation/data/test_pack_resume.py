import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from t5g2convert.adaptation.data import document_batches, pack_journal, packed_writer
from t5g2convert.adaptation.data import pack as packing
from t5g2convert.adaptation.data.document_encoder import DocumentEncoder
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.image_columns import ImageBytes
from t5g2convert.adaptation.data.output_files import HashedFile
from t5g2convert.adaptation.data.pack import Packing, pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.pair_documents import PairDocument
from t5g2convert.adaptation.data.rows import Columns, Document, Fault, PairRow, Row
from t5g2convert.conversion.output.recovery import INSIDE, JOURNAL_FILE
from t5g2convert.errors import DataError, Interrupted, OutputError, T5g2Error
from tests.adaptation.data.killed import killed_at
from tests.folders import contents, largest_file
from tests.models.gemma_chat import write_chat_model

Given = Sequence[Row | PairDocument]

STAGED = ".out.t5g2-staging"

CALLS = {
    "write": (HashedFile, "write"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "unlink": (os, "unlink"),
    "link": (os, "link"),
    "ftruncate": (os, "ftruncate"),
}


@pytest.fixture
def given(tmp_path: Path) -> list[Row]:
    """Forty rows: documents and pairs, with and without images, of a file or in the row, some empty or faulty."""
    (tmp_path / "in").mkdir()
    images = []
    for number in range(9):
        path = tmp_path / f"in/{number}.png"
        Image.new("RGB", (8 + number, 8), (number * 20, 0, 0)).save(path)
        images.append(path if number % 2 else ImageBytes(f"row {number}", path.read_bytes()))
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/1.png").read_bytes()[:40])
    found: list[Row] = []
    for number in range(40):
        if number % 9 == 4:
            found.append(Fault(f"t:{number}", "is not UTF-8"))
        elif number == 20:
            found.append(Document("t:20", "cut", (tmp_path / "in/cut.png",)))
        elif number % 7 == 5:
            found.append(Document(f"t:{number}", " "))
        elif number % 11 in (2, 3):
            own = (images[number % 9],) if number % 2 else ()
            found.append(PairRow(f"t:{number}", "a question " * (number % 4 + 1), f"answer {number}", own))
        elif number % 3 == 0:
            found.append(Document(f"t:{number}", f"picture {number}", (images[number % 9], images[number % 4])))
        else:
            found.append(Document(f"t:{number}", f"document {number} " * (number % 5 + 1)))
    return found


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the journal after every batch of three documents, and several shards of images."""
    monkeypatch.setattr(pack_journal, "SAVE_SECONDS", 0)
    monkeypatch.setattr(pack_journal, "SAVE_SHARE", 1)
    monkeypatch.setattr(document_batches, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(packed_writer, "PICTURE_SHARD_BYTES", 300)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


OPTIONS: dict[str, Any] = {"skip_bad": 9, "shard_tokens": 70, "max_input": 30, "truncate": "skip", "flush": True}


class Scene:
    """A pack, alone, into an empty folder, or appended to earlier data."""

    def __init__(self, model: Path, root: Path, given: Given, mode: str) -> None:
        self.model, self.given, self.mode, self.out = model, given, mode, root / "work/out"
        self.options = OPTIONS | ({"append": True} if mode == "append" else {})
        self.earlier = root / "earlier"
        if mode == "append":
            pack(model, self.earlier, given[:10], **OPTIONS)
            self.given = given[10:]
        self.begin()
        self.pack()
        self.expected = contents(self.out)
        shutil.rmtree(self.out.parent)

    def begin(self) -> None:
        self.out.parent.mkdir()
        if self.mode == "append":
            shutil.copytree(self.earlier, self.out)
        elif self.mode == "filled":
            self.out.mkdir()

    def pack(self, **options: Any) -> Packing:
        return pack(self.model, self.out, self.given, **self.options | options)

    @property
    def is_done(self) -> bool:
        """Whether the output is complete; a run that was killed behind its last rename leaves its list or journal."""
        found = contents(self.out) if self.out.exists() else {}
        left = {name for name in found if name.startswith(INSIDE) or name == JOURNAL_FILE}
        return {name: data for name, data in found.items() if name not in left} == self.expected

    def resume_until_done(self, call: str, number: int) -> bool:
        """Kill the pack at a call, resume and kill it again, and resume; return whether it was killed at all."""
        self.begin()
        owner, name = CALLS[call]
        killed = killed_at(owner, name, number, self.pack)
        if killed and not self.is_done:
            killed_at(owner, name, max(1, number // 2), lambda: self.pack(resume=True))
        if not self.is_done:
            self.pack(resume=True)
            assert contents(self.out) == self.expected
        elif killed:
            # It is complete; what the killed run left goes with the next pack.
            pack(self.model, self.out, [Document("a", "b")], **OPTIONS, overwrite=True)
            assert {INSIDE, JOURNAL_FILE}.isdisjoint(path.name for path in self.out.iterdir())
        else:
            assert contents(self.out) == self.expected
        assert {path.name for path in self.out.parent.iterdir()} == {"out"}
        shutil.rmtree(self.out.parent)
        return killed


QUICK = [("write", 31, 3), ("fsync", 41, 2), ("rename", 5, 1), ("replace", 5, 1), ("unlink", 9, 1)]
"""A call, every how many of them the pack is killed, and the least number of kills."""

THOROUGH = [("write", 3, 20), ("rename", 1, 1), ("fsync", 5, 15), ("replace", 1, 7), ("unlink", 1, 7)]


@pytest.mark.parametrize("mode", ["new", "filled", "append"])
@pytest.mark.parametrize(
    ("call", "step", "least"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in THOROUGH)]
)
def test_a_pack_that_is_killed_at_any_call_and_resumed_twice_has_the_bytes_of_an_uninterrupted_one(
    model: Path, tmp_path: Path, given: Given, mode: str, call: str, step: int, least: int
) -> None:
    scene, kills = Scene(model, tmp_path, given, mode), 0
    for number in itertools.count(1, step):
        if not scene.resume_until_done(call, number):
            break
        kills += 1
    assert kills >= least


def test_an_append_that_is_killed_while_it_links_shards_is_resumed(model: Path, tmp_path: Path, given: Given) -> None:
    scene, kills = Scene(model, tmp_path, given, "append"), 0
    while scene.resume_until_done("link", kills + 1):
        kills += 1
    assert kills >= 3


@pytest.mark.parametrize("call", ["ftruncate", "unlink"])
def test_a_resumed_pack_that_is_killed_while_it_cuts_its_files_is_resumed(
    model: Path, tmp_path: Path, given: Given, call: str
) -> None:
    scene = Scene(model, tmp_path, given, "new")
    kills = 0
    for number in range(1, 20):
        scene.begin()
        assert killed_at(HashedFile, "write", 60, scene.pack)
        owner, name = CALLS[call]
        killed = killed_at(owner, name, number, lambda: scene.pack(resume=True))
        kills += killed
        if not scene.is_done:
            scene.pack(resume=True)
            assert contents(scene.out) == scene.expected
        shutil.rmtree(scene.out.parent)
        if not killed:
            break
    assert kills >= 5


@pytest.mark.parametrize("workers", [2])
@pytest.mark.parametrize(
    ("mode", "call", "number"),
    [
        ("new", "write", 50),
        *(
            pytest.param(mode, call, number, marks=pytest.mark.slow)
            for mode in ("new", "append")
            for call, number in [
                ("write", 9),
                ("write", 61),
                ("fsync", 8),
                ("fsync", 47),
                ("fsync", 90),
                ("replace", 3),
            ]
        ),
    ],
)
def test_packs_with_workers_are_resumed_with_any_number_of_them(
    model: Path, tmp_path: Path, given: Given, mode: str, call: str, number: int, workers: int
) -> None:
    scene = Scene(model, tmp_path, given, mode)
    scene.begin()
    assert killed_at(*CALLS[call], number, lambda: scene.pack(workers=workers))
    assert not scene.is_done
    owner, name = CALLS["replace"]
    killed_at(owner, name, 2, lambda: scene.pack(workers=1, resume=True))
    if not scene.is_done:
        scene.pack(workers=workers, resume=True)
    assert contents(scene.out) == scene.expected


def stopped(documents: Given, after: int, error: BaseException | None = None) -> Iterator[Row | PairDocument]:
    """Yield the first documents, and fail."""
    yield from documents[:after]
    raise error or Interrupted(15)


def interrupt(model: Path, out: Path, given: Given, after: int = 30, **options: Any) -> None:
    """Interrupt a pack that has a journal."""
    with pytest.raises(Interrupted, match=r"what was packed is kept; --resume continues it with the same options"):
        pack(model, out, stopped(given, after), **OPTIONS | {"flush": False} | options)
    assert (out.parent / STAGED / JOURNAL_FILE).is_file()


@pytest.fixture
def whole(model: Path, tmp_path: Path, given: Given) -> dict[str, bytes]:
    """The bytes of an uninterrupted pack."""
    pack(model, tmp_path / "whole", given, **OPTIONS)
    return contents(tmp_path / "whole")


def test_documents_that_were_packed_are_not_tokenized_again_and_a_note_counts_them(
    model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, tmp_path / "out", given)
    encode, encoded = DocumentEncoder.encode, []

    def noted(self: DocumentEncoder, batch: list[Any], *rest: Any) -> Any:
        encoded.extend(document.number for document in batch)
        return encode(self, batch, *rest)

    monkeypatch.setattr(DocumentEncoder, "encode", noted)
    done = pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
    (first,) = [note for note in done.notes if "interrupted" in note]
    assert first == f"continued an interrupted pack after its first {encoded[0]} documents"
    assert 20 < encoded[0] <= 30
    assert contents(tmp_path / "out") == whole
    assert done.sha256 == Packed.open(tmp_path / "out", verify=True).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(2), ValueError("a bug"), OSError(5, "no network")])
def test_any_failure_keeps_what_was_packed(
    model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes], error: BaseException
) -> None:
    with pytest.raises(type(error)):
        pack(model, tmp_path / "out", stopped(given, 20, error), **OPTIONS)
    assert not (tmp_path / "out").exists()
    assert pack(model, tmp_path / "out", given, **OPTIONS, resume=True).notes
    assert contents(tmp_path / "out") == whole


def test_without_a_journal_a_failure_leaves_nothing_and_resume_begins(
    model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_journal, "SAVE_SECONDS", 1000)
    with pytest.raises(Interrupted) as error:
        pack(model, tmp_path / "out", stopped(given, 30), **OPTIONS, resume=True)
    assert error.value.hint is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "whole"]
    # A killed run leaves its files, but had no time for a journal.
    (tmp_path / STAGED).mkdir()
    (tmp_path / STAGED / "text.doc").write_bytes(b"12345678")
    done = pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
    assert not any("interrupted" in note for note in done.notes)
    assert contents(tmp_path / "out") == whole


def test_without_resume_a_pack_begins_anew(model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes]) -> None:
    interrupt(model, tmp_path / "out", given[5:])
    pack(model, tmp_path / "out", given, **OPTIONS)
    assert contents(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def refuse(
    error: type[T5g2Error], match: str, model: Path, out: Path, given: Given, again: str = "--resume", **options: Any
) -> None:
    """Require that a resumed pack is refused in one line, and that nothing of the interrupted one is lost."""
    before = contents(out.parent / STAGED)
    with pytest.raises(error, match=match) as raised:
        pack(model, out, given, **OPTIONS | {"flush": False, "resume": True} | options)
    assert again in (raised.value.hint or "")
    assert "\n" not in str(raised.value)
    assert contents(out.parent / STAGED) == before


def test_an_input_that_changed_is_refused(model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    interrupt(model, out, given)
    changed = "the input changed since the pack was interrupted, among its first [0-9]+ documents"
    again = "pack again without --resume"
    first = given[6]
    assert isinstance(first, Document)
    others: list[Given] = [
        [Document("t:1", "x"), *given],
        given[1:],
        given[:20],
        [],
        [given[1], given[0], *given[2:]],
        [*given[:6], Document(first.where, first.text + ".", first.images), *given[7:]],
        [*given[:6], Document("elsewhere", first.text, first.images), *given[7:]],
        [*given[:6], Document(first.where, first.text, first.images[::-1]), *given[7:]],
        [*given[:4], Fault("t:4", "is too long"), *given[5:]],
    ]
    for other in others:
        refuse(DataError, changed, model, out, other, again)
    image = tmp_path / "in/1.png"
    status, data = image.stat(), image.read_bytes()
    image.write_bytes(data)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    refuse(DataError, changed, model, out, given, again)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    pack(model, out, given, **OPTIONS, resume=True)
    assert contents(out) == whole


def test_input_that_was_not_read_yet_may_change(model: Path, tmp_path: Path, given: Given) -> None:
    other = [*given[:30], Document("t:31", "new"), *given[32:]]
    pack(model, tmp_path / "whole", other, **OPTIONS)
    interrupt(model, tmp_path / "out", given)
    pack(model, tmp_path / "out", other, **OPTIONS, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_options_and_another_tokenizer_are_refused(
    model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, model, out = model, tmp_path / "model", tmp_path / "out"
    shutil.copytree(original, model)
    interrupt(model, out, given)
    for options, had in [
        ({"bos": True}, "--no-bos"),
        ({"shard_tokens": 71}, "--shard-tokens 70, not 71"),
        ({"bos": True, "shard_tokens": 71}, "--no-bos, --shard-tokens 70, not 71"),
        ({"max_input": 31}, "--max-input 30 --max-target 512 --truncate skip, not --max-input 31 .* --truncate skip"),
        ({"truncate": "input"}, ".* --truncate skip, not .* --truncate input"),
        ({"all_turns": True}, ".* --truncate skip, not .* --truncate skip --all-turns"),
    ]:
        refuse(DataError, f"the interrupted pack had {had} ", model, out, given, **options)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "__version__", "9.9")
        refuse(DataError, "had version .*, not 9.9", model, out, given)
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(tokenizer + "\n")
    refuse(DataError, "had another tokenizer or other tokens", model, out, given)
    (model / "tokenizer.json").write_text(tokenizer)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    refuse(DataError, "had another chat template", model, out, given)
    (model / "chat_template.jinja").unlink()
    # Those that do not decide the bytes may differ.
    pack(model, out, given, **OPTIONS | {"skip_bad": 30, "flush": True}, resume=True, overwrite=True)
    assert contents(out) == whole


def test_an_append_is_resumed_only_to_the_same_data(model: Path, tmp_path: Path, given: Given) -> None:
    out = tmp_path / "out"
    pack(model, out, given[:8], **OPTIONS)
    interrupt(model, out, given[8:], 22, append=True)
    refuse(DataError, "the interrupted pack had --append ", model, out, given[8:], overwrite=True)
    with pytest.raises(OutputError, match="exists and is not empty"):
        pack(model, out, given[8:], **OPTIONS, resume=True)
    shutil.move(out, tmp_path / "aside")
    pack(model, tmp_path / "other", given[:9], **OPTIONS)
    shutil.move(tmp_path / "other", out)
    refuse(DataError, "had other data to append to", model, out, given[8:], append=True)
    shutil.rmtree(out)
    shutil.move(tmp_path / "aside", out)
    pack(model, out, given[8:], **OPTIONS, append=True, resume=True)
    assert Packed.open(out, verify=True).index.text.documents
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_more_faults_than_may_be_skipped_are_skipped_by_a_resumed_pack(
    model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes]
) -> None:
    given = [*given[:30], *(it for it in given[30:] if not isinstance(it, Fault))]
    few = OPTIONS | {"skip_bad": 1}
    with pytest.raises(DataError, match="4 documents cannot be packed") as error:
        pack(model, tmp_path / "out", given, **few)
    assert error.value.hint == (
        "mend them, or skip up to N with --skip-bad N (now 1); what was packed is kept; --resume continues it with the "
        "same options and any --skip-bad"
    )
    with pytest.raises(DataError, match="4 documents cannot be packed"):
        pack(model, tmp_path / "out", given, **few, resume=True)
    pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
    pack(model, tmp_path / "uninterrupted", given, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def linked_twice(path: Path) -> None:
    os.link(path, path.parents[1] / "other")


def as_link(path: Path) -> None:
    shutil.move(path, path.parents[1] / "moved")
    path.symlink_to(path.parents[1] / "moved")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (JOURNAL_FILE, damage, "is not a journal of this version's pack, or is damaged"),
        (JOURNAL_FILE, cut, "is not a journal of this version's pack, or is damaged"),
        (JOURNAL_FILE, as_link, "is not a journal of this version's pack, or is damaged"),
        (JOURNAL_FILE, as_pipe, "is not a journal of this version's pack, or is damaged"),
        (JOURNAL_FILE, lambda path: path.write_text('{"plan": 1}\n'), "is not a journal of this version's pack"),
        ("text-00000.bin", damage, "text-00000.bin is missing or was modified"),
        ("text-00000.bin", cut, "text-00000.bin is missing or was modified"),
        ("pictures-00000.bin", Path.unlink, "pictures-00000.bin is missing or was modified"),
        ("text.doc", Path.unlink, "cannot be written: No such file or directory"),
        ("text.doc", damage, "text.doc is missing or was modified"),
        ("image.pic", lambda path: path.write_bytes(b""), "image.pic is missing or was modified"),
        ("image.doc", linked_twice, "image.doc is missing or was modified"),
        ("image.doc", as_link, "cannot be written: Too many levels of symbolic links"),
        ("image.doc", as_pipe, "image.doc is missing or was modified"),
    ],
)
def test_a_damaged_journal_and_damaged_files_are_refused_in_one_line(
    model: Path, tmp_path: Path, given: Given, name: str, change: Callable[[Path], object], match: str
) -> None:
    interrupt(model, tmp_path / "out", given)
    change(tmp_path / STAGED / name)
    with pytest.raises(OutputError, match=match) as error:
        pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
    assert "--resume" in (error.value.hint or "")
    assert "\n" not in str(error.value)
    pack(model, tmp_path / "out", given, **OPTIONS)
    assert (tmp_path / "out/index.json").is_file()
    assert not (tmp_path / STAGED).exists()


def test_a_pack_on_a_full_disk_is_resumed_when_there_is_room(
    model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes]
) -> None:
    """The system refuses writes beyond a file size; the limit decides which file fails, some of them the journal."""
    kept, failed = 0, set()
    for size in (100, 285, 500, 900, 1800):
        with largest_file(size), pytest.raises(OutputError, match="cannot be written: File too large") as error:
            pack(model, tmp_path / "out", given, **OPTIONS)
        failed.add(Path(str(error.value.where)).name)
        kept += (tmp_path / STAGED).exists()
        with largest_file(size + 20), pytest.raises(OutputError):
            pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
        pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
        assert contents(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")
    assert len(failed) > 1
    assert JOURNAL_FILE in failed


def test_files_of_a_pack_that_did_not_flush_are_flushed(
    model: Path, tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, tmp_path / "out", given)
    finished = {path.stat().st_ino for path in (tmp_path / STAGED).glob("*.bin")}
    fsync, flushed = os.fsync, set()

    def noted(fd: int) -> None:
        flushed.add(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
    assert finished <= flushed


@pytest.mark.parametrize(("takes", "least", "most"), [(0.0, 32, 34), (2.0, 9, 11)])
def test_the_journal_is_written_every_30_seconds_and_takes_at_most_2_percent_of_the_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: float, least: int, most: int
) -> None:
    """A clock of its own: a batch takes a second, and writing the journal what a slow disk takes."""
    monkeypatch.undo()
    monkeypatch.setattr(document_batches, "BATCH_DOCUMENTS", 1)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    save, spent = pack_journal.Journal.save, []

    def slowly(self: pack_journal.Journal, make: Callable[[], pack_journal.PackState]) -> None:
        def slow() -> pack_journal.PackState:
            clock[0] += takes
            return make()

        began = clock[0]
        save(self, slow)
        spent.append(clock[0] - began)

    monkeypatch.setattr(pack_journal.Journal, "save", slowly)

    def documents() -> Iterator[Document]:
        for number in range(1000):
            clock[0] += 1
            yield Document(f"t:{number}", "a")

    pack(model, tmp_path / "out", documents(), flush=False)
    assert least <= len(spent) <= most
    assert sum(spent) <= 0.02 * clock[0]


def test_the_folder_of_an_interrupted_pack_is_inside_an_empty_target(
    model: Path, tmp_path: Path, given: Given, whole: dict[str, bytes]
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(Interrupted):
        pack(model, tmp_path / "out", stopped(given, 30), **OPTIONS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [INSIDE]
    pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
    assert contents(tmp_path / "out") == whole


def test_a_pack_of_conversations_with_all_turns_is_resumed_between_two_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_batches, "BATCH_DOCUMENTS", 2)
    model = write_chat_model(tmp_path / "model")
    lines = []
    for number in range(12):
        turns = [
            message
            for turn in range(number % 4 + 1)
            for message in (
                {"role": "user", "content": f"question {number} {turn}"},
                {"role": "assistant", "content": "x" * (turn * 10 + 1)},
            )
        ]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    limits = {"max_input": 200, "max_target": 15, "truncate": None}
    out, options = tmp_path / "out", OPTIONS | limits | {"all_turns": True}

    def run(**more: Any) -> Packing:
        return pack(model, out, read_files([tmp_path / "rows.jsonl"], Columns(), lambda _: None), **options | more)

    run()
    expected = contents(out)
    assert Packed.open(out).index.pair.documents == 3 + 6 + 6 + 6
    assert len(expected["skipped.jsonl"].splitlines()) == 3 + 6, "the third and fourth answers are too long"
    for number in (2, 4, 5):
        shutil.rmtree(out)
        assert killed_at(*CALLS["replace"], number, run)
        assert any("interrupted" in note for note in run(resume=True).notes)
        assert contents(out) == expected


def test_names_that_are_not_utf8_survive_in_the_list_of_skipped_documents(model: Path, tmp_path: Path) -> None:
    given = [Fault("\udcff.txt", "is not UTF-8"), *(Document(f"\udcfe:{number}", "a") for number in range(9))]
    interrupt(model, tmp_path / "out", given, 9)
    pack(model, tmp_path / "out", given, **OPTIONS, resume=True)
    line = (tmp_path / "out/skipped.jsonl").read_text()
    assert json.loads(line) == {"where": "\udcff.txt", "reason": "is not UTF-8"}
