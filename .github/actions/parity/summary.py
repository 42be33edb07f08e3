"""The result as Markdown for a job summary and as JUnit XML; text from outside is escaped."""

import re
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

LONGEST_DETAIL: Final = 1000
"""Maximum characters of one detail: GitHub shows 1 MiB per summary; parity.json has all."""


@dataclass(frozen=True)
class Row:
    """One line of the summary and one test case."""

    name: str
    state: str
    """passed, FAILED, error or not made."""
    detail: str


def summary(title: str, subject: str, rows: list[Row], remarks: list[str]) -> str:
    """The job summary in Markdown; what comes from a checkpoint is shown and not obeyed."""
    lines = [f"### {title}", "", escaped(subject), "", "| | check | what was compared and found |", "|---|---|---|"]
    marks = {"passed": "✅ passed", "FAILED": "❌ **FAILED**", "error": "❌ **error**", "not made": "not made"}
    for row in rows:
        detail = row.detail if len(row.detail) <= LONGEST_DETAIL else row.detail[:LONGEST_DETAIL] + "…"
        lines.append(f"| {marks[row.state]} | {escaped(row.name)} | {escaped(detail)} |")
    lines += ["", *(f"{escaped(remark)}." for remark in remarks)]
    return "\n".join(lines).rstrip() + "\n"


def printable(text: str) -> str:
    """Text with control and bidirectional characters escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "backslashreplace").decode() for each in text
    )


def escaped(text: str) -> str:
    """Text for Markdown: no markup, tags, links, mentions or table cells of its own."""
    return re.sub(r"([\\`*_\[\]<>|~&:@#!$])", r"\\\1", printable(text)).replace("www.", r"www\.")


def as_junit(name: str, rows: list[Row]) -> str:
    """The rows as JUnit XML, where t5g2 itself has written none."""
    kinds = {"FAILED": "failure", "error": "error", "not made": "skipped"}
    counts = {kind: sum(kinds.get(row.state) == kind for row in rows) for kind in kinds.values()}
    suite = ElementTree.Element("testsuite", name=name, tests=str(len(rows)), failures=str(counts["failure"]))
    suite.attrib |= {"errors": str(counts["error"]), "skipped": str(counts["skipped"])}
    for row in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=name.replace(" ", "."), name=printable(row.name))
        if row.state == "passed":
            ElementTree.SubElement(case, "system-out").text = printable(row.detail)
        else:
            ElementTree.SubElement(case, kinds[row.state], message=printable(row.detail))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
