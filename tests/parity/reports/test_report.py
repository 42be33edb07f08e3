import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from t5g2convert.parity.reports.report import Check, Drift, Figures, Report, junit

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


HOSTILE = "<b>&\"'\x1b[31mred\x00\x07\x9b\u202e\ud800\ufffe]]>é"


def parsed(given: Report) -> ElementTree.Element:
    text = junit(given)
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    assert text.endswith("\n")
    return ElementTree.fromstring(text.encode("utf-8"))


def test_every_check_is_a_case_and_is_counted() -> None:
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
def test_text_from_outside_stays_text(place: str) -> None:
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
