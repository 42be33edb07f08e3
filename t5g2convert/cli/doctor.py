"""`t5g2 doctor`."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, size_text, table
from t5g2convert.errors import MappingError
from t5g2convert.printable import printable
from t5g2convert.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from t5g2convert.checkpoint.cuda import Cuda
    from t5g2convert.checkpoint.diagnosis import Diagnosis, HubSettings


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Ask the Hub whom the token is of.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What t5g2 runs with: versions, the Hub's token (not shown), endpoint, cache, disk, xet, CUDA. Fails if broken."""
    from t5g2convert.checkpoint.diagnosis import diagnose

    found = diagnose(online=online)
    if not found.problems:
        found = _with_maps(found)
    if as_json:
        emit_json(found.to_json())
    else:
        _print(found)
    for problem in found.problems:
        print(printable(f"t5g2: {problem}"), file=sys.stderr)  # noqa: T201
    if found.problems:
        raise typer.Exit(found.problems[0].exit_code)


def _with_maps(found: "Diagnosis") -> "Diagnosis":
    """The same, with what is wrong with the shipped maps."""
    from t5g2convert.mapping.library import shipped_maps

    try:
        shipped_maps()
    except MappingError as error:
        return replace(found, problems=(error,))
    return found


def _print(found: "Diagnosis") -> None:
    rows = table("", "")
    rows.show_header = False
    rows.add_row("t5g2", __version__)
    rows.add_row("python", f"{found.python} on {found.platform}")
    for name, package in found.packages.items():
        need = "" if package.needed is None else f" (needs {package.needed})"
        rows.add_row(name, f"{package.version or 'not installed'}{need}")
    for name, text in (*_hub_rows(found.hub), ("CUDA", _cuda_text(found.cuda))):
        rows.add_row(name, printable(text))
    if found.user is not None:
        role = "" if found.user.role is None else f", token with role {found.user.role}"
        rows.add_row("user", f"{found.user.name}{role}")
    console().print(rows)


def _hub_rows(hub: "HubSettings | None") -> "Iterator[tuple[str, str]]":
    if hub is None:
        return
    yield "endpoint", hub.endpoint
    yield "token", "none" if hub.token_from is None else f"there, from {hub.token_from}"
    yield "offline", "yes, by HF_HUB_OFFLINE" if hub.offline else "no"
    yield "xet", "on" if hub.xet else "off"
    free = "" if hub.cache_free is None else f", {size_text(hub.cache_free)} free"
    yield "cache", f"{hub.cache}{free}"


def _cuda_text(cuda: "Cuda") -> str:
    """Whether passes can run on a graphics card, in words."""
    build = "torch is built without" if cuda.torch is None else f"torch is built for {cuda.torch}"
    driver = "no driver" if cuda.driver is None else f"the driver knows {cuda.driver}"
    return ", ".join([build, driver, *cuda.devices])
