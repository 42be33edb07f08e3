"""The base of all commands, which refuses empty paths: they come from variables that are not set."""

from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

import typer
from typer.core import TyperCommand

ORIGINS: Final = {"source", "decoder_from", "vision_from", "mapping", "dataset", "against"}
"""Options that take the name of a folder, a file, or a model of the Hub, but are not of type Path."""


class Command(TyperCommand):
    """A command that refuses empty paths: `pathlib` would turn them into the current folder."""

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


def _holds_path(hint: Any) -> bool:
    return hint is Path or any(_holds_path(part) for part in get_args(hint))
