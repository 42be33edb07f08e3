import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from t5g2convert.checkpoint.header import BITS, MAX_HEADER_BYTES, FileIdentity, TensorEntry, encode_header, read_header
from t5g2convert.errors import CheckpointError

Fields = dict[str, Any]


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def tensor(shape: list[Any], offsets: list[Any], dtype: Any = "U8") -> Fields:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def document(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    return framed(json.dumps(tensors).encode(), data)


def refusal(path: Path, content: bytes) -> CheckpointError:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.where == str(path)
    return caught.value


GOOD = document({"a": tensor([2], [0, 2]), "b": tensor([1, 3], [2, 5])}, b"abcde")


def test_the_undamaged_file_of_these_tests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    header = read_header(path)
    assert {name: (entry.shape, entry.nbytes) for name, entry in header.tensors.items()} == {
        "a": ((2,), 2),
        "b": ((1, 3), 3),
    }
    assert header.identity.size == len(GOOD)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "0 bytes long, too short", id="empty"),
        pytest.param(b"\x02\0\0\0\0\0\0", "7 bytes long, too short", id="seven-bytes"),
        pytest.param(
            struct.pack("<Q", 100) + b"{}", "expected 108 bytes for the header, found 10", id="length-over-file"
        ),
        pytest.param(
            struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "declare a header of 100000001", id="over-100-MB"
        ),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", f"declare a header of {2**63}", id="length-2-to-63"),
        pytest.param(framed(b'{"a":'), "not valid JSON", id="bad-json"),
        pytest.param(framed(b""), "not valid JSON", id="no-json"),
        pytest.param(framed(b"{}\0\0"), "not valid JSON", id="nul-padding"),
        pytest.param(framed(b'{"\xff": 1}'), "not valid JSON", id="bad-utf8"),
        pytest.param(framed(b"[]"), "JSON list", id="json-list"),
        pytest.param(framed(b"[" * 200_000), "nested too deeply", id="deep-lists"),
        pytest.param(framed(b'{"a":' * 200_000), "nested too deeply", id="deep-objects"),
        pytest.param(framed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deeply", id="deep-closed"),
    ],
)
def test_I1_a_broken_frame_is_refused_with_its_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(tmp_path / "x.safetensors", content).message


@pytest.mark.parametrize(
    ("fields", "data", "reason"),
    [
        pytest.param(tensor([4], [0, 2]), b"ab", "U8 of shape [4] takes 4 bytes", id="shape-over-offsets"),
        pytest.param(tensor([1], [0, 2]), b"ab", "span 2", id="shape-under-offsets"),
        pytest.param(tensor([2], [2, 0]), b"ab", "span -2", id="offsets-backwards"),
        pytest.param(tensor([-2], [0, 2]), b"ab", "not a list of sizes", id="negative-shape"),
        pytest.param(tensor([-2, -1], [0, 2]), b"ab", "not a list of sizes", id="negative-shape-twice"),
        pytest.param(tensor([2.0], [0, 2]), b"ab", "not a list of sizes", id="float-shape"),
        pytest.param(tensor([True, 2], [0, 2]), b"ab", "not a list of sizes", id="boolean-shape"),
        pytest.param(tensor([2], [-2, 0]), b"ab", "not two positions", id="negative-offset"),
        pytest.param(tensor([2], [0]), b"ab", "not two positions", id="one-offset"),
        pytest.param(tensor([2], [0, 2], dtype="F12"), b"ab", "unknown dtype 'F12'", id="unknown-dtype"),
        pytest.param(tensor([2], [0, 2], dtype=["U8"]), b"ab", "unknown dtype", id="dtype-list"),
        pytest.param(tensor([3], [0, 2], dtype="F4"), b"ab", "takes 1.5 bytes", id="half-bytes"),
        pytest.param({"dtype": "U8", "shape": [2]}, b"ab", "expected dtype, shape and data_offsets", id="no-offsets"),
        pytest.param(["U8", [2], [0, 2]], b"ab", "expected dtype, shape and data_offsets", id="entry-list"),
        pytest.param(tensor([2**62, 4], [0, 0]), b"", "span 0", id="overflow-to-zero"),
        pytest.param(tensor([2**32, 2**32, 2**32], [0, 2]), b"ab", "span 2", id="overflow"),
    ],
)
def test_I1_a_lying_entry_is_refused_with_its_tensor(fields: Any, data: bytes, reason: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / "x.safetensors", document({"a.weight": fields}, data))
    assert reason in error.message
    assert "'a.weight'" in error.message


