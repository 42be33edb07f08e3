import json
import os
import shutil
from pathlib import Path

import pytest

from t5g2convert import verify
from t5g2convert.checkpoint.manifest import read_manifest, seal
from t5g2convert.parity.reports.report import Check, Report, record_report
from tests.conftest import TwinFolder


@pytest.fixture
def folder(converted_twin: TwinFolder, tmp_path: Path) -> Path:
    shutil.copytree(converted_twin("images-8"), tmp_path / "out")
    return tmp_path / "out"


def report(folder: Path, detail: str = "sound", *, passed: bool = True) -> Report:
    return Report(folder, None, "bfloat16", "cpu", 0.0, (Check("integrity", passed, detail),), {}, (), {"total": 5})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_manifest_gets_the_result_and_keeps_the_rest(folder: Path) -> None:
    before, files = read_manifest(folder), names(folder)
    given = report(folder)
    assert record_report(given, before) == given
    after = read_manifest(folder).document()
    assert after.pop("verification") == given.record()
    del after["sha256"]
    assert after == {key: value for key, value in before.document().items() if key != "sha256"}
    assert names(folder) == files


def test_a_second_result_replaces_the_first(folder: Path) -> None:
    record_report(report(folder, "first"), read_manifest(folder))
    first = (folder / "t5g2.json").read_bytes()
    record_report(report(folder, "second", passed=False), read_manifest(folder))
    assert read_manifest(folder).document()["verification"]["passed"] is False
    assert "first" not in (folder / "t5g2.json").read_text()
    record_report(report(folder, "first"), read_manifest(folder))
    assert (folder / "t5g2.json").read_bytes() == first


def test_the_file_keeps_its_permissions(folder: Path) -> None:
    (folder / "t5g2.json").chmod(0o640)
    umask = os.umask(0o077)
    try:
        record_report(report(folder), read_manifest(folder))
    finally:
        os.umask(umask)
    assert (folder / "t5g2.json").stat().st_mode & 0o777 == 0o640


def test_a_failed_verification_is_recorded_too(folder: Path, twin_folder: TwinFolder) -> None:
    (folder / "generation_config.json").write_text("{}")
    found = verify(folder, twin_folder("images-8"))
    assert not found.passed
    recorded = read_manifest(folder).document()["verification"]
    assert recorded == found.record()
    assert [check["name"] for check in recorded["checks"] if not check["passed"]] == ["integrity", "config"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("no json"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "generation_config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"num_hidden_layers": 8', '"num_hidden_layers": 9')
        ),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"intermediate_size": 40', '"intermediate_size": 41')
        ),
    ],
    ids=["other", "no json", "no config", "no generation", "no header", "no weights", "deeper", "wider"],
)
def test_no_local_path_gets_into_the_manifest(damage: object, folder: Path, twin_folder: TwinFolder) -> None:
    assert callable(damage)
    damage(folder)
    assert not verify(folder, twin_folder("images-8")).passed
    text = (folder / "t5g2.json").read_text()
    assert read_manifest(folder).document()["verification"]["passed"] is False
    assert str(folder.parent) not in text


def test_a_folder_whose_name_is_no_text_is_recorded(folder: Path, twin_folder: TwinFolder) -> None:
    odd = folder.with_name(os.fsdecode(b"out-\xff"))
    folder.rename(odd)
    (odd / "config.json").write_text("{}")
    assert not verify(odd, twin_folder("images-8")).passed
    assert read_manifest(odd).document()["verification"]["passed"] is False


def test_a_folder_that_may_not_be_written_is_a_remark(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)
    try:
        given = report(folder)
        found = record_report(given, read_manifest(folder))
    finally:
        folder.chmod(0o700)
    assert found.passed
    assert "Permission denied" in found.remarks[-1]
    assert "verification" not in read_manifest(folder).document()


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "rename"])
def test_a_result_that_cannot_be_written_is_a_remark_and_leaves_the_manifest(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, before, files = read_manifest(folder), (folder / "t5g2.json").read_bytes(), names(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if call == "rename":
            patch.setattr(os, "replace", fail)
        found = record_report(report(folder), manifest)
    assert found.passed
    assert "Read-only file system" in found.remarks[-1]
    assert (folder / "t5g2.json").read_bytes() == before
    assert names(folder) == files


def test_a_stranger_in_the_way_of_the_staged_file_does_no_harm(folder: Path) -> None:
    (folder / f".t5g2.json.{os.getpid()}").write_text("left by a run that was killed")
    record_report(report(folder), read_manifest(folder))
    assert read_manifest(folder)
    record_report(report(folder), read_manifest(folder))
    assert "verification" in read_manifest(folder).document()
    assert (folder / "t5g2.json").read_bytes() == seal(json.loads((folder / "t5g2.json").read_text()))


def test_a_manifest_that_is_a_link_is_left_alone(folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "blob"
    (folder / "t5g2.json").rename(shared)
    (folder / "t5g2.json").symlink_to(shared)
    before = shared.read_bytes()
    found = record_report(report(folder), read_manifest(folder))
    assert found.passed
    assert "link" in found.remarks[-1]
    assert shared.read_bytes() == before
    assert (folder / "t5g2.json").is_symlink()
