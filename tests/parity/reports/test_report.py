import json
import math
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from t5g2convert import verify
from t5g2convert.checkpoint.manifest import read_manifest, seal
from t5g2convert.parity.reports.report import Check, Drift, Figures, Report, junit, record_report
from tests.conftest import TwinFolder

FIGURES = Figures(0.5, 0.25, 100, kl=0.125, agreement=0.75, departs="layers.1", drifts=(Drift("layers.1", 0.5, 0.25),))
PASSED = Check("integrity", True, "sound")
FAILED = Check("config", False, "2 settings", offenders=("a is 1", "b is 2"))
MEASURED = Check("decoder_parity", False, "apart", figures=FIGURES)


def report(*checks: Check, **changes: Any) -> Report:
    values: dict[str, Any] = {
        "output": Path("/home/me/out"),
        "source": Path("/home/me/source"),
        "dtype": "bfloat16",
        "device": "cpu",
        "tolerance": 0.0,
        "checks": checks,
        "skipped": {"vision_parity": "no images"},
        "remarks": ("a remark",),
        "parameters": {"embedding": 3, "total": 3},
    }
    return Report(**(values | changes))


def strict_json(document: object) -> Any:
    """Parse a document with strict JSON numbers (no NaN or Infinity)."""

    def refuse(number: str) -> None:
        raise AssertionError(f"{number} is no JSON")

    return json.loads(json.dumps(document), parse_constant=refuse)


def test_a_report_passes_if_all_checks_passed() -> None:
    assert report(PASSED).passed
    assert report(PASSED, PASSED).passed
    assert not report(PASSED, FAILED).passed
    assert report(PASSED, FAILED, MEASURED).failed == (FAILED, MEASURED)
    assert report(PASSED).failed == ()


def test_a_report_without_checks_fails() -> None:
    assert not report().passed


def test_json_has_all_findings() -> None:
    document = strict_json(report(PASSED, FAILED, MEASURED).to_json())
    assert document == {
        "passed": False,
        "complete": True,
        "output": "/home/me/out",
        "source": "/home/me/source",
        "dtype": "bfloat16",
        "device": "cpu",
        "tolerance": 0.0,
        "checks": [
            {"name": "integrity", "passed": True, "detail": "sound"},
            {"name": "config", "passed": False, "detail": "2 settings", "offenders": ["a is 1", "b is 2"]},
            {
                "name": "decoder_parity",
                "passed": False,
                "detail": "apart",
                "figures": {
                    "max_abs": 0.5,
                    "relative": 0.25,
                    "compared": 100,
                    "kl": 0.125,
                    "agreement": 0.75,
                    "departs": "layers.1",
                    "drifts": [{"layer": "layers.1", "max_abs": 0.5, "relative": 0.25}],
                },
            },
        ],
        "skipped": {"vision_parity": "no images"},
        "remarks": ["a remark"],
        "parameters": {"embedding": 3, "total": 3},
    }
    assert report(PASSED, source=None).to_json()["source"] is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_give_valid_json(value: float) -> None:
    figures = Figures(value, value, 5, kl=value, agreement=0.0, drifts=(Drift("norm", value, value),))
    document = strict_json(report(Check("decoder_parity", False, "apart", figures=figures)).to_json())
    assert document["passed"] is False
    found = document["checks"][0]["figures"]
    assert (found["max_abs"], found["kl"], found["compared"], found["agreement"]) == (None, None, 5, 0.0)


def test_a_record_has_options_and_findings_but_no_paths() -> None:
    record = strict_json(report(PASSED, FAILED, MEASURED).record())
    assert record == {
        "passed": False,
        "dtype": "bfloat16",
        "device": "cpu",
        "tolerance": 0.0,
        "checks": [
            {"name": "integrity", "passed": True, "detail": "sound"},
            {"name": "config", "passed": False, "detail": "2 settings"},
            {"name": "decoder_parity", "passed": False, "detail": "apart"},
        ],
        "skipped": {"vision_parity": "no images"},
        "remarks": ["a remark"],
    }
    assert "/home" not in json.dumps(record)


def test_reports_are_values() -> None:
    assert report(PASSED, MEASURED) == report(PASSED, MEASURED)
    assert report(PASSED) != report(FAILED)


HOSTILE = "<b>&\"'\x1b[31mred\x00\x07\x9b\u202e\ud800\ufffe]]>é"


def parsed(given: Report) -> ElementTree.Element:
    text = junit(given)
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    assert text.endswith("\n")
    return ElementTree.fromstring(text.encode("utf-8"))


def test_every_check_is_a_counted_test_case() -> None:
    suite = parsed(
        report(
            Check("integrity", True, "all sound"),
            Check("config", False, "two settings", offenders=("a is 1", "b is 2")),
            Check("runs", False, "deaf"),
            skipped={"vision_parity": "no images", "provenance": "no source"},
            remarks=("one", "two"),
        )
    )
    assert suite.tag == "testsuite"
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "2", "errors": "0", "skipped": "2"}
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert list(cases) == ["integrity", "config", "runs", "vision_parity", "provenance"]
    assert [name for name, case in cases.items() if case.find("failure") is not None] == ["config", "runs"]
    assert [name for name, case in cases.items() if case.find("skipped") is not None] == ["vision_parity", "provenance"]
    failure, skipped = cases["config"].find("failure"), cases["provenance"].find("skipped")
    assert failure is not None
    assert (failure.get("message"), failure.text) == ("two settings", "a is 1\nb is 2")
    assert skipped is not None
    assert skipped.get("message") == "no source"
    assert cases["integrity"].findtext("system-out") == "all sound"
    assert suite.findtext("system-out") == "one\ntwo"


