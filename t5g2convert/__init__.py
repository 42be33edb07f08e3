"""Turn a Gemma 3 checkpoint into a T5Gemma 2 encoder-decoder, exactly.

This module is the public interface; everything else may change between versions::

    from pathlib import Path
    from t5g2convert import convert, inspect, plan, verify

    print(plan(Path("gemma-3-4b-pt")).parameters)
    convert(Path("gemma-3-4b-pt"), Path("t5gemma-2-4b-4b"))
    assert verify(Path("t5gemma-2-4b-4b"), Path("gemma-3-4b-pt")).passed

Importing this package imports neither torch nor numpy; names are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

from t5g2convert.version import __version__

if TYPE_CHECKING:
    from t5g2convert.conversion.convert import Conversion, convert
    from t5g2convert.conversion.plan.builder import plan
    from t5g2convert.conversion.plan.types import Plan
    from t5g2convert.errors import (
        CheckpointError,
        DataError,
        HubError,
        MachineError,
        MappingError,
        OutputError,
        T5g2Error,
        UsageError,
        VerificationError,
    )
    from t5g2convert.mapping.inspection import Inspection, inspect
    from t5g2convert.parity.compare import Comparison, compare
    from t5g2convert.parity.reports.report import Report
    from t5g2convert.parity.verify import verify
    from t5g2convert.reference.generation.generator import generate

__all__ = [
    "CheckpointError",
    "Comparison",
    "Conversion",
    "DataError",
    "HubError",
    "Inspection",
    "MachineError",
    "MappingError",
    "OutputError",
    "Plan",
    "Report",
    "T5g2Error",
    "UsageError",
    "VerificationError",
    "__version__",
    "compare",
    "convert",
    "generate",
    "inspect",
    "plan",
    "verify",
]

_HOME = {
    "CheckpointError": "errors",
    "Comparison": "parity.compare",
    "Conversion": "conversion.convert",
    "DataError": "errors",
    "HubError": "errors",
    "Inspection": "mapping.inspection",
    "MachineError": "errors",
    "MappingError": "errors",
    "OutputError": "errors",
    "Plan": "conversion.plan.types",
    "Report": "parity.reports.report",
    "T5g2Error": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "compare": "parity.compare",
    "convert": "conversion.convert",
    "inspect": "mapping.inspection",
    "plan": "conversion.plan.builder",
    "verify": "parity.verify",
    "generate": "reference.generation.generator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = import_module(f"{__name__}.{_HOME[name]}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
