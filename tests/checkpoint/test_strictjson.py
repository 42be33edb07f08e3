"""JSON as editors save it: other encodings than UTF-8 are named, with advice on how to save it."""

import codecs
from pathlib import Path

import pytest

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.errors import CheckpointError

TEXT = '{"model_type": "gemma3"}'


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (TEXT.encode("utf-8-sig"), "starts with a byte order mark"),
        (TEXT.encode("utf-16"), "is UTF-16 text"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is UTF-16 text"),
        (TEXT.encode("utf-16-le"), "is UTF-16 text"),
        (TEXT.encode("utf-16-be"), "is UTF-16 text"),
        (TEXT.encode("utf-32"), "is UTF-32 text"),
        (TEXT.encode("utf-32-be"), "is UTF-32 text"),
    ],
)
def test_I19_another_encoding_is_named(data: bytes, found: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        parse_object(data, Path("config.json"))
    assert refused.value.message == f"{found}, expected plain UTF-8"
    assert refused.value.hint == "save it as UTF-8 without a byte order mark"


def test_a_header_gets_no_advice_for_editors() -> None:
    with pytest.raises(CheckpointError, match="the header starts with a byte order mark") as refused:
        parse_object(TEXT.encode("utf-8-sig"), Path("model.safetensors"), "the header ")
    assert refused.value.hint is None


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_refused_in_every_file_that_is_read(name: str, demo_source: Path) -> None:
    from t5g2convert import plan

    path = demo_source / name
    path.write_bytes(codecs.BOM_UTF8 + (path.read_bytes() if path.exists() else b"{}"))
    with pytest.raises(CheckpointError, match="byte order mark") as refused:
        plan(demo_source)
    assert refused.value.where == str(path)


def test_an_index_with_a_byte_order_mark_is_refused(demo_source: Path) -> None:
    (demo_source / "model.safetensors").rename(demo_source / "a.safetensors")
    (demo_source / "model.safetensors.index.json").write_bytes(codecs.BOM_UTF8 + b"{}")
    with pytest.raises(CheckpointError, match="byte order mark"):
        open_checkpoint(demo_source)
