"""Lists in YAML that a training reads: the tasks of a mixture, the corpora of a run."""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from t5g2convert.errors import MappingError
from t5g2convert.mapping.schema import Declaration
from t5g2convert.mapping.strictyaml import Document, load_yaml
from t5g2convert.mapping.weightmap import did_you_mean

_D = TypeVar("_D", bound=Declaration)


def read_declaration(path: Path, kind: type[_D], item: type[Declaration]) -> _D:
    """Read a YAML file as a declaration with a list.

    Args:
        path: The file.
        kind: What the file declares.
        item: The items of its list.

    Raises:
        MappingError: The file is not valid; shows `file:line:column` and a caret at the first fault.
    """
    document = load_yaml(path)
    try:
        return kind.model_validate(document.data)
    except ValidationError as error:
        raise _fault(document, error, kind, item) from None


def _fault(
    document: Document, error: ValidationError, kind: type[Declaration], item: type[Declaration]
) -> MappingError:
    # A misspelt key is also missing; reporting the spelling helps more.
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    at, message = errors[0]["loc"], str(errors[0]["msg"])
    if errors[0]["type"] == "extra_forbidden":
        known = kind.model_fields if len(at) == 1 else item.model_fields
        return document.error(f"unknown key {at[-1]!r}", (*at, "<key>"), hint=did_you_mean(str(at[-1]), known))
    field = f"{at[-1]}: " if at and isinstance(at[-1], str) else ""
    return document.error(field + message.removeprefix("Value error, "), at)
