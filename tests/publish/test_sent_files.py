"""Which files of a folder are uploaded, and which folders are refused; no network."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from t5g2convert import convert
from t5g2convert.checkpoint.manifest import read_manifest, seal
from t5g2convert.errors import CheckpointError
from t5g2convert.publish.sent_files import local_card, manifest_files

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def out(demo_folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folders / "out", tmp_path / "out"))


def names(folder: Path) -> list[str]:
    return [file.name for file in manifest_files(folder)]


def cached(out: Path, shared: bool) -> Path:
    """Return the folder as in the Hub's cache: a snapshot of links; with `shared` its blobs are links too."""
    cache = out.parent / "hub"
    blobs, snapshot = cache / "models--ann--model/blobs", cache / f"models--ann--model/snapshots/{SHA}"
    for folder in (blobs, snapshot, cache / "blobs/ab"):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(out.iterdir())):
        if shared:
            shutil.copy(path, cache / f"blobs/ab/{number}")
            (blobs / str(number)).symlink_to(f"../../blobs/ab/{number}")
        else:
            shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_all_files_of_the_manifest_and_the_manifest_are_read(out: Path) -> None:
    progress: list[str] = []
    files = manifest_files(out, progress.append)
    assert sorted(progress) == [file.name for file in files] == sorted(path.name for path in out.iterdir())
    for file in files:
        data = (out / file.name).read_bytes()
        assert (file.content, file.size) == (out / file.name, len(data))
        assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_H5_nothing_else_of_the_folder_is_sent(out: Path) -> None:
    expected = names(out)
    (out / ".env").write_text("HF_TOKEN=secret")
    (out / "optimizer.pt").write_bytes(b"mine")
    (out / "model.safetensors.tmp").write_bytes(b"half")
    (out / ".cache").mkdir()
    (out / ".cache/x").write_bytes(b"x")
    (out / "notes.txt").symlink_to("/etc/passwd")
    assert names(out) == expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "t5g2.json"])
def test_H5_a_link_is_refused_though_its_target_has_the_right_bytes(out: Path, name: str) -> None:
    (out / name).rename(out.parent / "elsewhere")
    (out / name).symlink_to(out.parent / "elsewhere")
    with pytest.raises(CheckpointError) as error:
        manifest_files(out)
    assert "is a link out of the folder" in str([error.value.message, *error.value.details])


@pytest.mark.parametrize("shared", [False, True])
def test_H5_links_of_the_hubs_cache_are_followed(out: Path, shared: bool) -> None:
    snapshot = cached(out, shared)
    files = manifest_files(snapshot)
    assert [file.name for file in files] == names(out)
    assert not any(isinstance(file.content, Path) and file.content.is_symlink() for file in files)
    linked = out.parent / "linked"
    linked.symlink_to(snapshot)
    assert names(linked) == names(out)


@pytest.mark.parametrize("place", ["blobs of another model", "a snapshot by no commit", "a folder by another name"])
def test_H5_links_that_only_look_like_the_caches_are_refused(out: Path, place: str) -> None:
    snapshot = cached(out, shared=False)
    if place == "blobs of another model":
        other = snapshot.parents[2] / "models--bo--secret/blobs"
        other.mkdir(parents=True)
        shutil.copy(out / "config.json", other / "0")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to("../../../models--bo--secret/blobs/0")
    elif place == "a snapshot by no commit":
        snapshot = snapshot.rename(snapshot.with_name("main"))
    else:
        snapshot.parents[1].rename(snapshot.parents[2] / "ann--model")
        snapshot = snapshot.parents[2] / f"ann--model/snapshots/{SHA}"
    with pytest.raises(CheckpointError, match=r"cannot be sent|is a link out of the folder"):
        manifest_files(snapshot)


def test_H5_special_files_are_refused_without_blocking(out: Path) -> None:
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to("gone")
    with pytest.raises(CheckpointError) as error:
        manifest_files(out)
    assert set(error.value.details) == {"config.json is not a regular file", "tokenizer.json is a broken symlink"}


def damage_a_byte(out: Path) -> None:
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_a_byte, "model.safetensors has the wrong sha256"),
        (lambda out: os.truncate(out / "model.safetensors", 100), "model.safetensors has 100 bytes, expected"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
    ids=["byte", "cut", "missing"],
)
def test_a_damaged_file_is_named(out: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(out)
    (out / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        manifest_files(out)
    assert len(error.value.details) == 2
    assert error.value.details[0].startswith("config.json has 2 bytes")
    assert error.value.details[1].startswith(message)


def test_a_manifest_that_was_changed_or_is_missing_is_refused(out: Path) -> None:
    text = (out / "t5g2.json").read_text()
    (out / "t5g2.json").write_text(text.replace('"bytes": ', '"bytes":  ', 1))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        manifest_files(out)
    (out / "t5g2.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        manifest_files(out)
    with pytest.raises(CheckpointError, match="no such folder"):
        manifest_files(out.parent / "nowhere")


@pytest.mark.parametrize("name", [".env", "../secret", "/etc/passwd", "a\\b", "README.md", "t5g2.json"])
def test_H5_names_that_no_conversion_writes_are_refused(out: Path, name: str) -> None:
    """The manifest may come from elsewhere; it is sealed nevertheless."""
    (out.parent / "secret").write_bytes(b"")
    for place in (".env", "README.md"):
        (out / place).write_bytes(b"")
    manifest = read_manifest(out).document()
    manifest["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (out / "t5g2.json").write_bytes(seal(manifest))
    with pytest.raises(CheckpointError) as error:
        manifest_files(out)
    assert error.value.details == (f"{name} is not a file name that a conversion writes",)


def test_a_folder_without_hashes_gets_them(demo_folders: Path, tmp_path: Path) -> None:
    convert(demo_folders / "src", tmp_path / "out", hashing=False, flush=False)
    assert {facts["sha256"] for facts in json.loads((tmp_path / "out/t5g2.json").read_text())["files"].values()} == {
        None
    }
    for file in manifest_files(tmp_path / "out"):
        assert file.sha256 == hashlib.sha256((tmp_path / "out" / file.name).read_bytes()).hexdigest()


def test_the_card_of_a_folder(out: Path) -> None:
    assert local_card(out) is None
    (out / "README.md").write_text("# mine\n")
    assert local_card(out) == "# mine\n"
    (out / "README.md").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        local_card(out)
    (out / "README.md").unlink()
    (out / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        local_card(out)
