"""The page of each command, from its help, with examples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from docs.generate.tables import table

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "demo": ("t5g2 demo --out twin",),
    "inspect": ("t5g2 inspect gemma-3-4b-pt", "t5g2 inspect t5gemma-2-4b-4b --json"),
    "plan": ("t5g2 plan gemma-3-4b-pt --tensors --dtype float32",),
    "convert": ("t5g2 convert gemma-3-4b-pt my-t5gemma-2-4b-4b --max-shard-size 2GB --verify",),
    "extract": ("t5g2 extract t5gemma-2-4b-4b encoder-4b --part encoder",),
    "verify": ("t5g2 verify t5gemma-2-4b-4b --source gemma-3-4b-pt --html report.html --junit report.xml",),
    "average": ("t5g2 average run-4b t5gemma-2-4b-4b-adapted --model t5gemma-2-4b-4b --last 5",),
    "merge": ("t5g2 merge t5gemma-2-4b-4b adapter t5gemma-2-4b-4b-tuned",),
    "probe-sentinels": ("t5g2 probe-sentinels gemma-3-270m t5gemma-2-270m-trained",),
    "compare": ("t5g2 compare gemma-3-4b-pt t5gemma-2-4b-4b --text novel.txt --max-kl 0.1 --min-agreement 0.9",),
    "generate": (
        "t5g2 generate t5gemma-2-4b-4b --prompt 'an encoder-decoder' --max-new-tokens 8",
        "t5g2 generate t5gemma-2-4b-4b --hide-encoder --decoder-prompt 'a decoder' --max-new-tokens 8",
        "t5g2 generate t5gemma-2-4b-4b --prompt 'an encoder-decoder' --temperature 0.7 --seed 1 --json",
    ),
    "pack": ("t5g2 pack t5gemma-2-4b-4b packed novel.txt",),
    "card": ("t5g2 card t5gemma-2-4b-4b --repo your-name/t5gemma-2-4b-4b --write",),
    "doctor": ("t5g2 doctor",),
    "mappings list": ("t5g2 mappings list",),
    "mappings show": ("t5g2 mappings show gemma3",),
    "mappings check": ("t5g2 mappings check gemma3 --against gemma-3-4b-pt",),
    "mappings schema": ("t5g2 mappings schema > weight-map.schema.json",),
}
"""Example commands; tests/project/test_docs.py runs them."""


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
    usage = " ".join(["t5g2", name, *(["[OPTIONS]"] if options else []), *map(_placeholder, arguments)])
    sections = [command.help, f"```text\n{usage}\n```"]
    if name in EXAMPLES:
        shown = "\n".join(f"$ {line}" for line in EXAMPLES[name])
        sections.append(f"For example:\n\n```console\n{shown}\n```")
    if arguments:
        sections.append(table(("argument", ""), ((f"`{_placeholder(it)}`", it.help) for it in arguments)))
    if options:
        rows = ((_flags(it, types[it.name]), it.help, _default(it)) for it in options)
        sections.append(table(("option", "", "without it"), rows))
    return "\n\n".join(section.strip() for section in sections)


def _placeholder(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper())
    return name if argument.required else f"[{name}]"


def _flags(option: Any, kind: Any) -> str:
    flags = "/".join([*option.opts, *option.secondary_opts])
    choices = get_args(kind)
    if type(None) in choices:
        (kind,) = (each for each in choices if each is not type(None))
    if get_origin(kind) is list:
        (kind,) = get_args(kind)  # given several times
    if kind is bool:
        return f"`{flags}`"
    if get_origin(kind) is Literal:
        return f"`{flags} {'|'.join(map(str, get_args(kind)))}`"
    return f"`{flags} {option.metavar or {int: 'N', float: 'X', Path: 'PATH', str: 'TEXT'}[kind]}`"


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.required:
        return "required"
    if option.secondary_opts:
        return f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    return "" if option.default is None or option.default is False or option.default == "" else f"`{option.default}`"
