"""The inputs of a conversion: their roles and folders, and the opened checkpoints.

Files on the Hub are fetched when they are needed.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypedDict, Unpack, get_args

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.open_and_fetch import Origin, again, fetch, missing, open_source, size_of
from t5g2convert.progress import Progress, Steps

Role = Literal["source", "decoder_from", "vision_from"]

SOURCE: Final = "source"
"""The checkpoint that is converted."""

DECODER_FROM: Final = "decoder_from"
"""Another parent for the decoder (`--decoder-from`)."""

VISION_FROM: Final = "vision_from"
"""The donor of a vision tower for a source without one (`--vision-from`)."""

ROLES: Final[tuple[Role, ...]] = get_args(Role)

STACKS: Final = ("encoder", "decoder")
"""The parts of the target that are text stacks."""

EMBEDDING: Final = "embedding"
"""The part that both stacks share; it comes from either parent."""

_GIVEN: Final[Mapping[Role, frozenset[str]]] = {
    DECODER_FROM: frozenset({"decoder"}),
    VISION_FROM: frozenset({"vision", "projector"}),
}
"""The parts of the target that another input replaces."""


def role_of(part: str, roles: Collection[Role], *, table: Role = SOURCE) -> Role:
    """Return the input that provides a part of the target.

    Args:
        part: The part.
        roles: The available inputs.
        table: The input that provides the embedding table.
    """
    if part == EMBEDDING:
        return table
    return next((role for role, parts in _GIVEN.items() if role in roles and part in parts), SOURCE)


def named(role: Role, name: str) -> str:
    """Return the name of a file or tensor in a plan: for inputs other than the source, with the input in front.

    >>> named("source", "config.json"), named("vision_from", "config.json")
    ('config.json', 'vision_from/config.json')
    """
    return name if role == SOURCE else f"{role}/{name}"


def role_in(file: str) -> Role:
    """Return the input that a file belongs to, from its name in a plan."""
    return next((role for role in ROLES if role != SOURCE and file.startswith(f"{role}/")), SOURCE)


def plain_name(file: str) -> str:
    """Return the name of a file in its own checkpoint, from its name in a plan."""
    return file.removeprefix(named(role_in(file), ""))


class Folders:
    """The folders of a conversion's inputs.

    Attributes:
        source: The folder of the source.
        by_role: All folders, by input.

    Args:
        source: The folder of the source.
        decoder_from: The folder of the decoder's parent.
        vision_from: The folder of the donor of a vision tower.
    """

    def __init__(self, source: Path, *, decoder_from: Path | None = None, vision_from: Path | None = None) -> None:
        self.source = source
        given: dict[Role, Path | None] = {SOURCE: source, DECODER_FROM: decoder_from, VISION_FROM: vision_from}
        self.by_role: Mapping[Role, Path] = {role: folder for role, folder in given.items() if folder is not None}

    def path(self, file: str) -> Path:
        """Return the path of a file, from its name in a plan of these folders."""
        return self.by_role[role_in(file)] / plain_name(file)

    @property
    def all(self) -> tuple[Path, ...]:
        """All folders that are read."""
        return tuple(self.by_role.values())


Reads = Mapping[Role, Iterable[str]]
"""The names of files, by input."""


class OtherOrigins(TypedDict, total=False):
    """The origins of a conversion's inputs other than the source."""

    decoder_from: Origin | None
    vision_from: Origin | None


@dataclass(frozen=True, slots=True)
class Sources:
    """The checkpoints of a conversion: the source, and the other inputs by name."""

    source: Checkpoint
    others: Mapping[Role, Checkpoint] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Origin, **others: Unpack[OtherOrigins]) -> "Sources":
        """Open all inputs, reading only headers; the caller checks `Checkpoint.unheld`.

        Raises:
            CheckpointError: An input is not valid.
            HubError: The Hub does not have an input, refuses access, or cannot be reached.
        """
        given: dict[Role, Origin | None] = {
            DECODER_FROM: others.get("decoder_from"),
            VISION_FROM: others.get("vision_from"),
        }
        return cls(
            open_source(source, allow_unheld=True),
            {role: open_source(origin, allow_unheld=True) for role, origin in given.items() if origin is not None},
        )

    @property
    def by_role(self) -> dict[Role, Checkpoint]:
        """All inputs by name, the source first."""
        return {SOURCE: self.source, **self.others}

    @property
    def folders(self) -> Folders:
        """The folders of all inputs."""
        return Folders(self.source.path, **{role: checkpoint.path for role, checkpoint in self.others.items()})

    @property
    def origin(self) -> Origin:
        """The origin that reopens the source."""
        return again(self.source)

    @property
    def other_origins(self) -> OtherOrigins:
        """The origins that reopen the other inputs."""
        return {
            "decoder_from": again(self.others[DECODER_FROM]) if DECODER_FROM in self.others else None,
            "vision_from": again(self.others[VISION_FROM]) if VISION_FROM in self.others else None,
        }

    def missing(self, reads: Reads) -> dict[Role, list[str]]:
        """Return the files that are on the Hub but not yet in its cache."""
        found = {role: missing(checkpoint, reads[role]) for role, checkpoint in self.by_role.items()}
        return {role: names for role, names in found.items() if names}

    def size(self, reads: Reads) -> int:
        """Return the size in bytes of files that are on the Hub."""
        return sum(size_of(checkpoint, reads.get(role, ())) for role, checkpoint in self.by_role.items())

    def fetch(self, reads: Reads, progress: Progress | None = None) -> "Sources":
        """Download files that are on the Hub.

        Args:
            reads: The files.
            progress: Called with the bytes just downloaded.

        Returns:
            The same checkpoints, with these files in the cache.

        Raises:
            CheckpointError: A file's header differs from the one read on the Hub.
            HubError: The Hub refuses a file, or cannot be reached.
            OutputError: The disk of the cache is too full or fails.
        """
        fetched = {role: fetch(checkpoint, reads[role], progress=progress) for role, checkpoint in self.by_role.items()}
        return Sources(fetched.pop(SOURCE), fetched)


def download_progress(total: int, report: Steps) -> Progress:
    """Return a progress callback that reports the percentage of a download whenever it changes."""
    done, shown = 0, -1

    def progress(count: int) -> None:
        nonlocal done, shown
        done += count
        if done * 100 // max(total, 1) > shown:
            shown = done * 100 // max(total, 1)
            report(f"download, {shown}%")

    return progress
