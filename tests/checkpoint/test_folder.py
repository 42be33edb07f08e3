import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.checkpoint import file_store
from t5g2convert.checkpoint.file_names import INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.folder import LARGE_JSON, MAX_JSON_BYTES, open_checkpoint, read_json_object
from t5g2convert.checkpoint.header import TensorEntry, encode_header
from t5g2convert.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: ["a", "b"], SECOND: ["c"]}
pytestmark = pytest.mark.usefixtures("soon")

INDEX = {name: shard for shard, names in SHARDS.items() for name in names}


def weights(names: Sequence[str]) -> bytes:
    entries = [TensorEntry(name, "BF16", (2, 3), 12 * at, 12 * at + 12) for at, name in enumerate(names)]
    return encode_header(entries) + bytes(range(12 * len(names)))


def write_index(path: Path, weight_map: Any) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "single"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "gemma3"}')
    (path / SINGLE_FILE).write_bytes(weights(["a", "b"]))
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "gemma3"}')
    for shard, names in SHARDS.items():
        (path / shard).write_bytes(weights(names))
    write_index(path / INDEX_FILE, INDEX)
    return path


def as_hub_cache(plain: Path, cache: Path) -> Path:
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


def test_a_single_file_is_opened(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    assert checkpoint.config == {"model_type": "gemma3"}
    assert list(checkpoint.files) == [SINGLE_FILE]
    assert {name: (item.file, item.entry.shape) for name, item in checkpoint.tensors.items()} == {
        "a": (SINGLE_FILE, (2, 3)),
        "b": (SINGLE_FILE, (2, 3)),
    }
    assert checkpoint.nbytes == 24
    assert checkpoint.notes == ()


def test_shards_are_opened_by_their_index(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.files) == [FIRST, SECOND]
    assert {name: item.file for name, item in checkpoint.tensors.items()} == INDEX
    assert checkpoint.nbytes == 36
    assert checkpoint.notes == ()


def test_an_index_of_the_single_file_itself_counts(single: Path) -> None:
    write_index(single / INDEX_FILE, {"a": SINGLE_FILE, "b": SINGLE_FILE})
    assert open_checkpoint(single).notes == ()
    write_index(single / INDEX_FILE, {"a": SINGLE_FILE})
    assert "the index lacks" in refusal(single).message


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_I12_links_into_a_hub_cache_are_followed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    plain: Path = request.getfixturevalue(kind)
    expected = open_checkpoint(plain)
    checkpoint = open_checkpoint(as_hub_cache(plain, tmp_path / "models--google--gemma-3-270m"))
    assert checkpoint.tensors == expected.tensors
    assert checkpoint.config == expected.config


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, FIRST, SECOND])
def test_I12_a_dangling_link_is_refused_as_one(name: str, sharded: Path) -> None:
    (sharded / name).unlink()
    (sharded / name).symlink_to("../../blobs/gone")
    error = refusal(sharded)
    assert error.message == "is a broken symlink"
    assert error.where == str(sharded / name)


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, FIRST, SECOND])
def test_I12_a_looping_link_is_refused(name: str, sharded: Path) -> None:
    (sharded / name).unlink()
    (sharded / name).symlink_to("other")
    (sharded / "other").symlink_to(name)
    error = refusal(sharded)
    assert "symbolic links" in error.message
    assert error.where == str(sharded / name)


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, FIRST])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/dev")],
    ids=["fifo", "folder", "device", "link-to-folder"],
)
def test_I12_a_special_file_is_refused(name: str, make: Callable[[Path], None], sharded: Path) -> None:
    (sharded / name).unlink()
    make(sharded / name)
    error = refusal(sharded)
    assert error.message == "is not a regular file"
    assert error.where == str(sharded / name)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("gone")], ids=["fifo", "dangling"])
def test_I12_a_special_file_as_single_file_is_refused(make: Callable[[Path], None], single: Path) -> None:
    (single / SINGLE_FILE).unlink()
    make(single / SINGLE_FILE)
    assert refusal(single).where == str(single / SINGLE_FILE)


def test_I12_looping_folder_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    assert refusal(tmp_path / "x").where == str(tmp_path / "x")


def test_I3_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    error = refusal(sharded)
    assert error.where == str(sharded / SECOND)
    assert error.message == "is missing"


