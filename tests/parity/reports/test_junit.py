from pathlib import Path
from xml.etree import ElementTree

import pytest

from t5g2convert.parity.reports.junit import junit
from t5g2convert.parity.reports.report import Check, Report

HOSTILE = "<b>&\"'\x1b[31mred\x00\x07\x9b\u202e\ud800\ufffe]]>é"


def report(*checks: Check, skipped: dict[str, str] | None = None, remarks: tuple[str, ...] = ()) -> Report:
    return Report(Path("out"), Path("in"), "bfloat16", "cpu", 0.0, checks, skipped or {}, remarks, {})


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
