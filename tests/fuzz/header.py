"""Fuzz target: a header is refused with a CheckpointError, or read as the safetensors library reads it."""

from pathlib import Path

import atheris
from safetensors import deserialize

with atheris.instrument_imports(include=["t5g2convert"]):
    from t5g2convert.checkpoint.header import TensorEntry, encode_header, read_header
    from t5g2convert.errors import CheckpointError

from tests.fuzz.running import fuzz


def judge(path: Path) -> None:
    """Check a file unchanged, and again with its JSON's real length, which mutations seldom hit."""
    agree(path)
    content = path.read_bytes()
    end = content.rfind(b"}") + 1
    if end > 8:
        path.write_bytes((end - 8).to_bytes(8, "little") + content[8:])
        agree(path)


def agree(path: Path) -> None:
    try:
        header = read_header(path)
    except CheckpointError:
        return
    library = {name: (fields["dtype"], tuple(fields["shape"])) for name, fields in deserialize(path.read_bytes())}
    ours = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    assert ours == library, (ours, library)


SOUND = {
    "one": encode_header([TensorEntry("a", "U8", (2,), 0, 2)]) + b"ab",
    "three": encode_header(
        [
            TensorEntry("a.b", "BF16", (2, 3), 0, 12),
            TensorEntry("c", "F4", (4,), 12, 14),
            TensorEntry("", "F32", (), 14, 18),
        ]
    )
    + bytes(18),
}

if __name__ == "__main__":
    fuzz("headers", ".safetensors", SOUND, judge)