def test_I3_all_missing_shards_are_listed_at_once(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    (sharded / SECOND).unlink()
    error = refusal(sharded)
    message = "\n".join((str(error), *error.details))
    assert FIRST in message
    assert SECOND in message


def test_I3_a_tensor_that_the_index_lacks_is_named(sharded: Path) -> None:
    write_index(sharded / INDEX_FILE, {name: shard for name, shard in INDEX.items() if name != "b"})
    error = refusal(sharded)
    assert error.message == "the shards hold, but the index lacks, 1 tensor(s): b"
    assert error.where == str(sharded / INDEX_FILE)


def test_I3_a_tensor_that_no_shard_holds_is_named(sharded: Path) -> None:
    write_index(sharded / INDEX_FILE, {**INDEX, "d": FIRST})
    assert refusal(sharded).message == "no shard holds 1 tensor(s): d"


def test_I3_the_first_five_are_named_and_the_rest_counted(sharded: Path) -> None:
    write_index(sharded / INDEX_FILE, {**INDEX, **{f"d{number}": FIRST for number in range(9)}})
    assert refusal(sharded).message == "no shard holds 9 tensor(s): d0, d1, d2, d3, d4 and 4 more"


def test_I3_both_directions_are_listed_in_one_error(sharded: Path) -> None:
    extra = {f"d{number}": FIRST for number in range(7)}
    (sharded / SECOND).write_bytes(weights([f"c{number}" for number in range(8)]))
    write_index(sharded / INDEX_FILE, {**INDEX, **extra})
    error = refusal(sharded)
    message = "\n".join((str(error), *error.details))
    assert "no shard holds 8 tensor(s): c, d0, d1, d2, d3 and 3 more" in message
    assert "the index lacks, 8 tensor(s): c0, c1, c2, c3, c4 and 3 more" in message
    assert error.where == str(sharded / INDEX_FILE)


def test_I3_a_tensor_in_another_shard_than_the_index_says_is_named(sharded: Path) -> None:
    write_index(sharded / INDEX_FILE, {"a": SECOND, "b": FIRST, "c": SECOND})
    assert refusal(sharded).message == "another shard than the index says holds 1 tensor(s): a"


def test_I3_a_tensor_in_two_shards_is_named_with_both(sharded: Path) -> None:
    (sharded / SECOND).write_bytes(weights(["c", "b"]))
    assert refusal(sharded).message == f"tensor 'b' is in {FIRST} and in {SECOND}"


@pytest.mark.parametrize("present", [[FIRST, SECOND], [SECOND]])
def test_I3_a_single_file_next_to_indexed_shards_is_refused(present: list[str], sharded: Path) -> None:
    (sharded / SINGLE_FILE).write_bytes(weights(["a", "b", "c"]))
    for shard in SHARDS.keys() - set(present):
        (sharded / shard).unlink()
    error = refusal(sharded)
    assert SINGLE_FILE in error.message
    assert all(shard in error.message for shard in present)
    assert "outdated" in (error.hint or "")


def test_I3_a_stray_index_next_to_a_single_file_is_noted(single: Path) -> None:
    write_index(single / INDEX_FILE, INDEX)
    checkpoint = open_checkpoint(single)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert len(checkpoint.notes) == 1
    assert f"{INDEX_FILE} was ignored" in checkpoint.notes[0]


def test_I3_a_damaged_shard_is_named(sharded: Path) -> None:
    with (sharded / SECOND).open("r+b") as file:
        file.truncate((sharded / SECOND).stat().st_size - 1)
    error = refusal(sharded)
    assert error.where == str(sharded / SECOND)
    assert error.hint == "download again"


def test_shards_without_an_index_are_refused_with_advice(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    error = refusal(sharded)
    assert FIRST in error.message
    assert "index" in (error.hint or "")


@pytest.mark.parametrize(
    "target",
    [
        "../../x",
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "./model-00001-of-00002.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "x\0.safetensors",
        "",
        ".",
        "..",
        1,
        None,
        True,
        ["model-00001-of-00002.safetensors"],
        {"file": "model-00001-of-00002.safetensors"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("beside_single_file", [False, True])
def test_I4_an_index_that_leaves_the_folder_is_refused_before_a_shard_is_opened(
    target: Any, beside_single_file: bool, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path) -> None:
        pytest.fail(f"{path} was opened")

    if beside_single_file:
        (sharded / SINGLE_FILE).write_bytes(weights(["a"]))
    write_index(sharded / INDEX_FILE, {**INDEX, "evil.weight": target})
    monkeypatch.setattr(file_store, "read_header", opened)
    error = refusal(sharded)
    assert error.where == str(sharded / INDEX_FILE)
    assert "'evil.weight'" in error.message
    assert repr(target) in error.message


def test_I4_a_shard_outside_is_not_read_even_where_it_exists(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(weights(["d"]))
    write_index(sharded / INDEX_FILE, {**INDEX, "d": "../outside.safetensors"})
    assert "'../outside.safetensors'" in refusal(sharded).message


def test_I4_a_linked_subfolder_is_refused(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.safetensors").write_bytes(weights(["d"]))
    (sharded / "sub").symlink_to(tmp_path / "elsewhere")
    write_index(sharded / INDEX_FILE, {**INDEX, "d": "sub/x.safetensors"})
    assert "'sub/x.safetensors'" in refusal(sharded).message


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_weight_map_is_refused(weight_map: Any, sharded: Path) -> None:
    write_index(sharded / INDEX_FILE, weight_map)
    assert refusal(sharded).message == "has no weight_map"


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": \xff}', "not valid JSON"),
        (b"<!doctype html>", "not valid JSON"),
        (b'["gemma3"]', "a JSON list, expected an object"),
        (b"null", "a JSON NoneType, expected an object"),
        (b"3", "a JSON int, expected an object"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "cut", "bad-utf8", "html", "list", "null", "number", "deep", "huge-number"],
)
def test_I10_a_file_that_holds_no_json_object_is_refused(name: str, content: bytes, reason: str, sharded: Path) -> None:
    (sharded / name).write_bytes(content)
    error = refusal(sharded)
    assert reason in error.message
    assert error.where == str(sharded / name)


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE])
def test_I10_a_key_given_twice_is_refused(name: str, sharded: Path) -> None:
    (sharded / name).write_text('{"a": {"b": 1, "b": 2}}')
    error = refusal(sharded)
    assert error.message == "names 'b' twice"
    assert error.where == str(sharded / name)


def test_I10_a_missing_config_is_named(single: Path) -> None:
    (single / "config.json").unlink()
    error = refusal(single)
    assert error.message == "is missing"
    assert error.where == str(single / "config.json")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("config.json", MAX_JSON_BYTES), ("generation_config.json", MAX_JSON_BYTES),
        ("tokenizer_config.json", MAX_JSON_BYTES), *LARGE_JSON.items(),
    ],
)  # fmt: skip
def test_a_json_file_past_its_limit_is_not_read(tmp_path: Path, name: str, limit: int) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(limit + 1)
    with pytest.raises(CheckpointError, match=f"is larger than {limit} bytes"):
        read_json_object(path)
    with path.open("wb") as file:
        file.write(b"{}".ljust(limit))
    assert read_json_object(path) == {}


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
        ["consolidated.00.pth"],
        ["model.pt"],
    ],
    ids=lambda names: names[0],
)
def test_I11_pickles_are_never_loaded(names: list[str], tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()

    source, canary = tmp_path / "source", tmp_path / "canary"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "gemma3_text"}')
    for name in names:
        (source / name).write_bytes(pickle.dumps(Canary(canary)))
    error = refusal(source)
    assert names[0] in error.message
    assert "never unpickled" in error.message
    assert "save_pretrained" in (error.hint or "")
    assert not canary.exists()


