import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.checkpoint.manifest import FORMAT, MANIFEST_FILE, SEAL, encode_json, read_manifest, seal
from t5g2convert.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("soon")

DOCUMENT: dict[str, Any] = {
    "format": FORMAT,
    "tool": {"name": "t5g2convert", "version": "0"},
    "options": {},
    "mapping": {"name": "gemma3", "sha256": "0" * 64},
    "source": {"family": "gemma3", "layout": {"text": ""}, "files": {"Zürich.json": {"bytes": 5, "sha256": None}}},
    "dtype": "bfloat16",
    "parameters": {"embedding": 7, "total": 7},
    "dropped": [{"name": "lm_head.weight", "because": "the softmax is tied"}],
    "changes": [{"field": "sliding_window", "source": 4, "target": 8.0}],
    "tokens": [{"token": "<image_soft_token>", "source": None, "target": 256_001, "replaces": "<unused99>"}],
    "notes": ["ünïcode stays, \x1b is escaped"],
    "files": {"config.json": {"bytes": 3, "sha256": "1" * 64}},
}


def write(folder: Path, text: bytes) -> Path:
    (folder / MANIFEST_FILE).write_bytes(text)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert caught.value.where == str(folder / MANIFEST_FILE)
    return caught.value.message


def test_json_is_written_in_one_form() -> None:
    assert encode_json({"b": [1], "a": "ü\x1b"}) == '{\n  "b": [\n    1\n  ],\n  "a": "ü\\u001b"\n}\n'.encode()


def test_the_seal_is_last_and_is_the_sha256_of_everything_else() -> None:
    sealed = json.loads(seal(DOCUMENT))
    assert list(sealed) == [*DOCUMENT, SEAL]
    assert sealed.pop(SEAL) == hashlib.sha256(encode_json(DOCUMENT)).hexdigest()
    assert sealed == DOCUMENT


def test_a_sealed_manifest_is_read_unchanged(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, seal(DOCUMENT)))
    assert manifest.document() == {**DOCUMENT, SEAL: manifest.sha256}
    assert manifest.unverified() == DOCUMENT
    assert manifest.encode() == seal(DOCUMENT)


def test_an_older_seal_is_replaced_at_any_position(tmp_path: Path) -> None:
    first = {SEAL: "0" * 64, **DOCUMENT}
    assert seal(first) == seal(DOCUMENT)
    older = json.loads(seal(DOCUMENT))
    grown = seal({**older, "verification": {"passed": True}})
    assert list(json.loads(grown)) == [*DOCUMENT, "verification", SEAL]
    assert json.loads(grown)[SEAL] != older[SEAL]
    assert read_manifest(write(tmp_path, grown)).document()["verification"] == {"passed": True}


def test_V2_a_change_of_any_byte_shows(tmp_path: Path) -> None:
    text = seal(DOCUMENT)
    for at in range(len(text)):
        damaged = bytearray(text)
        damaged[at] ^= 1
        refused(write(tmp_path, bytes(damaged)))
    for at in range(0, len(text), 7):
        refused(write(tmp_path, text[:at] + text[at + 1 :]))
        refused(write(tmp_path, text[:at] + b" " + text[at:]))
    assert read_manifest(write(tmp_path, text))


@pytest.mark.parametrize(
    "respelled",
    [
        lambda document: json.dumps(document).encode(),
        lambda document: json.dumps(document, indent=2).encode(),
        lambda document: json.dumps(document, indent=2, ensure_ascii=True).encode() + b"\n",
        lambda document: encode_json({SEAL: document[SEAL], **document}),
        lambda document: encode_json(dict(reversed(document.items()))),
        lambda document: encode_json(document).replace(b"\n", b"\r\n"),
    ],
    ids=["one line", "no line end", "escaped", "seal first", "reversed", "CRLF"],
)
def test_the_same_values_in_another_form_are_another_manifest(tmp_path: Path, respelled: object) -> None:
    assert callable(respelled)
    write(tmp_path, respelled(json.loads(seal(DOCUMENT))))
    assert refused(tmp_path) == "was changed after it was written: its sha256 does not match its contents"


def test_a_manifest_without_a_seal_is_refused(tmp_path: Path) -> None:
    assert "sha256 does not match" in refused(write(tmp_path, encode_json(DOCUMENT)))


def test_the_seal_of_another_manifest_is_refused(tmp_path: Path) -> None:
    other = json.loads(seal({**DOCUMENT, "notes": []}))
    write(tmp_path, encode_json({**DOCUMENT, SEAL: other[SEAL]}))
    assert "sha256 does not match" in refused(tmp_path)


@pytest.mark.parametrize("number", [0, FORMAT + 1, "1", None])
def test_another_format_is_reported_even_if_its_seal_fits(tmp_path: Path, number: object) -> None:
    write(tmp_path, seal({**DOCUMENT, "format": number}))
    assert refused(tmp_path) == f"has format {number!r}, expected {FORMAT}"


def test_a_manifest_without_a_format_is_reported(tmp_path: Path) -> None:
    assert refused(write(tmp_path, seal({}))) == f"has format None, expected {FORMAT}"


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff{}", b'{"format": 1, "format": 1}', b"null"])
def test_a_manifest_that_is_not_a_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    refused(write(tmp_path, text))


def test_a_missing_manifest_is_reported(tmp_path: Path) -> None:
    assert refused(tmp_path) == "is missing"
    (tmp_path / MANIFEST_FILE).mkdir()
    assert refused(tmp_path) == "is not a regular file"


@pytest.mark.parametrize("key", sorted(DOCUMENT.keys() - {"format"}))
def test_a_manifest_that_lacks_a_part_or_has_nonsense_there_is_refused(tmp_path: Path, key: str) -> None:
    assert key in refused(write(tmp_path, seal({name: value for name, value in DOCUMENT.items() if name != key})))
    everything: list[Any] = [5, None, [5], [[]], {"x": []}]
    for nonsense in everything:
        assert key in refused(write(tmp_path, seal({**DOCUMENT, key: nonsense})))


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    assert "stranger" in refused(write(tmp_path, seal({**DOCUMENT, "stranger": 1})))
