"""What all commands have in common: an argument that is empty, of a variable that was not set, is refused."""

from typing import Any, Final

import typer
from typer.core import TyperCommand

TEXTS: Final = {"prompt", "repo", "split", "subset", "column"}
"""Options whose value is text that may be empty."""


class Command(TyperCommand):
    """A command that takes no empty path: `pathlib` would make the current folder of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            typer.BadParameter: The value of an argument, or of an option that is not plain text, is empty or blank.
        """
        if not ctx.resilient_parsing:
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in self.get_params(ctx):
                value = given.get(str(parameter.name))
                values = value if isinstance(value, list | tuple) else [value]
                is_text = parameter.param_type_name == "option" and parameter.name in TEXTS
                if not is_text and any(isinstance(each, str) and not each.strip() for each in values):
                    named = parameter.opts[0] if parameter.param_type_name == "option" else parameter.opts[0].upper()
                    raise typer.BadParameter(f"{named} is empty (is a variable not set?)", ctx=ctx)
        return super().parse_args(ctx, args)