@pytest.mark.parametrize("extents", [[2**63] * 20, [10**4000]], ids=["many", "one"])
def test_I1_a_shape_past_every_number_type_is_refused(extents: list[int], tmp_path: Path) -> None:
    error = refusal(tmp_path / "x.safetensors", document({"a.weight": tensor(extents, [0, 2])}, b"ab"))
    assert "'a.weight'" in error.message


@pytest.mark.parametrize(
    ("tensors", "size", "reason"),
    [
        pytest.param({"a": tensor([3], [0, 3]), "b": tensor([3], [2, 5])}, 5, "'b' overlaps", id="overlap"),
        pytest.param({"a": tensor([3], [0, 3]), "b": tensor([3], [0, 3])}, 3, "'b' overlaps", id="same-range"),
        pytest.param({"a": tensor([2], [0, 2]), "b": tensor([2], [3, 5])}, 5, "'b' leaves a gap", id="hole"),
        pytest.param({"a": tensor([2], [1, 3])}, 3, "'a' leaves a gap", id="hole-at-start"),
        pytest.param({"a": tensor([2], [0, 2])}, 5, "3 bytes follow the last tensor", id="trailing-bytes"),
        pytest.param({}, 1, "1 bytes follow the last tensor", id="bytes-of-no-tensor"),
        pytest.param({"a": tensor([2], [0, 2]), "b": tensor([0], [1, 1])}, 2, "'b' overlaps", id="empty-inside"),
    ],
)
def test_I1_data_not_covered_exactly_once_is_refused(
    tensors: dict[str, Fields], size: int, reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(tmp_path / "x.safetensors", document(tensors, b"x" * size)).message


@pytest.mark.parametrize("kept", [1, 4])
def test_I1_a_truncated_download_says_how_many_bytes_are_missing(kept: int, tmp_path: Path) -> None:
    content = GOOD[: len(GOOD) - 5 + kept]
    error = refusal(tmp_path / "x.safetensors", content)
    assert error.message == f"expected {len(GOOD)} bytes, found {len(content)}"
    assert error.hint == "download again"


def test_I1_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        refusal(tmp_path / "x.safetensors", GOOD[:length])


def test_I1_an_offset_past_the_end_is_refused(tmp_path: Path) -> None:
    content = document({"a": tensor([2], [0, 2]), "b": tensor([2**50], [2, 2 + 2**50])}, b"abcde")
    assert f"expected {len(content) - 5 + 2 + 2**50} bytes, found {len(content)}" in (
        refusal(tmp_path / "x.safetensors", content).message
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(framed(json.dumps({"a": tensor([2], [0, 2])}).encode("utf-16-le"), b"ab"), id="utf-16"),
        pytest.param(framed(b"\xef\xbb\xbf" + json.dumps({"a": tensor([2], [0, 2])}).encode(), b"ab"), id="bom"),
        pytest.param(
            framed(b'{"\xed\xa0\x80":' + json.dumps(tensor([2], [0, 2])).encode() + b"}", b"ab"), id="utf8-surrogate"
        ),
        pytest.param(
            framed(b'{"\\ud800":' + json.dumps(tensor([2], [0, 2])).encode() + b"}", b"ab"), id="escaped-surrogate"
        ),
        pytest.param(document({"a": tensor([2**63, 4, 0], [0, 0])}), id="overflow-times-zero"),
        pytest.param(document({"a": tensor([2**70, 0], [0, 0])}), id="extent-past-64-bits"),
    ],
)
def test_I1_a_header_that_only_python_can_read_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(SafetensorError):
        deserialize(content)
    refusal(tmp_path / "x.safetensors", content)


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            "a",
        ),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}', "dtype"),
        (b'{"__metadata__":{"x":"1","x":"2"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "x"),
    ],
    ids=["tensor", "field", "metadata"],
)
def test_I2_a_name_given_twice_is_refused(header: bytes, key: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.safetensors", framed(header, b"ab")).message == f"the header names {key!r} twice"


def test_I2_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4961251752\n"
    error = refusal(tmp_path / "x.safetensors", pointer)
    assert "git-lfs pointer" in error.message
    assert "git lfs pull" in (error.hint or "")


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html>\n<html><body>401</body></html>",
        b"<!doctype html><title>Sign in</title>",
        b"\n  <html>\n<head>",
        b"<HTML><HEAD>",
    ],
)
def test_I2_an_html_page_is_recognized(page: bytes, tmp_path: Path) -> None:
    error = refusal(tmp_path / "x.safetensors", page)
    assert "HTML page" in error.message
    assert "download" in (error.hint or "")


