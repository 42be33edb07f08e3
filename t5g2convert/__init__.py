"""Turn a Gemma 3 checkpoint into a T5Gemma 2 encoder-decoder, exactly.

The public interface; everything else may change between versions::

    from pathlib import Path
    from t5g2convert import convert, inspect, plan

    print(plan(Path("gemma-3-4b-pt")).parameters)
    convert(Path("gemma-3-4b-pt"), Path("t5gemma-2-4b-4b"))

Importing this package imports neither torch nor numpy; names are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

from t5g2convert.version import __version__

if TYPE_CHECKING:
    from t5g2convert.conversion.convert import Conversion, convert
    from t5g2convert.conversion.plan import Plan
    from t5g2convert.conversion.planner import build_plan as plan
    from t5g2convert.errors import CheckpointError, MappingError, OutputError, T5g2Error, UsageError
    from t5g2convert.mapping.inspection import Inspection, inspect

__all__ = [
    "CheckpointError",
    "Conversion",
    "Inspection",
    "MappingError",
    "OutputError",
    "Plan",
    "T5g2Error",
    "UsageError",
    "__version__",
    "convert",
    "inspect",
    "plan",
]

_HOME = {
    "CheckpointError": "errors",
    "Conversion": "conversion.convert",
    "Inspection": "mapping.inspection",
    "MappingError": "errors",
    "OutputError": "errors",
    "Plan": "conversion.plan",
    "T5g2Error": "errors",
    "UsageError": "errors",
    "convert": "conversion.convert",
    "inspect": "mapping.inspection",
    "plan": "conversion.planner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = import_module(f"{__name__}.{_HOME[name]}")
    value = home.build_plan if name == "plan" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
