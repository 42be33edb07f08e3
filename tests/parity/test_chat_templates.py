"""More chat templates are copied byte for byte; changed, added and missing ones are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from t5g2convert import convert, verify
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest, seal
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.conversion.convert import Conversion
from t5g2convert.publish.sent_files import manifest_files
from tests.conftest import TwinFolder

FOLDER = "additional_chat_templates"
RAG, TOOLS = f"{FOLDER}/rag.jinja", f"{FOLDER}/tool_use.jinja"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates") / "source"
    build_demo_source(folder)
    (folder / FOLDER).mkdir()
    (folder / RAG).write_text("{{ documents }}")
    (folder / TOOLS).write_bytes(b"{{ tools }}\r\n")
    return folder


@pytest.fixture
def output(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "out", flush=False)
    return tmp_path / "out"


def failed(output: Path, source: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(output, source).checks if not check.passed}


def reseal(output: Path) -> None:
    """Write a manifest of the current files."""
    from t5g2convert.checkpoint.file_store import sha256_of

    manifest = read_manifest(output).document()
    paths = [path for path in output.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]
    manifest["files"] = {
        str(path.relative_to(output)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }
    (output / MANIFEST_FILE).write_bytes(seal(manifest))


def test_they_are_copied_listed_and_checked(source: Path, output: Path) -> None:
    for name in (RAG, TOOLS):
        assert (output / name).read_bytes() == (source / name).read_bytes()
        assert name in read_manifest(output).document()["files"]
    before = (output / MANIFEST_FILE).read_bytes()
    assert failed(output, source) == {}
    assert {RAG, TOOLS} <= {file.name for file in manifest_files(output)}
    # Writing again gives the same folder and replaces the old one.
    convert(source, output, overwrite=True, flush=True)
    assert (output / MANIFEST_FILE).read_bytes() == before


def changed(output: Path) -> None:
    (output / RAG).write_text("{{ lies }}")


def missing(output: Path) -> None:
    (output / RAG).unlink()


def all_missing(output: Path) -> None:
    shutil.rmtree(output / FOLDER)


def added(output: Path) -> None:
    (output / FOLDER / "more.jinja").write_text("x")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "changed": (changed, RAG),
    "missing": (missing, RAG),
    "all missing": (all_missing, RAG),
    "added": (added, f"{FOLDER}/more.jinja"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", DAMAGES)
def test_I18_another_template_is_found(case: str, source: Path, output: Path) -> None:
    damage, name = DAMAGES[case]
    damage(output)
    found = failed(output, source)
    assert name in found["integrity"]
    assert f"{name} differs from the source's" in found["tokenizer"]
    # With a manifest as the converter writes it.
    reseal(output)
    found = failed(output, source)
    assert "integrity" not in found
    assert f"{name} differs from the source's" in found["tokenizer"]


def test_only_templates_may_be_in_the_folder(source: Path, output: Path) -> None:
    (output / FOLDER / "code.py").write_text("x")
    assert f"{FOLDER}/code.py is not in t5g2.json" in failed(output, source)["integrity"]


def test_the_extracted_decoder_has_them_but_the_encoder_does_not(source: Path, output: Path, tmp_path: Path) -> None:
    for part, has in (("decoder", True), ("encoder", False)):
        convert(output, tmp_path / part, part=part, flush=False)
        assert (tmp_path / part / RAG).exists() == has
        assert failed(tmp_path / part, output) == {}
    (tmp_path / "decoder" / RAG).write_text("x")
    assert "differs from the source's" in failed(tmp_path / "decoder", output)["tokenizer"]


def test_templates_of_gemma_2_are_copied(twin_folder: TwinFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(twin_folder("gemma2-5"), tmp_path / "source")
    (folder / FOLDER).mkdir()
    (folder / RAG).write_text("x")
    made: Conversion = convert(folder, tmp_path / "out", flush=False)
    assert failed(made.output, folder) == {}
    changed(made.output)
    reseal(made.output)
    assert f"{RAG} differs from the source's" in failed(made.output, folder)["tokenizer"]


@pytest.mark.parametrize("name", [f"{FOLDER}/../x.jinja", f"{FOLDER}/a/x.jinja", "other/x.jinja", f"{FOLDER}/x.txt"])
def test_a_manifest_that_lists_another_path_is_refused(name: str, source: Path, output: Path) -> None:
    manifest = read_manifest(output).document()
    manifest["files"][name] = manifest["files"][RAG]
    (output / MANIFEST_FILE).write_bytes(seal(manifest))
    assert name in failed(output, source)["integrity"]
    from t5g2convert.errors import CheckpointError

    with pytest.raises(CheckpointError) as refused:
        manifest_files(output)
    assert any(name in detail for detail in refused.value.details), json.dumps(refused.value.details)


def test_a_symlinked_template_folder_is_not_uploaded(output: Path, tmp_path: Path) -> None:
    from t5g2convert.errors import CheckpointError

    (output / FOLDER).rename(tmp_path / "elsewhere")
    (output / FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as refused:
        manifest_files(output)
    assert any("linked folder" in detail for detail in refused.value.details)