def test_I11_a_pickle_next_to_safetensors_is_ignored(single: Path, tmp_path: Path) -> None:
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert list(open_checkpoint(single).files) == [SINGLE_FILE]
    assert not (tmp_path / "canary").exists()


def test_I11_a_pickle_named_safetensors_is_refused_unloaded(single: Path, tmp_path: Path) -> None:
    (single / SINGLE_FILE).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert refusal(single).where == str(single / SINGLE_FILE)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("x"), "is a file, expected a checkpoint folder"),
        (lambda path: path.symlink_to("gone"), "no such folder"),
    ],
    ids=["absent", "file", "dangling"],
)
def test_a_path_that_is_not_a_folder_is_refused(prepare: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    prepare(tmp_path / "model")
    error = refusal(tmp_path / "model")
    assert error.message == reason
    assert "config.json" in (error.hint or "")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"], ids=["too-long", "nul"])
def test_an_impossible_path_is_refused(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / name).where == str(tmp_path / name)


def test_a_folder_without_weights_is_refused_with_expected_names(single: Path) -> None:
    (single / SINGLE_FILE).unlink()
    error = refusal(single)
    assert SINGLE_FILE in error.message
    assert INDEX_FILE in error.message


def test_headers_are_read_and_weights_are_not(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    pread = os.pread

    def recorded(fd: int, length: int, offset: int) -> bytes:
        read.append((offset, offset + length))
        return pread(fd, length, offset)

    content = encode_header([TensorEntry("a", "U8", (1 << 20,), 0, 1 << 20)])
    with (single / SINGLE_FILE).open("wb") as file:
        file.write(content)
        file.truncate(len(content) + (1 << 20))
    monkeypatch.setattr(os, "pread", recorded)
    header: Mapping[str, Any] = open_checkpoint(single).files
    assert header[SINGLE_FILE].data_start == len(content)
    assert max(end for _, end in read) <= max(64, len(content))
