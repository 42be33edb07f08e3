"""The page of each command, from its help, with examples."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from docs.generate.tables import table
from t5g2convert.cli.command import placeholder, value_name
from t5g2convert.cli.examples import EXAMPLES, NOT_RUN


def command_page(name: str, command: Any) -> str:
    """Return the page of a command, or of a group with all its commands."""
    inner: Mapping[str, Any] = getattr(command, "commands", {})
    sections = [f"# t5g2 {name}", command.help if inner else _command(name, command)]
    for verb, each in inner.items():
        sections += [f"## t5g2 {name} {verb}", _command(f"{name} {verb}", each)]
    sections.append("[All commands](README.md)")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _command(name: str, command: Any) -> str:
    types = get_type_hints(command.callback, include_extras=False)
    arguments = [it for it in command.params if it.param_type_name == "argument"]
    options = [it for it in command.params if it.param_type_name == "option" and "--help" not in it.opts]
    for it in command.params:
        assert it.help, f"t5g2 {name}: {it.name} has no help"
    usage = " ".join(["t5g2", name, *(["[OPTIONS]"] if options else []), *map(placeholder, arguments)])
    sections = [command.help, f"```text\n{usage}\n```"]
    if name in EXAMPLES:
        shown = "\n".join(f"$ {line}" for line in EXAMPLES[name])
        mark = f"<!-- not run: {NOT_RUN[name]} -->\n" if name in NOT_RUN else ""
        sections.append(f"For example:\n\n{mark}```console\n{shown}\n```")
    if arguments:
        sections.append(table(("argument", ""), ((f"`{placeholder(it)}`", it.help) for it in arguments)))
    if options:
        rows = ((_flags(it, types[it.name]), it.help, _default(it)) for it in options)
        sections.append(table(("option", "", "without it"), rows))
    return "\n\n".join(section.strip() for section in sections)


def _flags(option: Any, kind: Any) -> str:
    value = value_name(option, kind)
    flags = "/".join([*option.opts, *option.secondary_opts])
    return f"`{flags}`" if value is None else f"`{flags} {value}`"


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.required:
        return "required"
    if option.secondary_opts:
        return f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    return "" if option.default is None or option.default is False or option.default == "" else f"`{option.default}`"
