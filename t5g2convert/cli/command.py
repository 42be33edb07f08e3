"""The import of a command when it runs, and the base of all commands."""

from importlib import import_module
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.main import get_command

ORIGINS: Final = {"source", "decoder_from", "vision_from", "mapping", "dataset", "against"}
"""Options that take the name of a folder, a file or a model on the Hub, but do not have the type Path."""


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
                name, is_option = str(parameter.name), parameter.param_type_name == "option"
                value = given.get(name)
                values = value if isinstance(value, list | tuple) else [value]
                if is_option and name not in ORIGINS and not _holds_path(hints.get(name)):
                    continue
                if any(isinstance(each, str) and not each.strip() for each in values):
                    shown = parameter.opts[0] if is_option else parameter.opts[0].upper()
                    raise typer.BadParameter(f"{shown} is empty (is a variable not set?)", ctx=ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group, in order of first appearance."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                name = getattr(parameter, "rich_help_panel", None)
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(name or kind, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _holds_path(hint: Any) -> bool:
    return hint is Path or any(_holds_path(part) for part in get_args(hint))
