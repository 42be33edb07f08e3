import hashlib
from pathlib import Path

import pytest

from t5g2convert.checkpoint.file_store import PIECE_BYTES, sha256_of


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7])
def test_sha256_of_files_of_all_sizes(tmp_path: Path, size: int) -> None:
    contents = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "x").write_bytes(contents)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(contents).hexdigest()