@pytest.mark.parametrize("place", ["detail", "offender", "skipped", "remark", "passed"])
def test_markup_in_messages_is_escaped(place: str) -> None:
    given = {
        "detail": report(Check("config", False, HOSTILE)),
        "offender": report(Check("config", False, "x", offenders=(HOSTILE, HOSTILE))),
        "skipped": report(Check("config", True, "x"), skipped={"runs": HOSTILE}),
        "remark": report(Check("config", True, "x"), remarks=(HOSTILE,)),
        "passed": report(Check("config", True, HOSTILE)),
    }[place]
    suite = parsed(given)
    assert {element.tag for element in suite.iter()} <= {"testsuite", "testcase", "failure", "skipped", "system-out"}
    texts = [text for element in suite.iter() for text in (element.text, *element.attrib.values()) if text]
    (shown,) = {line for text in texts for line in text.split("\n") if "red" in line}
    assert shown.startswith("<b>&\"'")
    assert shown.endswith("]]>é")
    assert shown.isprintable()
    assert not set("\x1b\x00\x07\x9b\u202e\ud800\ufffe") & set(junit(given))


@pytest.fixture
def folder(converted_twin: TwinFolder, tmp_path: Path) -> Path:
    shutil.copytree(converted_twin("images-8"), tmp_path / "out")
    return tmp_path / "out"


def report_of(folder: Path, detail: str = "sound", *, passed: bool = True) -> Report:
    return Report(folder, None, "bfloat16", "cpu", 0.0, (Check("integrity", passed, detail),), {}, (), {"total": 5})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_manifest_gets_the_result_and_keeps_the_rest(folder: Path) -> None:
    before, files = read_manifest(folder), names(folder)
    given = report_of(folder)
    assert record_report(given, before) == given
    after = read_manifest(folder).document()
    assert after.pop("verification") == given.record()
    del after["sha256"]
    assert after == {key: value for key, value in before.document().items() if key != "sha256"}
    assert names(folder) == files


def test_a_second_result_replaces_the_first(folder: Path) -> None:
    record_report(report_of(folder, "first"), read_manifest(folder))
    first = (folder / "t5g2.json").read_bytes()
    record_report(report_of(folder, "second", passed=False), read_manifest(folder))
    assert read_manifest(folder).document()["verification"]["passed"] is False
    assert "first" not in (folder / "t5g2.json").read_text()
    record_report(report_of(folder, "first"), read_manifest(folder))
    assert (folder / "t5g2.json").read_bytes() == first


def test_the_file_keeps_its_permissions(folder: Path) -> None:
    (folder / "t5g2.json").chmod(0o640)
    umask = os.umask(0o077)
    try:
        record_report(report_of(folder), read_manifest(folder))
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
def test_the_manifest_contains_no_local_path(damage: object, folder: Path, twin_folder: TwinFolder) -> None:
    assert callable(damage)
    damage(folder)
    assert not verify(folder, twin_folder("images-8")).passed
    text = (folder / "t5g2.json").read_text()
    assert read_manifest(folder).document()["verification"]["passed"] is False
    assert str(folder.parent) not in text


def test_a_folder_name_that_is_not_utf8_is_recorded(folder: Path, twin_folder: TwinFolder) -> None:
    odd = folder.with_name(os.fsdecode(b"out-\xff"))
    folder.rename(odd)
    (odd / "config.json").write_text("{}")
    assert not verify(odd, twin_folder("images-8")).passed
    assert read_manifest(odd).document()["verification"]["passed"] is False


def test_a_read_only_folder_is_a_remark(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)
    try:
        given = report_of(folder)
        found = record_report(given, read_manifest(folder))
    finally:
        folder.chmod(0o700)
    assert found.passed
    assert "Permission denied" in found.remarks[-1]
    assert "verification" not in read_manifest(folder).document()


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "rename"])
def test_a_failed_write_is_a_remark_and_keeps_the_manifest(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, before, files = read_manifest(folder), (folder / "t5g2.json").read_bytes(), names(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if call == "rename":
            patch.setattr(os, "replace", fail)
        found = record_report(report_of(folder), manifest)
    assert found.passed
    assert "Read-only file system" in found.remarks[-1]
    assert (folder / "t5g2.json").read_bytes() == before
    assert names(folder) == files


def test_an_unrelated_file_at_the_staging_path_does_no_harm(folder: Path) -> None:
    (folder / f".t5g2.json.{os.getpid()}").write_text("left by a run that was killed")
    record_report(report_of(folder), read_manifest(folder))
    assert read_manifest(folder)
    record_report(report_of(folder), read_manifest(folder))
    assert "verification" in read_manifest(folder).document()
    assert (folder / "t5g2.json").read_bytes() == seal(json.loads((folder / "t5g2.json").read_text()))


def test_a_symlinked_manifest_is_not_changed(folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "blob"
    (folder / "t5g2.json").rename(shared)
    (folder / "t5g2.json").symlink_to(shared)
    before = shared.read_bytes()
    found = record_report(report_of(folder), read_manifest(folder))
    assert found.passed
    assert "link" in found.remarks[-1]
    assert shared.read_bytes() == before
    assert (folder / "t5g2.json").is_symlink()
