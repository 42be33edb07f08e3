import json
import math
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.parity.reports.report import Check, Drift, Figures, Report

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
    """What a reader that knows only JSON's own numbers makes of a document."""

    def refuse(number: str) -> None:
        raise AssertionError(f"{number} is no JSON")

    return json.loads(json.dumps(document), parse_constant=refuse)


def test_a_report_passes_if_every_check_that_was_made_did() -> None:
    assert report(PASSED).passed
    assert report(PASSED, PASSED).passed
    assert not report(PASSED, FAILED).passed
    assert report(PASSED, FAILED, MEASURED).failed == (FAILED, MEASURED)
    assert report(PASSED).failed == ()


def test_a_report_of_no_checks_proves_nothing() -> None:
    assert not report().passed


def test_json_has_all_that_was_found() -> None:
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
def test_json_of_what_is_not_finite_is_json_all_the_same(value: float) -> None:
    figures = Figures(value, value, 5, kl=value, agreement=0.0, drifts=(Drift("norm", value, value),))
    document = strict_json(report(Check("decoder_parity", False, "apart", figures=figures)).to_json())
    assert document["passed"] is False
    found = document["checks"][0]["figures"]
    assert (found["max_abs"], found["kl"], found["compared"], found["agreement"]) == (None, None, 5, 0.0)


def test_a_record_has_the_conditions_and_the_findings_but_no_paths() -> None:
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
