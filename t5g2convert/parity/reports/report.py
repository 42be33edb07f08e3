"""The result of a verification as data; the terminal output, JSON, JUnit XML and HTML are made from it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from t5g2convert.parity.movement import Movement


def writable(node: Any) -> Any:
    """Return a document that JSON can represent: null for NaN and infinity, undecodable file names escaped."""
    if isinstance(node, dict):
        return {key: writable(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [writable(value) for value in node]
    if isinstance(node, str):
        return node.encode(errors="backslashreplace").decode()
    return None if isinstance(node, float) and not math.isfinite(node) else node


@dataclass(frozen=True, slots=True)
class Drift:
    """The difference between two models after one layer.

    Attributes:
        layer: The layer's name in the target, like `layers.3`; also `embed_tokens` and `norm`.
        max_abs: Largest absolute difference of a state.
        relative: The same, divided by the source's largest state.
    """

    layer: str
    max_abs: float
    relative: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The measurements of a comparison of two passes.

    Attributes:
        max_abs: Largest absolute difference; infinite where a value is not finite.
        relative: The same, divided by the source's largest value.
        compared: Number of values compared.
        kl: Mean over tokens of KL(source || target), in nats; None without distributions.
        agreement: Share of tokens with the same most probable successor; None without distributions.
        departs: The first layer and tensor that differ; None if all are equal.
        drifts: The difference after every layer.
    """

    max_abs: float
    relative: float
    compared: int
    kl: float | None = None
    agreement: float | None = None
    departs: str | None = None
    drifts: tuple[Drift, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: The name of the check.
        passed: Whether it passed.
        detail: The finding, in a sentence.
        offenders: Every fault found, if there are several of a kind.
        figures: The measurements, if the check compares two passes.
        movements: How far tensors moved, if the check compares a trained model with its start.
        remarks: What a reader needs to know to interpret the result; `Report.remarks` collects those of all checks.
    """

    name: str
    passed: bool
    detail: str
    offenders: tuple[str, ...] = ()
    figures: Figures | None = None
    movements: "tuple[Movement, ...]" = ()
    remarks: tuple[str, ...] = ()

    def remarked(self, remarks: Iterable[str]) -> "Check":
        """Return a copy of the check with further remarks."""
        return replace(self, remarks=(*self.remarks, *remarks))

    def to_json(self) -> dict[str, Any]:
        """Return the check as `t5g2 verify --json` prints it."""
        document: dict[str, Any] = {"name": self.name, "passed": self.passed, "detail": self.detail}
        if self.offenders:
            document["offenders"] = list(self.offenders)
        if self.figures is not None:
            document["figures"] = asdict(self.figures)
        if self.movements:
            document["movements"] = [each.to_json() for each in self.movements]
        return writable(document)


@dataclass(frozen=True, slots=True)
class Skipped:
    """The reason why a check was not made."""

    because: str


def failed_check(name: str, what: str, offenders: Sequence[str], remarks: Sequence[str] = ()) -> Check:
    """Return a check that failed on several things of a kind; its detail gives their number and the first of them."""
    detail = f"{len(offenders)} {what}, the first: {offenders[0]}"
    return Check(name, False, detail, tuple(offenders), remarks=tuple(remarks))


@dataclass(frozen=True, slots=True)
class Report:
    """The result of verifying one folder.

    Attributes:
        output: The folder.
        source: The source folder; None if none was passed.
        dtype: The dtype of the reference passes; None if none ran.
        device: The device of the reference passes.
        tolerance: Largest relative difference that passes; 0 is exact.
        checks: The checks, in the order they were made.
        skipped: Why checks were not made, by name of the check.
        remarks: What a reader needs to know to interpret the checks.
        parameters: Number of parameters by part, with `total`.
    """

    output: Path
    source: Path | None
    dtype: str | None
    device: str
    tolerance: float
    checks: tuple[Check, ...]
    skipped: Mapping[str, str]
    remarks: tuple[str, ...]
    parameters: Mapping[str, int]

    @property
    def complete(self) -> bool:
        """True if the folder was compared with its source."""
        return self.source is not None

    @property
    def passed(self) -> bool:
        """True if every check that was made passed, and at least one was made."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """Return the report as `t5g2 verify --json` prints it."""
        return {
            "passed": self.passed,
            "complete": self.complete,
            "output": str(self.output),
            "source": None if self.source is None else str(self.source),
            **self._conditions(),
            "checks": [check.to_json() for check in self.checks],
            "skipped": dict(self.skipped),
            "remarks": list(self.remarks),
            "parameters": dict(self.parameters),
        }

    def record(self) -> dict[str, Any]:
        """Return the part that the manifest keeps, without paths and figures."""
        checks = [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in self.checks]
        return {
            "passed": self.passed,
            **self._conditions(),
            "checks": writable(checks),
            "skipped": dict(self.skipped),
            "remarks": list(self.remarks),
        }

    def _conditions(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device, "tolerance": self.tolerance}


def record_report(report: Report, manifest: Manifest) -> Report:
    """Write the result into the folder's manifest, or add a remark to the report if that fails."""
    path = report.output / MANIFEST_FILE
    if path.is_symlink():
        # Files in the Hub's cache are shared: this tool must not write them.
        return replace(report, remarks=(*report.remarks, f"the result was not written: {MANIFEST_FILE} is a link"))
    try:
        replace_file(path, manifest.with_verification(report.record()).encode())
    except OSError as error:
        remark = f"the result could not be written into {MANIFEST_FILE}: {error.strerror}"
        return replace(report, remarks=(*report.remarks, remark))
    return report


def junit(report: Report) -> str:
    """Return one test suite with a test case for every check, skipped ones included; remarks are the suite's output."""
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
