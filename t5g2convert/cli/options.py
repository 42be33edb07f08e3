"""The conversion of an options model into the options of a command, and options that several commands share."""

import inspect
import types
from collections.abc import Callable, Collection
from functools import wraps
from typing import Annotated, Any, Final, Union, get_args, get_origin, overload

import typer
from pydantic.fields import FieldInfo

from t5g2convert.command_options import CommandOptions, Option


def map_names(incomplete: str) -> list[str]:
    """Return the names of the shipped maps that start with a text, for the shell's completion."""
    from t5g2convert.mapping.library import shipped_maps

    return [each.map.name for each in shipped_maps() if each.map.name.startswith(incomplete)]


def preset_names(incomplete: str) -> list[str]:
    """Return the presets of the shipped maps that start with a text."""
    from t5g2convert.mapping.library import shipped_maps

    return [name for each in shipped_maps() for name in each.map.presets if name.startswith(incomplete)]


NAMES: Final = {"mapping": map_names, "preset": preset_names}
"""The completion of options whose values are names."""


@overload
def with_options(command: Callable[..., None], /) -> Callable[..., None]: ...
@overload
def with_options(
    *, only: Collection[str] | None = None, omit: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]: ...
def with_options(
    command: Callable[..., None] | None = None,
    /,
    *,
    only: Collection[str] | None = None,
    omit: Collection[str] = (),
) -> Any:
    """Replace a command's parameter of an options model's type by the options of that model.

    A field with an `Option` becomes an option of the command line, with the field's type, default and range. Other
    parameters of the command do not change.

    Example:
        >>> class GreetOptions(CommandOptions):
        ...     times: Annotated[int, Field(ge=1), Option("How often to greet.")] = 1
        ...     loud: Annotated[bool, Option("Greet in capitals.")] = False
        >>> @with_options
        ... def greet(name: str, options: GreetOptions, as_json: JsonOption = False) -> None: ...

        `t5g2 greet Ada --times 3` calls `greet("Ada", GreetOptions(times=3), as_json=False)`.

    Args:
        command: The command.
        only: The fields to offer; all by default.
        omit: Fields not to offer.
    """
    if command is None:
        return lambda function: _unfolded(function, only, omit)
    return _unfolded(command, only, omit)


def _unfolded(command: Callable[..., None], only: Collection[str] | None, omit: Collection[str]) -> Callable[..., None]:
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    (folded,) = (
        each for each in parameters if isinstance(each.annotation, type) and issubclass(each.annotation, CommandOptions)
    )
    model: type[CommandOptions] = folded.annotation
    fields = {
        name: field
        for name, field in model.model_fields.items()
        if _option_of(field) is not None and name not in omit and (only is None or name in only)
    }
    shown = [
        shown
        for each in parameters
        for shown in ((_parameter(name, field) for name, field in fields.items()) if each is folded else [each])
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        values = {name: _value(given.pop(name), field) for name, field in fields.items()}
        command(**given, **{folded.name: model(**values)})

    run.__signature__ = inspect.Signature([each.replace(kind=each.KEYWORD_ONLY) for each in shown])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in shown}
    return run


def _option_of(field: FieldInfo) -> Option | None:
    return next((each for each in field.metadata if isinstance(each, Option)), None)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return a field as a parameter for typer."""
    option = _option_of(field)
    assert option is not None
    flag = f"--{name.replace('_', '-')}"
    if field.default is True:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    kind, default, described, bounds = _on_command_line(field.annotation), field.default, option.default, {}
    if option.parse is not None:
        kind, default, described = str, option.default, None
    else:
        limits = {"ge": "min", "le": "max"}
        bounds = {limits[at]: getattr(each, at) for each in field.metadata for at in limits if hasattr(each, at)}
    info = typer.Option(
        option.flag or flag,
        help=option.help,
        metavar=option.metavar,
        show_default=True if described is None else described,
        rich_help_panel=option.group,
        autocompletion=NAMES.get(name),
        **bounds,
    )
    if field.is_required():
        default = inspect.Parameter.empty
    elif default == ():
        default = None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _on_command_line(annotation: Any) -> Any:
    """Return the type of a field on the command line: text if text is one of the types of the field."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return list[arguments[0]] | None  # type: ignore[valid-type]
    if origin in (Union, types.UnionType):
        kinds = [each for each in arguments if each is not type(None)]
        kind = str if str in kinds else _on_command_line(kinds[0])
        return kind | None if len(kinds) < len(arguments) else kind
    return annotation


def _value(given: Any, field: FieldInfo) -> Any:
    option = _option_of(field)
    if option is not None and option.parse is not None:
        return option.parse(given)
    if get_origin(field.annotation) is tuple:
        return tuple(given or ())
    return given


SourceArgument = Annotated[
    str, typer.Argument(help="A Gemma 3 or Gemma 2 folder, or a model on the Hub: org/name[@revision].")
]
