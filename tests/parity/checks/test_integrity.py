import os
import shutil
from pathlib import Path

import pytest

from t5g2convert import CheckpointError, convert
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, FileRecord, read_manifest, seal
from t5g2convert.parity.checks.integrity import judge_integrity, matches_its_files, unreadable_manifest
from tests.conftest import TwinFolder


@pytest.fixture
def folder(converted_twin: TwinFolder, tmp_path: Path) -> Path:
    """Return a sharded conversion that the test may damage."""
    shutil.copytree(converted_twin("images-8"), tmp_path / "out")
    return tmp_path / "out"


def listed(folder: Path) -> dict[str, FileRecord]:
    return read_manifest(folder).files


def test_a_sound_folder_has_the_files_of_its_manifest(folder: Path) -> None:
    files = listed(folder)
    check = judge_integrity(folder, files)
    assert check.passed
    assert check.offenders == ()
    assert f"{len(files)} files" in check.detail


def test_V2_one_changed_byte_of_any_file_names_the_file(folder: Path) -> None:
    files = listed(folder)
    for name in files:
        sound = (folder / name).read_bytes()
        for at in {0, len(sound) // 2, len(sound) - 1}:
            damaged = bytearray(sound)
            damaged[at] ^= 1
            (folder / name).write_bytes(damaged)
            assert judge_integrity(folder, files).offenders == (f"{name} has a different sha256",)
        (folder / name).write_bytes(sound)
    assert judge_integrity(folder, files).passed


def test_a_wrong_size_and_a_missing_file_are_named(folder: Path) -> None:
    files = listed(folder)
    (folder / "config.json").unlink()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    size = files["model.safetensors"].bytes
    check = judge_integrity(folder, files)
    assert not check.passed
    assert set(check.offenders) == {
        "config.json is missing",
        f"model.safetensors has {size + 1} bytes, expected {size}",
    }
    assert "2 file" in check.detail


def test_a_folder_in_place_of_a_file_is_a_missing_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert judge_integrity(folder, listed(folder)).offenders == ("config.json is missing",)


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "added_tokens.json",
        "modeling.py",
        "x.bin",
        "ADAPTER_CONFIG.JSON",
        "vocab.txt",
    ],
)
def test_an_extra_file_that_a_loader_reads_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert judge_integrity(folder, listed(folder)).offenders == (f"{name} is not in t5g2.json",)


@pytest.mark.parametrize("name", ["custom_generate", "additional_chat_templates", "onnx"])
def test_an_extra_folder_that_a_loader_reads_is_named(folder: Path, name: str) -> None:
    """Generation code and chat templates are loaded without any config key."""
    (folder / name).mkdir()
    assert judge_integrity(folder, listed(folder)).offenders == (f"{name}/ is not in t5g2.json",)
    (folder / name).rename(folder / f".{name}")
    assert judge_integrity(folder, listed(folder)).passed


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "report.html", "report.xml"])
def test_an_extra_file_that_no_loader_reads_is_allowed(folder: Path, name: str) -> None:
    (folder / name).write_text("mine")
    assert judge_integrity(folder, listed(folder)).passed


def test_without_hashes_only_sizes_are_checked_and_reported(twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(twin_folder("images-8"), tmp_path / "out", hashing=False)
    files = listed(tmp_path / "out")
    check = judge_integrity(tmp_path / "out", files)
    assert check.passed
    assert "4 files" in check.detail
    assert "no sha256" in check.detail
    (tmp_path / "out/config.json").write_text("{}")
    assert not judge_integrity(tmp_path / "out", files).passed


def test_a_manifest_without_files_fails(folder: Path) -> None:
    check = judge_integrity(folder, {})
    assert not check.passed
    assert "no files" in check.detail


@pytest.mark.parametrize("files", [None, {}, [], "model.safetensors", 3])
def test_a_file_list_of_another_type_fails(folder: Path, files: object) -> None:
    document = read_manifest(folder).document()
    assert matches_its_files(folder, document)
    assert not matches_its_files(folder, document | {"files": files})
    assert not matches_its_files(folder, {})


@pytest.mark.parametrize(
    "record",
    [None, 5, "x", {}, {"bytes": 5}, {"sha256": None}, {"bytes": "5", "sha256": None}, {"bytes": True, "sha256": None}],
    ids=str,
)
def test_a_record_without_a_size_and_a_sha256_is_a_fault(folder: Path, record: object) -> None:
    document = read_manifest(folder).document()
    document["files"]["config.json"] = record
    assert not matches_its_files(folder, document)
    (folder / MANIFEST_FILE).write_bytes(seal(document))
    with pytest.raises(CheckpointError, match="files"):
        read_manifest(folder)


def test_an_unreadable_file_is_reported(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "config.json").chmod(0)
    assert judge_integrity(folder, listed(folder)).offenders == ("config.json cannot be read: Permission denied",)


def test_an_unreadable_manifest_fails_without_the_folders_path(tmp_path: Path) -> None:
    check = unreadable_manifest(CheckpointError("is missing", where=tmp_path / MANIFEST_FILE))
    assert (check.name, check.passed, check.detail) == ("integrity", False, "t5g2.json is missing")
