"""What the tool runs with: libraries, the Hub's settings and cache, graphics cards; and what of it is broken.

Libraries are looked up and not imported, the Hub is asked nothing unless that is wanted, and no token is read out.
"""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from t5g2convert.checkpoint.cuda import Cuda, find_cuda
from t5g2convert.checkpoint.hub.error_messages import LOGIN_HINT, OFFLINE_HINT, hub_errors
from t5g2convert.errors import HubError, OutputError, T5g2Error, UsageError
from t5g2convert.printable import printable
from t5g2convert.version import __version__

DISTRIBUTION: Final = "t5g2convert"
OPTIONAL: Final = ("transformers", "hf-xet")
"""Libraries that are told of though the tool does without."""

_NEED: Final = re.compile(r"([\w.-]+)>=(\d+(?:\.\d+)*)")
_RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")


@dataclass(frozen=True, slots=True)
class Package:
    """A library: its version, None where it is not installed; the oldest that will do, None where none is needed."""

    version: str | None
    needed: str | None


@dataclass(frozen=True, slots=True)
class HubSettings:
    """How the Hub is used.

    Attributes:
        endpoint: Its address, without a name or password that HF_ENDPOINT may hold.
        token: Whether there is a token.
        token_from: Where it is: the name of a variable of the environment, or `file`.
        offline: Whether HF_HUB_OFFLINE is set.
        xet: Whether large files go by xet.
        cache: The folder of downloads.
        cache_free: Free bytes of its disk; None where that cannot be told.
    """

    endpoint: str
    token: bool
    token_from: str | None
    offline: bool
    xet: bool
    cache: str
    cache_free: int | None


@dataclass(frozen=True, slots=True)
class User:
    """Who the Hub says that the token is of, and what the token may do, if it tells."""

    name: str
    role: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found; `problems` are what the tool cannot work with."""

    python: str
    platform: str
    packages: dict[str, Package]
    hub: HubSettings | None
    cuda: Cuda
    user: User | None
    problems: tuple[T5g2Error, ...]

    def to_json(self) -> dict[str, Any]:
        """What `t5g2 doctor --json` prints."""
        problems = [
            {"code": error.exit_code, "message": error.message, "where": error.where, "hint": error.hint}
            for error in self.problems
        ]
        return {
            "version": __version__,
            "python": self.python,
            "platform": self.platform,
            "packages": {name: asdict(package) for name, package in self.packages.items()},
            "hub": None if self.hub is None else asdict(self.hub),
            "cuda": asdict(self.cuda),
            "user": None if self.user is None else asdict(self.user),
            "problems": problems,
        }


def diagnose(*, online: bool = False) -> Diagnosis:
    """Look at everything; with `online` the Hub is asked whom the token is of."""
    packages = _packages()
    problems: list[T5g2Error] = list(_unfit(packages))
    hub = user = None
    try:
        hub = _hub() if packages["huggingface-hub"].version is not None else None
        user = _whoami(hub) if online and hub is not None else None
    except T5g2Error as error:
        problems.append(error)
    problems += [] if hub is None else _cache_faults(Path(hub.cache))
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        hub=hub,
        cuda=find_cuda(),
        user=user,
        problems=tuple(problems),
    )


def _packages() -> dict[str, Package]:
    """What the tool needs, by its own metadata, and what it can use."""
    found = {"huggingface-hub": Package(_version("huggingface-hub"), None)}
    for need in _requirements():
        match = _NEED.fullmatch(need)
        if match is not None:
            name = re.sub(r"[-_.]+", "-", match[1]).lower()
            found[name] = Package(_version(name), match[2])
    found |= {name: Package(_version(name), None) for name in OPTIONAL if name not in found}
    return dict(sorted(found.items()))


def _requirements() -> list[str]:
    """What must be installed; nothing is known where the tool runs from a checkout without being installed."""
    try:
        return [need for need in metadata.requires(DISTRIBUTION) or [] if ";" not in need]
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unfit(packages: dict[str, Package]) -> Iterator[T5g2Error]:
    """Libraries that are missing or too old."""
    for name, package in packages.items():
        if package.needed is None:
            continue
        hint = f"pip install '{name}>={package.needed}'"
        if package.version is None:
            yield UsageError(f"{name} is not installed, expected {package.needed} or newer", hint=hint)
        elif _release(package.version) < _release(package.needed):
            yield UsageError(f"{name} is {package.version}, expected {package.needed} or newer", hint=hint)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison; without trailing zeros, so that 2.0 is 2."""
    found = _RELEASE.match(version)
    numbers = [int(number) for number in found[0].split(".")] if found is not None else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _hub() -> HubSettings:
    """How the Hub is used.

    Raises:
        HubError: HF_ENDPOINT is no address.
        UsageError: huggingface_hub cannot be imported.
    """
    given = os.environ.get("HF_ENDPOINT")
    if given and _endpoint(given) is None:
        # What stands there is not told: it may be a token, put into the wrong variable.
        raise HubError("HF_ENDPOINT is no address, expected https://...", hint="unset it to ask huggingface.co")
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise UsageError(f"huggingface-hub cannot be imported: {error}", hint="install it again") from None

    place = _token_place()
    cache = Path(constants.HF_HUB_CACHE)
    try:
        free = shutil.disk_usage(_existing(cache)).free
    except OSError:
        free = None
    return HubSettings(
        endpoint=_endpoint(constants.ENDPOINT) or "",
        token=place is not None,
        token_from=place,
        offline=bool(constants.HF_HUB_OFFLINE),
        xet=not constants.HF_HUB_DISABLE_XET and _version("hf-xet") is not None,
        cache=str(cache),
        cache_free=free,
    )


def _token_place() -> str | None:
    """Where a token is, in the order in which huggingface_hub looks; asking it for the token may ask the network."""
    from huggingface_hub import constants

    for name in ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    try:
        return "file" if Path(constants.HF_TOKEN_PATH).read_text().strip() else None
    except (OSError, ValueError):
        return None


def _endpoint(address: str) -> str | None:
    """The Hub's address without what may be secret in it; None if it is none."""
    try:
        parts = urlsplit(address)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


def _existing(path: Path) -> Path:
    """A path, or the nearest above it that is there."""
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), path)


def _cache_faults(cache: Path) -> Iterator[T5g2Error]:
    """Why nothing can be downloaded."""
    place = _existing(cache)
    if not place.is_dir():
        yield OutputError("the Hub's cache cannot be there: it is no folder", where=place, hint="HF_HOME moves it")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield OutputError("the Hub's cache cannot be written", where=place, hint="HF_HOME moves it")


def _whoami(hub: HubSettings) -> User:
    """Ask the Hub whom the token is of.

    Raises:
        HubError: There is no token, the Hub does not accept it, or cannot be reached or asked.
    """
    if hub.offline:
        raise HubError("HF_HUB_OFFLINE is set, so it is not asked", where=hub.endpoint, hint=OFFLINE_HINT)
    if not hub.token:
        raise HubError("there is no token to ask with", where=hub.endpoint, hint=LOGIN_HINT)
    from t5g2convert.checkpoint.hub.snapshot import hub_api

    with hub_errors(hub.endpoint):
        told: Any = hub_api().whoami()
        name = told.get("name") if isinstance(told, dict) else None
        if not isinstance(name, str):
            raise ValueError("no name")
        return User(printable(name), _role(told.get("auth")))


def _role(auth: Any) -> str | None:
    """What a token may do, `read`, `write` or `fineGrained`, where the Hub tells."""
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    role = token.get("role") if isinstance(token, dict) else None
    return printable(role) if isinstance(role, str) else None