def test_metadata_other_than_strings_is_refused(tmp_path: Path) -> None:
    assert "__metadata__" in refusal(tmp_path / "x.safetensors", document({"__metadata__": {"format": 1}})).message


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "f64": np.arange(6, dtype=np.float64).reshape(2, 3),
    "f32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "f16": np.arange(5, dtype=np.float16),
    "bf16": np.arange(7, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "i64": np.arange(3, dtype=np.int64),
    "u8": np.arange(9, dtype=np.uint8).reshape(3, 3),
    "bool": np.array([True, False, True]),
    "scalar": np.array(3.5, dtype=np.float32),
    "none": np.zeros((0, 4), dtype=np.float32),
    "Zeichen.ä.重": np.arange(2, dtype=np.int16),
}


def test_a_file_of_the_library_is_read_with_its_byte_ranges(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path, {"format": "np", "note": "ä"})
    header = read_header(path)
    assert header.metadata == {"format": "np", "note": "ä"}
    assert header.tensors.keys() == ARRAYS.keys()
    raw = path.read_bytes()
    for name, array in ARRAYS.items():
        entry = header.tensors[name]
        assert (entry.name, entry.shape, entry.elements) == (name, array.shape, array.size)
        assert raw[entry.start : entry.end] == array.tobytes(), name
    assert {name: entry.dtype for name, entry in header.tensors.items()} == {
        "f64": "F64",
        "f32": "F32",
        "f16": "F16",
        "bf16": "BF16",
        "i64": "I64",
        "u8": "U8",
        "bool": "BOOL",
        "scalar": "F32",
        "none": "F32",
        "Zeichen.ä.重": "I16",
    }


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_librarys_width(dtype: str, tmp_path: Path) -> None:
    content = document({"a": tensor([8], [0, BITS[dtype]], dtype)}, bytes(BITS[dtype]))
    ((name, fields),) = deserialize(content)
    assert (name, fields["dtype"], fields["shape"]) == ("a", dtype, [8])
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert read_header(path).tensors["a"].nbytes == BITS[dtype]


def test_an_encoded_header_is_read_back_by_the_library_and_by_the_reader(tmp_path: Path) -> None:
    entries = [
        TensorEntry("model.ä.weight", "BF16", (2, 3), 0, 12),
        TensorEntry('quo"te', "F32", (), 12, 16),
        TensorEntry("empty", "F16", (0,), 16, 16),
        TensorEntry("last", "U8", (5,), 16, 21),
    ]
    encoded = encode_header(entries)
    data = bytes(range(21))
    path = tmp_path / "x.safetensors"
    path.write_bytes(encoded + data)
    assert len(encoded) % 8 == 0
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
            entry.name: (entry.dtype, list(entry.shape)) for entry in entries
        }
    assert {name: bytes(fields["data"]) for name, fields in deserialize(path.read_bytes())} == {
        entry.name: data[entry.start : entry.end] for entry in entries
    }
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.data_start == len(encoded)
    assert [
        TensorEntry(item.name, item.dtype, item.shape, item.start - len(encoded), item.end - len(encoded))
        for item in header.tensors.values()
    ] == entries


