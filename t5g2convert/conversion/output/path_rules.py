"""Checks of the output path before any work; they change nothing.

A missing target is created. An empty target is filled, and keeps its mode, owner and location. With `overwrite`, a
target that contains an output of t5g2 and nothing else is replaced. Everything else belongs to the user and is refused.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.folder import scheme_of
from t5g2convert.conversion.output.ownership import Listing, check_ours, check_own_folder, manifest_listing
from t5g2convert.conversion.output.recovery import INSIDE, WorkFolders, leftovers, real_path
from t5g2convert.errors import OutputError

MAX_LINKS: Final = 40
"""Maximum number of links to follow from one path, as in Linux."""

_OWN_NAME: Final = re.compile(rf"\..*{re.escape('.t5g2-')}(staging|old|removed(-\d+)?)|{re.escape(INSIDE)}", re.DOTALL)


def check_target(target: Path, *inputs: Path, overwrite: bool, listing: Listing = manifest_listing) -> None:
    """Refuse a target that must not be written.

    Args:
        target: The folder to be written.
        inputs: Folders and files that are read.
        overwrite: Whether to replace an output of t5g2.
        listing: Returns the files of an output to replace.

    Raises:
        OutputError: The target is a URL, a file, or a folder with files that t5g2 did not write; or it contains an
            input or is inside one, also through links.
    """
    check_apart(target, *inputs)
    check_vacant(target, overwrite=overwrite, listing=listing)
    if overwrite:
        check_not_linked(target, inputs)


def check_apart(target: Path, *inputs: Path) -> None:
    """Refuse a target that is, contains or is inside an input, or has a name that t5g2 reserves for its work.

    Raises:
        OutputError: The target is refused.
    """
    if scheme := scheme_of(target):
        raise OutputError(f"expected a folder, got a URL ({scheme}//...)")
    real = real_path(target)
    if taken := next((part for part in real.parts if _OWN_NAME.fullmatch(part)), None):
        raise OutputError(f"{taken} is a name reserved by t5g2", where=target, hint="choose another folder")
    cleared = (*_working(real), real / INSIDE)
    for given in inputs:
        what = "the source folder" if not os.path.isfile(given) else f"{given}, which is an input"  # noqa: PTH113
        read = real_path(given)
        if real == read or read.is_relative_to(real) or real.is_relative_to(read):
            relation = "is" if real == read else "contains" if read.is_relative_to(real) else "lies inside"
            raise OutputError(f"{relation} {what}", where=target, hint="choose another folder")
        for folder in cleared:
            if read.is_relative_to(folder):
                raise OutputError(
                    f"cannot be written: t5g2 needs {folder} as a work folder, but it is an input",
                    where=target,
                    hint="choose another folder",
                )


def check_vacant(target: Path, *, overwrite: bool, listing: Listing = manifest_listing) -> None:
    """Refuse a target that is not empty, except for an output of t5g2 with `overwrite`.

    Raises:
        OutputError: The target is not empty, or a name that t5g2 needs is taken.
    """
    real = real_path(target)
    if not os.path.lexists(target):
        _check_names(real)
        return
    if not os.path.isdir(target):  # noqa: PTH112 - False for a name that no folder can have
        raise OutputError("exists and is not a folder", where=target)
    try:
        found = set(os.listdir(real)) - leftovers(real)  # noqa: PTH208 - names are what is wanted
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=target) from error
    if not found:
        return
    if overwrite:
        _check_replaceable(target, listing)
        _check_names(real)
        return
    try:
        _check_replaceable(target, listing)
        hint = "--overwrite replaces it"
    except OutputError:
        hint = "choose another folder; --overwrite replaces only an output of t5g2"
        if is_mount_point(real):
            hint = "it is a mount point; choose a folder inside it"
    raise OutputError("exists and is not empty", where=target, hint=hint)


def _check_replaceable(target: Path, listing: Listing) -> None:
    """Refuse to replace a folder that contains anything but an output of t5g2, or that cannot be renamed."""
    real = real_path(target)
    if os.path.islink(target):  # noqa: PTH114
        raise OutputError(
            "is a link, and --overwrite does not follow links", where=target, hint=f"pass the folder itself: {real}"
        )
    for folder, what in ((".", "the current folder"), ("~", "the home folder")):
        other = Path(os.path.realpath(os.path.expanduser(folder)))  # noqa: PTH111 - no error where there is none
        if other.is_relative_to(real):
            relation = "is" if other == real else "contains"
            raise OutputError(f"{relation} {what} and is not replaced", where=target, hint="choose another folder")
    if is_mount_point(real):
        raise OutputError(
            "is a mount point, which cannot be replaced", where=target, hint="choose a folder inside it, or empty it"
        )
    try:
        owner = real.stat().st_uid
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=target) from error
    if owner != os.geteuid():
        raise OutputError(
            f"belongs to another user ({owner}) and is not replaced", where=target, hint="choose another folder"
        )
    check_ours(target, listing, ignored=frozenset(leftovers(real)))


def check_not_linked(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse to replace a target with a file that an input links to.

    Raises:
        OutputError: The target contains an input.
    """
    real = real_path(target)
    if not real.is_dir():
        return
    for given in inputs:
        for link in _links(given):
            for step in _steps(link):
                if step.is_relative_to(real):
                    raise OutputError(
                        f"contains {step.relative_to(real)}, an input through the link {link}",
                        where=target,
                        hint="choose another folder",
                    )


def check_report(path: Path, *inputs: Path) -> None:
    """Refuse a report path that would overwrite an input.

    Raises:
        OutputError: The path is an input, or a file in an input folder that does not look like an older report.
    """
    real = real_path(path)
    for given in inputs:
        read = real_path(given)
        is_report = real.suffix.lower() in (".xml", ".html")
        if real == read or (real.exists() and not is_report and real.is_relative_to(read)):
            raise OutputError("is an input, and would be overwritten", where=path, hint="choose another path")
        if any(step == real for link in _links(given) for step in _steps(link)):
            raise OutputError(
                "is an input through a link, and would be overwritten", where=path, hint="choose another path"
            )


def is_mount_point(folder: Path) -> bool:
    """Return whether a folder is a mount point, including bind mounts of the same disk."""
    if os.path.ismount(folder):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # The kernel writes blanks and line feeds in names as octal numbers.
    places = (re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4]) for line in mounts)
    return os.fsencode(folder) in places


def _check_names(real: Path) -> None:
    for path in _working(real):
        check_own_folder(path)


def _working(real: Path) -> tuple[Path, ...]:
    work = WorkFolders.of(real)
    return work.staging, work.old


def _links(given: Path) -> Iterator[Path]:
    """Yield the links that reading a path may follow: itself, and those below it."""
    if os.path.islink(given):  # noqa: PTH114
        yield given
    if os.path.isdir(given):  # noqa: PTH112
        for folder, folders, files in os.walk(given):
            yield from (path for path in (Path(folder, name) for name in (*folders, *files)) if path.is_symlink())


def _steps(link: Path) -> Iterator[Path]:
    """Yield the target of a link, and every link on the way."""
    for _ in range(MAX_LINKS):
        if not link.is_symlink():
            break
        following = link.parent / link.readlink()
        link = real_path(following.parent) / following.name
        yield link
    yield real_path(link)
