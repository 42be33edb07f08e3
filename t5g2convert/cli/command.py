"""The import of a command when it runs, and the layout of all help pages."""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from t5g2convert.cli.examples import EXAMPLES

ORIGINS: Final = {
    "source": "MODEL", "decoder_from": "MODEL", "vision_from": "MODEL", "against": "MODEL", "mapping": "MAP",
    "dataset": "DATASET",
}  # fmt: skip
"""Options that take the name of a folder, a file or a model on the Hub, but do not have the type Path."""


VALUES: Final = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""The placeholder for the value of an option without a metavar, by its type."""


class LazyCommand(TyperCommand):
    """A name and a summary for the list of commands; the command itself is imported when it runs or prints its help."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the command line with the command itself."""
        return load(str(self.name)).make_context(*args, **extra)


def load(name: str) -> Any:
    """Import a command, and return it in the form that typer runs.

    The module and the function in it have the command's name; an `EPILOG` in the module ends the help. A module for a
    group of commands has a typer `app` instead.
    """
    function = name.replace("-", "_")
    module = import_module(f"t5g2convert.cli.{function}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name, cls=Command, epilog=getattr(module, "EPILOG", None))(getattr(module, function))
    return get_command(app)


class Command(TyperCommand):
    """A command that refuses empty paths and lists its options in groups.

    `pathlib` would turn an empty path into the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            typer.BadParameter: The value of an argument, or of an option that takes a path, is empty or blank.
        """
        if not ctx.resilient_parsing:
            hints = get_type_hints(self.callback) if self.callback is not None else {}
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in self.get_params(ctx):
                name, is_option = str(parameter.name), _is_option(parameter)
                value = given.get(name)
                values = value if isinstance(value, list | tuple) else [value]
                if is_option and name not in ORIGINS and not _holds_path(hints.get(name)):
                    continue
                if any(isinstance(each, str) and not each.strip() for each in values):
                    shown = parameter.opts[0] if is_option else parameter.opts[0].upper()
                    raise typer.BadParameter(f"{shown} is empty (is a variable not set?)", ctx=ctx)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name the arguments in capitals."""
        return ["[OPTIONS]", *(placeholder(each) for each in self.get_params(ctx) if not _is_option(each))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group, in order of first appearance, and the examples."""
        hints = get_type_hints(self.callback) if self.callback is not None else {}
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            label, text = record
            if not _is_option(parameter):
                label, text = placeholder(parameter), text.replace("  [required]", "")
            elif (value := value_name(parameter, hints.get(parameter.name, bool))) is not None:
                label = f"{', '.join(parameter.opts)} {value}"
            name = getattr(parameter, "rich_help_panel", None)
            groups.setdefault(name or ("Options" if _is_option(parameter) else "Arguments"), []).append((label, text))
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)
        if examples := EXAMPLES.get(ctx.command_path.partition(" ")[2]):
            # A command line is copied, so it is not wrapped.
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in examples))


class Commands(TyperGroup):
    """A group of commands: their whole summaries, in sections if the application has several."""

    sections: Mapping[str, Collection[str]] = {}
    """The names of the commands in each section."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the sections; commands that are in none are in the last one."""
        rest = dict.fromkeys(self.list_commands(ctx))
        for title, names in self.sections.items():
            self._write(title, [name for name in names if name in rest], formatter)
            rest = {name: None for name in rest if name not in names}
        self._write("Other commands" if self.sections else "Commands", list(rest), formatter)

    def _write(self, title: str, names: list[str], formatter: Any) -> None:
        if names:
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(10_000)) for name in names])


def placeholder(argument: Any) -> str:
    """Return the name of an argument in usage lines: SOURCE, or [SOURCE] if it may be left out."""
    name = str(argument.metavar or argument.name.upper())
    return name if argument.required else f"[{name}]"


def value_name(option: Any, kind: Any) -> str | None:
    """Return the placeholder for an option's value, or its choices; None for an option without a value.

    Args:
        option: The option, as typer has it.
        kind: Its type in Python; of a list or an optional type the type of its values counts.
    """
    choices = get_args(kind)
    if type(None) in choices:
        (kind,) = (each for each in choices if each is not type(None))
    if get_origin(kind) is list:
        (kind,) = get_args(kind)  # given several times
    if kind is bool:
        return None
    if option.metavar:
        return str(option.metavar)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return ORIGINS.get(option.name) or VALUES[kind]


def _is_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option")


def _holds_path(hint: Any) -> bool:
    return hint is Path or any(_holds_path(part) for part in get_args(hint))
