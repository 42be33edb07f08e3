"""Files on the Hub compared with local ones."""

import hashlib
from pathlib import Path

import pytest

from t5g2convert.publish.repository import RemoteFile
from t5g2convert.publish.sent_files import LocalFile

SHA256 = hashlib.sha256(b"hello\n").hexdigest()


@pytest.mark.parametrize("content", ["bytes", "file"])
def test_a_small_file_is_compared_by_its_git_object_id(content: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello\n")
    local = LocalFile("x", b"hello\n" if content == "bytes" else tmp_path / "x", 6, SHA256)
    # echo hello | git hash-object --stdin
    assert RemoteFile(6, "ce013625030ba8dba906f756967f9e9ca394464a", None).is_same(local)
    assert not RemoteFile(6, "ce013625030ba8dba906f756967f9e9ca394464b", None).is_same(local)
    assert not RemoteFile(7, "ce013625030ba8dba906f756967f9e9ca394464a", None).is_same(local)


def test_a_small_file_that_changed_since_it_was_hashed_is_not_the_same(tmp_path: Path) -> None:
    # echo hallo | git hash-object --stdin
    (tmp_path / "x").write_bytes(b"hallo\n")
    assert not RemoteFile(6, "ba2906d0666cf726c7eaadd2cd3db615dedfdf3a", None).is_same(
        LocalFile("x", tmp_path / "x", 6, SHA256)
    )


def test_a_large_file_is_compared_by_its_sha256() -> None:
    local = LocalFile("x", Path("not read"), 6, SHA256)
    assert RemoteFile(6, "", SHA256).is_same(local)
    assert not RemoteFile(6, "", "0" * 64).is_same(local)
