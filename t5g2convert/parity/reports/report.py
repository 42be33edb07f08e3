"""What a verification found: frozen data that tables, JSON, JUnit and the HTML page are made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5g2convert.parity.checks.movement import Movement


def writable(node: Any) -> Any:
    """A document as JSON can hold it: null for NaN and infinity, names of files that are no text escaped."""
    if isinstance(node, dict):
        return {key: writable(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [writable(value) for value in node]
    if isinstance(node, str):
        return node.encode(errors="backslashreplace").decode()
    return None if isinstance(node, float) and not math.isfinite(node) else node


@dataclass(frozen=True, slots=True)
class Drift:
    """How far two models are apart behind one layer.

    Attributes:
        layer: Its name in the target, `layers.3`; also `embed_tokens` and `norm`.
        max_abs: Largest absolute difference of a state.
        relative: The same, divided by the largest state of the source.
    """

    layer: str
    max_abs: float
    relative: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What a comparison of two passes measured.

    Attributes:
        max_abs: Largest absolute difference; infinite where a value is not finite.
        relative: The same, divided by the largest value of the source.
        compared: Values compared.
        kl: Mean over tokens of KL(source || target), in nats; None where no distributions are compared.
        agreement: Share of tokens whose most probable successor is the same; None likewise.
        departs: The first layer and tensor where the two are apart; None where they are not.
        drifts: Layer by layer.
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
    """One check: what it found in words, and in figures where it compared two passes, or a training with its start."""

    name: str
    passed: bool
    detail: str
    offenders: tuple[str, ...] = ()
    figures: Figures | None = None
    movements: "tuple[Movement, ...]" = ()

    def to_json(self) -> dict[str, Any]:
        """A member of `checks` in the JSON of a report."""
        document: dict[str, Any] = {"name": self.name, "passed": self.passed, "detail": self.detail}
        if self.offenders:
            document["offenders"] = list(self.offenders)
        if self.figures is not None:
            document["figures"] = asdict(self.figures)
        if self.movements:
            document["movements"] = [each.to_json() for each in self.movements]
        return writable(document)


def refused(name: str, what: str, offenders: Sequence[str]) -> Check:
    """A check that failed on several things of a kind: their count and the first of them, and all of them apart."""
    return Check(name, False, f"{len(offenders)} {what}, the first: {offenders[0]}", tuple(offenders))


@dataclass(frozen=True, slots=True)
class Report:
    """The judgement of one folder.

    Attributes:
        output: The folder judged.
        source: The folder that it was converted from; None where it was not given.
        dtype: The dtype that the passes were computed in; None where none was.
        device: The device that they ran on.
        tolerance: Largest relative difference that was let pass; 0 is exact.
        checks: In the order in which they were made.
        skipped: Checks that were not made, by name, with the reason.
        remarks: What a reader must know to read the checks right.
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
        """Whether the folder was compared with its source."""
        return self.source is not None

    @property
    def passed(self) -> bool:
        """Whether every check that was made passed, and one was."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """What `t5g2 verify --json` prints."""
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
        """What the manifest keeps: no paths, no figures of layers."""
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
