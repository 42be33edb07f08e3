"""`t5g2 doctor`: whether this installation can work; `hf env` shows the settings of the Hub's client."""

import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, size_text, table
from t5g2convert.errors import HubError, MappingError, OutputError, T5g2Error, UsageError
from t5g2convert.printable import printable
from t5g2convert.version import __version__

DISTRIBUTION: Final = "t5g2convert"
OPTIONAL: Final = ("transformers", "hf-xet")
"""Libraries to show although they are not required."""

_REQUIREMENT: Final = re.compile(r"([\w.-]+)>=(\d+(?:\.\d+)*)")
_RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check the installation: library versions, the Hub's cache and free disk, where the token is, CUDA, the maps.

    Exits with an error code if something is broken. Does not access the network, and never shows a token.
    """
    packages = _packages()
    problems = list(_unfit(packages))
    hub = _check_hub(problems)
    cuda = _check_cuda(problems)
    _check_maps(problems)
    if as_json:
        emit_json(
            {
                "version": __version__,
                "packages": {name: {"version": has, "needed": needs} for name, (has, needs) in packages.items()},
                "hub": hub,
                "cuda": cuda,
                "problems": [
                    {"code": error.exit_code, "message": error.message, "where": error.where, "hint": error.hint}
                    for error in problems
                ],
            }
        )
    else:
        _print(packages, hub, cuda)
    for problem in problems:
        print(printable(f"t5g2: {problem}"), file=sys.stderr)  # noqa: T201
    if problems:
        raise typer.Exit(problems[0].exit_code)


def _packages() -> dict[str, tuple[str | None, str | None]]:
    """Return the installed and the oldest supported version of each library; None if there is none."""
    needed = dict.fromkeys(("huggingface-hub", *OPTIONAL))
    return {name: (_version(name), needs) for name, needs in sorted((needed | _requirements()).items())}


def _requirements() -> dict[str, str | None]:
    """Return the oldest supported version of each required library; empty if this package is not installed."""
    try:
        required = [need for need in metadata.requires(DISTRIBUTION) or [] if ";" not in need]
    except metadata.PackageNotFoundError:
        return {}
    matches = [match for match in map(_REQUIREMENT.fullmatch, required) if match is not None]
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in matches}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unfit(packages: dict[str, tuple[str | None, str | None]]) -> Iterator[T5g2Error]:
    """Yield an error for each library that is missing or too old."""
    for name, (version, needed) in packages.items():
        if needed is None:
            continue
        hint = f"pip install '{name}>={needed}'"
        if version is None:
            yield UsageError(f"{name} is not installed, expected {needed} or newer", hint=hint)
        elif _release(version) < _release(needed):
            yield UsageError(f"{name} is {version}, expected {needed} or newer", hint=hint)


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version for comparison, without trailing zeros, so that 2.0 equals 2."""
    found = _RELEASE.match(version)
    numbers = [int(number) for number in found[0].split(".")] if found is not None else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _check_hub(problems: list[T5g2Error]) -> dict[str, Any] | None:
    """Return the token's location and the cache; add problems that stop the Hub's client to `problems`."""
    address = os.environ.get("HF_ENDPOINT")
    if address and not _is_address(address):
        # Do not repeat the value: it may be a token in the wrong variable.
        problems.append(
            HubError("HF_ENDPOINT is not a URL, expected https://...", hint="unset it to use huggingface.co")
        )
        return None
    try:
        from huggingface_hub import constants
    except ImportError as error:
        if _version("huggingface-hub") is not None:
            problems.append(UsageError(f"huggingface-hub cannot be imported: {error}", hint="reinstall it"))
        return None
    cache = Path(constants.HF_HUB_CACHE)
    existing = next((path for path in (cache, *cache.parents) if os.path.lexists(path)), cache)
    if not existing.is_dir():
        problems.append(OutputError("the Hub's cache cannot be created: not a folder", where=existing, hint=_MOVE))
    elif not os.access(existing, os.W_OK | os.X_OK):
        problems.append(OutputError("the Hub's cache is not writable", where=existing, hint=_MOVE))
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        free = None
    return {"token_from": _token_location(), "cache": str(cache), "cache_free": free}


_MOVE: Final = "set HF_HOME to move it"


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises if the port is not a number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _token_location() -> str | None:
    """Return the variable that holds the token, or `file`, in huggingface_hub's order of precedence.

    This does not call huggingface_hub, which may use the network to get the token.
    """
    from huggingface_hub import constants

    for name in ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    try:
        return "file" if Path(constants.HF_TOKEN_PATH).read_text().strip() else None
    except (OSError, ValueError):
        return None


def _check_cuda(problems: list[T5g2Error]) -> dict[str, Any]:
    """Return torch's CUDA version, the devices that it can use, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import torch
        except (ImportError, OSError) as error:
            if _version("torch") is not None:
                problems.append(UsageError(f"torch cannot be imported: {error}", hint="reinstall it"))
            return {"torch": None, "devices": [], "warning": None}
        # For a driver that is too old, torch only warns.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [printable(torch.cuda.get_device_name(number)) for number in range(count)]
    warning = next((str(item.message) for item in caught if "cuda" in str(item.message).lower()), None)
    return {"torch": torch.version.cuda, "devices": devices, "warning": warning}


def _check_maps(problems: list[T5g2Error]) -> None:
    from t5g2convert.mapping.library import shipped_maps

    try:
        shipped_maps()
    except MappingError as error:
        problems.append(error)


def _print(
    packages: dict[str, tuple[str | None, str | None]], hub: dict[str, Any] | None, cuda: dict[str, Any]
) -> None:
    rows = table("", "")
    rows.show_header = False
    rows.add_row("t5g2", __version__)
    for name, (version, needed) in packages.items():
        rows.add_row(name, (version or "not installed") + ("" if needed is None else f" (needs {needed})"))
    if hub is not None:
        rows.add_row("token", "none" if hub["token_from"] is None else f"found, from {hub['token_from']}")
        free = "" if hub["cache_free"] is None else f", {size_text(hub['cache_free'])} free"
        rows.add_row("cache", printable(f"{hub['cache']}{free}"))
    build = "torch is built without CUDA" if cuda["torch"] is None else f"torch is built for {cuda['torch']}"
    devices = cuda["devices"] or ["no device"]
    rows.add_row("CUDA", printable(", ".join([build, *devices])))
    if cuda["warning"] is not None:
        rows.add_row("", printable(cuda["warning"]))
    console().print(rows)
