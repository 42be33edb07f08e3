"""The opened checkpoints of a conversion; files on the Hub are fetched when they are needed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.model import Origin, again, fetch, missing, open_source, size_of
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, VISION_FROM, Folders, Role
from t5g2convert.progress import Progress, Steps

Reads = Mapping[Role, Iterable[str]]
"""The names of files, by input."""


class OtherOrigins(TypedDict, total=False):
    """Where the other inputs of a conversion come from."""

    decoder_from: Origin | None
    vision_from: Origin | None


@dataclass(frozen=True, slots=True)
class Sources:
    """The checkpoints of a conversion: the source, and the other inputs by name."""

    source: Checkpoint
    others: Mapping[Role, Checkpoint] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Origin, **others: Unpack[OtherOrigins]) -> "Sources":
        """Open all inputs by their headers; the caller checks what is `unheld`.

        Raises:
            CheckpointError: An input is not sound.
            HubError: The Hub does not have an input or refuses it, or cannot be reached.
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
        """What opens the source again."""
        return again(self.source)

    @property
    def other_origins(self) -> OtherOrigins:
        """What opens the other inputs again."""
        return {
            "decoder_from": again(self.others[DECODER_FROM]) if DECODER_FROM in self.others else None,
            "vision_from": again(self.others[VISION_FROM]) if VISION_FROM in self.others else None,
        }

    @property
    def opened(self) -> OtherOrigins:
        """The other inputs, opened."""
        return {"decoder_from": self.others.get(DECODER_FROM), "vision_from": self.others.get(VISION_FROM)}

    def missing(self, reads: Reads) -> dict[Role, list[str]]:
        """Return those of the files that are on the Hub and not yet in its cache."""
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
            CheckpointError: A file has another header than was read on the Hub.
            HubError: The Hub refuses a file, or cannot be reached.
            OutputError: The disk of the cache is too full or fails.
        """
        fetched = {role: fetch(checkpoint, reads[role], progress=progress) for role, checkpoint in self.by_role.items()}
        return Sources(fetched.pop(SOURCE), fetched)


def percent(what: str, total: int, report: Steps) -> Progress:
    """Return a progress that reports `what` and its percentage whenever that changes."""
    done, shown = 0, -1

    def progress(count: int) -> None:
        nonlocal done, shown
        done += count
        if done * 100 // max(total, 1) > shown:
            shown = done * 100 // max(total, 1)
            report(f"{what}, {shown}%")

    return progress
