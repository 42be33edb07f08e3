"""The local store of the xet client, `local:///dir`: its files and their bytes."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ENTRY: Final = 48
"""Bytes of every record of a shard."""

VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30
"""Flags of a file's record: as many records of verification follow its segments, and one with its sha256."""


def connection(store: Path) -> dict[str, Any]:
    """Return what the client needs to reach the storage."""
    return {"casUrl": f"local://{store}", "accessToken": "xet_token", "exp": int(time.time()) + 3600}


def connection_headers(store: Path) -> dict[str, str]:
    """Return the same as headers for huggingface_hub; hf_xet itself reads the JSON."""
    info = connection(store)
    names = {"X-Xet-Cas-Url": "casUrl", "X-Xet-Access-Token": "accessToken", "X-Xet-Token-Expiration": "exp"}
    return {header: str(info[key]) for header, key in names.items()}


def hashes(store: Path) -> dict[str, str]:
    """Return the xet hashes of the files in a store, by sha256."""
    found: dict[str, str] = {}
    for path in sorted((store / "xet/xorbs/shards").glob("*.mdb")):
        found.update(_files(path.read_bytes()))
    return found


def read(store: Path, xet_hash: str, size: int) -> bytes:
    """Return the bytes of a file in a store; the client reads a copy, because a store has one user at a time."""
    import hf_xet

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "store"
        shutil.copytree(store, copy)
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{copy}", token="xet_token", token_expiry_unix_secs=int(time.time()) + 3600
        )
        with group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{folder}/file")
        return (Path(folder) / "file").read_bytes()


def _files(shard: bytes) -> Iterator[tuple[str, str]]:
    """Return sha256 and xet hash of the files in a shard, up to the end record of ones."""
    place = ENTRY
    while shard[place : place + 32] != b"\xff" * 32:
        flags, segments = (int.from_bytes(shard[place + at : place + at + 4], "little") for at in (32, 36))
        end = place + ENTRY * (1 + segments * (2 if flags & VERIFIED else 1))
        if flags & WITH_SHA256:
            yield _hex(shard[end : end + 32]), _hex(shard[place : place + 32])
        place = end + (ENTRY if flags & WITH_SHA256 else 0)


def _hex(digest: bytes) -> str:
    """Return a hash in its text form: four 64-bit numbers."""
    return "".join(f"{int.from_bytes(digest[at : at + 8], 'little'):016x}" for at in range(0, 32, 8))
