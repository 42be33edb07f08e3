"""sha256 of a whole file."""

import hashlib
from pathlib import Path
from typing import Final

PIECE_BYTES: Final = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal, in bounded memory.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
