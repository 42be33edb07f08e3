"""Verification of models with another RoPE factor or window than their source."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import Report, convert, verify
from t5g2convert.checkpoint.manifest import seal
from tests.conftest import TwinFolder

OPTIONS: list[dict[str, Any]] = [
    {"rope_scaling": "linear:8"},
    {"sliding_window": 4},
    {"rope_scaling": "linear:2.5", "sliding_window": 9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["text-13", "images-8"])
def test_parity_uses_the_source_settings_and_the_report_says_so(
    name: str, options: dict[str, Any], twin_folder: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder(name), tmp_path / "out", flush=False, **options)
    report = verify(tmp_path / "out", twin_folder(name), record=False)
    assert report.passed
    assert all(check.figures is None or check.figures.max_abs == 0.0 for check in report.checks)
    changed = {"text-13": 8.0, "images-8": 1.0}[name], {"text-13": 6, "images-8": 5}[name]
    remarks = " ".join(report.remarks)
    if options.get("rope_scaling") == "linear:2.5" or (name == "images-8" and "rope_scaling" in options):
        assert f"factor of both stacks was changed from {changed[0]}" in remarks
    if "sliding_window" in options:
        assert f"sliding_window of both stacks was changed from {changed[1]} to {options['sliding_window']}" in remarks
    # The maximum length does not affect the computation.
    assert all("parity checks use" not in remark for remark in report.remarks if "max_position_embeddings" in remark)


def test_the_sources_own_factor_changes_nothing(twin_folder: TwinFolder, tmp_path: Path) -> None:
    done = convert(twin_folder("text-13"), tmp_path / "out", rope_scaling="linear:8", flush=False)
    changed = [change["field"] for change in json.loads((tmp_path / "out/t5g2.json").read_text())["changes"]]
    assert changed == ["image_token_index"]
    assert not any("this changes the computation" in note for note in done.notes)


def edited(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
    """Write settings into both stacks, and the options into the manifest."""
    found = json.loads((folder / "config.json").read_text())
    for stack in (found["encoder"]["text_config"], found["decoder"]):
        stack.update(config)
    (folder / "config.json").write_text(json.dumps(found))
    manifest = json.loads((folder / "t5g2.json").read_text())
    (folder / "t5g2.json").write_bytes(seal(manifest | {"options": options}))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "options",
    [
        {"rope_scaling": "yarn:8"},
        {"rope_scaling": 8},
        {"sliding_window": -3},
        {"dtype": "int8"},
        {"dtype": None},
        {"fp8": True},
        {"projector": "zeros"},
        {"mapping": "mine.yaml"},
        [],
        None,
    ],
    ids=str,
)
def test_meaningless_options_in_the_manifest_fail_integrity(
    options: Any, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", flush=False)
    edited(tmp_path / "out", {}, options)
    report = verify(tmp_path / "out", twin_folder("text-8"), record=False)
    assert "integrity" in {check.name for check in report.failed}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        # Changed but not declared, declared but not changed, and another value than declared.
        ({"sliding_window": 3}, {}),
        ({}, {"sliding_window": 3}),
        ({"sliding_window": 4}, {"sliding_window": 3}),
        ({"max_position_embeddings": 256}, {}),
        ({}, {"rope_scaling": "linear:8"}),
    ],
    ids=str,
)
def test_a_change_other_than_declared_is_found(
    config: dict[str, Any], options: dict[str, Any], twin_folder: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", flush=False)
    edited(tmp_path / "out", config, options)
    report: Report = verify(tmp_path / "out", twin_folder("text-8"), record=False)
    assert {"config", "provenance"} & {check.name for check in report.failed}
