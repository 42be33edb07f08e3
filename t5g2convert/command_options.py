"""The base of every command's options: one model for the command line, the Python functions and the manifest."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

from pydantic import BaseModel, ConfigDict, ValidationError

from t5g2convert.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """The presentation of an options model's field on the command line; name, type and default come from the field.

    Attributes:
        help: The text in `--help`.
        flag: The spelling if it is not `--name-of-the-field`, like `--max-shard-size` or `--hash/--no-hash`.
        metavar: The placeholder for the value.
        default: A description of a default of None, like `the source's`.
        group: The section of `--help`.
        parse: Turns the text of the command line into the value; `default` is then the text of the default.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    default: str | None = None
    group: str | None = None
    parse: Callable[[str], Any] | None = None


class CommandOptions(BaseModel):
    """The options of a command: frozen, strictly typed, and unknown names are errors.

    A field has its type, default and constraints as in any pydantic model. A field that the command line offers also
    has an `Option`; other fields are only for Python.

    Example:
        >>> class GreetOptions(CommandOptions):
        ...     times: Annotated[int, Field(ge=1), Option("How often to greet.")] = 1
        ...     loud: Annotated[bool, Option("Greet in capitals.")] = False

    Raises:
        UsageError: A value has the wrong type or violates a constraint, or a name is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    if not TYPE_CHECKING:  # type checkers derive the signature from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise UsageError("; ".join(_reasons(error))) from None

    def replace(self, **changes: Any) -> Self:
        """Return these options with some fields changed and validated."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def _reasons(error: ValidationError) -> list[str]:
    # pydantic gives one reason for each type that a field may have; name the field once.
    reasons = {str(item["loc"][0]) if item["loc"] else "": item["msg"] for item in reversed(error.errors())}
    return [f"{name}: {reason}" if name else reason for name, reason in reversed(reasons.items())]


_M = TypeVar("_M", bound=CommandOptions)
_M_co = TypeVar("_M_co", bound=CommandOptions, covariant=True)
_P = ParamSpec("_P")
_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")
_R = TypeVar("_R")
_A_contra = TypeVar("_A_contra", contravariant=True)
_B_contra = TypeVar("_B_contra", contravariant=True)
_R_co = TypeVar("_R_co", covariant=True)


class _SecondOptional(Protocol[_A_contra, _B_contra, _P, _R_co]):
    @overload
    def __call__(self, first: _A_contra, /, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...
    @overload
    def __call__(self, first: _A_contra, second: _B_contra, /, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


class _Unfold(Protocol[_M_co, _P]):
    @overload
    def __call__(self, function: Callable[[_A, _M_co], _R], /) -> Callable[Concatenate[_A, _P], _R]: ...
    @overload
    def __call__(self, function: Callable[[_A, _B | None, _M_co], _R], /) -> _SecondOptional[_A, _B | None, _P, _R]: ...
    @overload
    def __call__(self, function: Callable[[_A, _B, _M_co], _R], /) -> Callable[Concatenate[_A, _B, _P], _R]: ...
    @overload
    def __call__(self, function: Callable[[_A, _B, _C, _M_co], _R], /) -> Callable[Concatenate[_A, _B, _C, _P], _R]: ...


def takes_options(model: Callable[_P, _M]) -> _Unfold[_M, _P]:
    """Let a function take the fields of an options model as keyword arguments.

    The decorated function has the model as its last parameter; callers and type checkers see the fields instead.

    Example:
        >>> @takes_options(GreetOptions)
        ... def greet(name: str, options: GreetOptions) -> str: ...
        >>> greet("Ada", times=3)
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        *leading, last = signature.parameters.values()
        signature = signature.replace(parameters=[*leading, *_keywords(model)])

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            own = {each.name: given.pop(each.name) for each in leading if each.name in given}
            return function(**own, **{last.name: make(**given)})

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    make: Callable[..., Any] = model
    return decorate


def _keywords(model: Any) -> Iterator[inspect.Parameter]:
    """Yield the fields of a model as keyword arguments, without their metadata."""
    for parameter in inspect.signature(model).parameters.values():
        yield parameter.replace(annotation=model.model_fields[parameter.name].annotation)
