"""The files that a conversion fetches first; the Hub itself is in tests/checkpoint/hub/test_open_and_fetch.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from t5g2convert import convert, plan
from t5g2convert.checkpoint.file_names import SINGLE_FILE
from t5g2convert.checkpoint.file_store import HubFile, HubOrigin
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest, seal
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.conversion.convert import execute, prepare
from t5g2convert.conversion.options import ConvertOptions, PlanOptions, WriteOptions
from t5g2convert.conversion.plan.builder import build_plan, open_sources
from t5g2convert.conversion.write.resources import ASSET_BYTES, disk_space
from t5g2convert.errors import CheckpointError, OutputError
from tests.conftest import TwinFolder

SHA = "0123456789" * 4


def as_model(folder: Path, *away: str) -> Checkpoint:
    """Return a folder as a model snapshot with some files still on the Hub."""
    checkpoint = open_checkpoint(folder)
    files = {path.name: HubFile(path.stat().st_size, None) for path in folder.iterdir()}
    for name in away:
        (folder / name).unlink()
    return replace(checkpoint, hub=HubOrigin("google/gemma-demo", SHA, files))


def test_local_files_are_not_fetched(demo_source: Path) -> None:
    for sources in Sources.open(demo_source), Sources.open(str(demo_source)), Sources(as_model(demo_source)):
        reads = plan(sources.source).reads
        assert sources.missing(reads) == {}
        assert sources.fetch(reads) == sources


def test_a_plan_lists_the_files_it_reads_from_each_checkpoint(demo_source: Path, twin_folder: TwinFolder) -> None:
    assert plan(demo_source).reads == {
        "source": (SINGLE_FILE, "tokenizer.json", "tokenizer_config.json", "config.json"),
    }
    donor = twin_folder("images-sharded")
    reads = plan(twin_folder("text-8"), vision_from=donor, projector="copy").reads
    assert reads["source"] == (SINGLE_FILE,)
    tower = {item.file for name, item in open_checkpoint(donor).tensors.items() if "language_model" not in name}
    assert set(reads["vision_from"]) == {*tower, "config.json"}


def test_output_and_download_must_fit_on_a_disk_that_they_share(
    demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (demo_source / SINGLE_FILE).stat().st_size
    model = as_model(demo_source, SINGLE_FILE)
    made = plan(model)
    need = made.nbytes + (64 << 20) + size
    usage = shutil._ntuple_diskusage(need, 1, need - 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=f"has {need - 1:,} bytes free, the output needs {need:,}"):
        prepare(model, tmp_path / "new/out", ConvertOptions())


def test_a_checkpoint_that_is_open_already_is_converted(demo_source: Path, tmp_path: Path) -> None:
    model = as_model(demo_source)
    convert(model, tmp_path / "model", flush=False)
    convert(demo_source, tmp_path / "folder", flush=False)
    manifests = [read_manifest(tmp_path / name).document() for name in ("model", "folder")]
    assert manifests[0]["source"].pop("hub") == {"repo": "google/gemma-demo", "revision": SHA}
    assert {**manifests[0], "sha256": ""} == {**manifests[1], "sha256": ""}


@pytest.mark.parametrize("away", ["source", "donor"])
@pytest.mark.parametrize("shared", ["source", "donor"])
def test_a_download_counts_where_it_goes(
    away: str, shared: str, twin_folder: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two models is still on the Hub; the cache of one of them is on the output's disk."""
    for name, twin in (("source", "text-8"), ("donor", "donor-wide")):
        shutil.copytree(twin_folder(twin), tmp_path / name)
    size = (tmp_path / away / SINGLE_FILE).stat().st_size
    models = {name: as_model(tmp_path / name, *([SINGLE_FILE] if name == away else [])) for name in ("source", "donor")}
    monkeypatch.setattr(
        "t5g2convert.conversion.write.resources._same_disk", lambda cache, _: cache == tmp_path / shared
    )
    options = PlanOptions(vision_from=models["donor"])
    sources = open_sources(models["source"], options)
    made = build_plan(sources, options)
    needed = disk_space(made, sources, tmp_path / "out")
    assert needed.download == size
    assert needed.output == made.nbytes + ASSET_BYTES + (size if away == shared else 0)


def test_the_plan_uses_the_fetched_files(demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (demo_source / SINGLE_FILE).read_bytes()
    model = as_model(demo_source, SINGLE_FILE)
    reported: list[int] = []

    def download(hub: HubOrigin, name: str, progress: object) -> None:
        (demo_source / name).write_bytes(data)

    monkeypatch.setattr("t5g2convert.checkpoint.hub.open_and_fetch.download", download)
    made, sources = prepare(
        model, tmp_path / "out", ConvertOptions(), downloading=lambda total: reported.append(total) or reported.append
    )
    assert reported == [len(data)]
    assert made.source_files[0].identity == open_checkpoint(demo_source).files[SINGLE_FILE].identity
    assert sources.folders.all == (demo_source,)
    assert execute(made, sources.folders, tmp_path / "out", WriteOptions(flush=False)).tensors == len(made.tensors)


@pytest.mark.parametrize("hub", [{"repo": "a/b"}, {"repo": "a/b", "revision": SHA, "url": ""}, "a/b"])
def test_a_manifest_records_only_repository_and_commit(demo_source: Path, tmp_path: Path, hub: object) -> None:
    convert(demo_source, tmp_path / "out", flush=False)
    path = tmp_path / "out" / MANIFEST_FILE
    document = json.loads(path.read_bytes())
    document["source"]["hub"] = hub
    path.write_bytes(seal(document))
    with pytest.raises(CheckpointError, match=r"t5g2\.json: source: "):
        read_manifest(tmp_path / "out")