def agrees_with_the_library(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    library = {
        name: (fields["dtype"], tuple(fields["shape"]), bytes(fields["data"])) for name, fields in deserialize(content)
    }
    assert library == {
        name: (entry.dtype, entry.shape, content[entry.start : entry.end]) for name, entry in header.tensors.items()
    }


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete"]), st.integers(0, len(GOOD)), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


@given(MUTATIONS)
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[str, int, int]]
) -> None:
    content = bytearray(GOOD)
    for kind, position, value in mutations:
        if kind == "insert":
            content.insert(position, value)
        elif position < len(content):
            content[position : position + 1] = b"" if kind == "delete" else bytes([value])
    agrees_with_the_library(tmp_path_factory.getbasetemp() / "mutated.safetensors", bytes(content))


@given(st.binary(max_size=200), st.booleans())
@example(b"", True)
@example(b"{}", True)
def test_any_bytes_are_refused_or_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, frame: bool
) -> None:
    agrees_with_the_library(
        tmp_path_factory.getbasetemp() / "random.safetensors", framed(content) if frame else content
    )


NUMBERS = st.one_of(st.integers(-1, 12), st.sampled_from([2**31, 2**32, 2**63 - 1]), st.none(), st.just(1.0))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F99", "u8", 3]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }
)


@st.composite
def sound_entries(draw: st.DrawFn) -> dict[str, Fields]:
    entries: dict[str, Fields] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=4), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), 8]
        size = int(np.prod(shape)) * BITS[dtype] // 8
        entries[name] = tensor(shape, [position, position + size], dtype)
        position += size
    return entries


@given(st.one_of(sound_entries(), st.dictionaries(st.text(max_size=4), ENTRIES, max_size=3)), st.data())
def test_any_header_is_refused_or_read_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Fields], data: st.DataObject
) -> None:
    ends = [fields["data_offsets"][-1] for fields in entries.values() if fields["data_offsets"]]
    end = max((at for at in ends if type(at) is int and at < 1000), default=0)
    size = max(0, end + data.draw(st.sampled_from([0, 0, 0, -1, 1])))
    agrees_with_the_library(
        tmp_path_factory.getbasetemp() / "made.safetensors", document(entries, bytes(i % 251 for i in range(size)))
    )


@given(sound_entries())
def test_every_sound_header_is_read(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Fields]) -> None:
    path = tmp_path_factory.getbasetemp() / "sound.safetensors"
    path.write_bytes(document(entries, bytes(max((item["data_offsets"][1] for item in entries.values()), default=0))))
    assert read_header(path).tensors.keys() == entries.keys()


@pytest.mark.usefixtures("soon")
def test_I12_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("path", [Path("/dev/zero"), Path("/dev")], ids=["device", "folder"])
def test_I12_a_special_file_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(path)


def test_a_missing_file_is_refused_with_the_system_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "x.safetensors")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    good.write_bytes(GOOD)
    bad.write_bytes(GOOD[:-1])
    before = sorted(Path("/dev/fd").iterdir())
    for _ in range(20):
        read_header(good)
        with pytest.raises(CheckpointError):
            read_header(bad)
    assert sorted(Path("/dev/fd").iterdir()) == before


def test_the_identity_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    before = read_header(path).identity
    assert read_header(path).identity == before
    os.utime(path, ns=(1, 1))
    after = read_header(path).identity
    assert (after.size, after.inode) == (before.size, before.inode)
    assert after != before
    with path.open("rb") as file:
        assert FileIdentity.of(file.fileno()) == after
