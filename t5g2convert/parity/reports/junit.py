"""The report as JUnit XML, so that a CI system shows every check."""

from xml.etree import ElementTree

from t5g2convert.parity.reports.report import Report
from t5g2convert.printable import printable


def junit(report: Report) -> str:
    """Return one test suite: a test case for every check, skipped ones included, with remarks as the suite's output."""
    suite = ElementTree.Element(
        "testsuite",
        name="t5g2 verify",
        tests=str(len(report.checks) + len(report.skipped)),
        failures=str(len(report.failed)),
        errors="0",
        skipped=str(len(report.skipped)),
    )
    for check in report.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="t5g2.verify", name=check.name)
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = printable(check.detail)
        else:
            failure = ElementTree.SubElement(case, "failure", message=printable(check.detail))
            failure.text = printable("\n".join(check.offenders), keep="\n")
    for name, because in report.skipped.items():
        case = ElementTree.SubElement(suite, "testcase", classname="t5g2.verify", name=name)
        ElementTree.SubElement(case, "skipped", message=printable(because))
    ElementTree.SubElement(suite, "system-out").text = printable("\n".join(report.remarks), keep="\n")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
