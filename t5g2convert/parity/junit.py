"""A report as JUnit XML, so that a CI system shows every check."""

from xml.etree import ElementTree

from t5g2convert.parity.report import Report


def junit(report: Report) -> str:
    """One test suite; a check is a test case, a skipped check a skipped one, remarks are the suite's output."""
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
            ElementTree.SubElement(case, "system-out").text = _printable(check.detail)
        else:
            failure = ElementTree.SubElement(case, "failure", message=_printable(check.detail))
            failure.text = _printable("\n".join(check.offenders))
    for name, because in report.skipped.items():
        case = ElementTree.SubElement(suite, "testcase", classname="t5g2.verify", name=name)
        ElementTree.SubElement(case, "skipped", message=_printable(because))
    ElementTree.SubElement(suite, "system-out").text = _printable("\n".join(report.remarks))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _printable(text: str) -> str:
    """Text without the characters that XML cannot hold, which names in a checkpoint may contain."""
    replacement = "\N{REPLACEMENT CHARACTER}"
    return "".join(letter if letter.isprintable() or letter == "\n" else replacement for letter in text)
