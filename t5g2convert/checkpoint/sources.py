"""The checkpoints that a conversion reads, open by their headers; what is on the Hub of them is fetched when needed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.model import Origin, again, fetch, missing, open_source, size_of
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, VISION_FROM, Folders, Role
from t5g2convert.progress import Progress

Reads = Mapping[Role, Iterable[str]]
"""Files by their names in the checkpoint of each role."""


class OtherOrigins(TypedDict, total=False):
    """What the checkpoints beside the source are opened from, by their roles."""

    decoder_from: Origin | None
    vision_from: Origin | None


@dataclass(frozen=True, slots=True)
class Sources:
    """The checkpoints of a conversion: the source, and the others by their roles."""

    source: Checkpoint
    others: Mapping[Role, Checkpoint] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Origin, **others: Unpack[OtherOrigins]) -> "Sources":
        """Open all of them by their headers; what of their indices no shard holds is left to who applies a map.

        Raises:
            CheckpointError: One is not sound.
            HubError: The Hub does not have one or give it out, or cannot be reached.
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
        """All of them."""
        return {SOURCE: self.source, **self.others}

    @property
    def folders(self) -> Folders:
        """Where they lie, or will."""
        return Folders(self.source.path, **{role: checkpoint.path for role, checkpoint in self.others.items()})

    @property
    def origin(self) -> Origin:
        """What to open the source from again."""
        return again(self.source)

    @property
    def other_origins(self) -> OtherOrigins:
        """What to open the others from again."""
        return {
            "decoder_from": again(self.others[DECODER_FROM]) if DECODER_FROM in self.others else None,
            "vision_from": again(self.others[VISION_FROM]) if VISION_FROM in self.others else None,
        }

    @property
    def opened(self) -> OtherOrigins:
        """The others as they are open."""
        return {"decoder_from": self.others.get(DECODER_FROM), "vision_from": self.others.get(VISION_FROM)}

    def missing(self, reads: Reads) -> dict[Role, list[str]]:
        """Those of the files that are on the Hub and not yet here."""
        found = {role: missing(checkpoint, reads[role]) for role, checkpoint in self.by_role.items()}
        return {role: names for role, names in found.items() if names}

    def size(self, reads: Reads) -> int:
        """Bytes of files that are on the Hub."""
        return sum(size_of(checkpoint, reads.get(role, ())) for role, checkpoint in self.by_role.items())

    def fetch(self, reads: Reads, progress: Progress | None = None) -> "Sources":
        """Make sure that files are on this machine.

        Args:
            reads: The files.
            progress: Told of the bytes just downloaded.

        Returns:
            The checkpoints as they are here now.

        Raises:
            CheckpointError: A file has another header than was read on the Hub.
            HubError: The Hub does not give a file out, or cannot be reached.
            OutputError: The cache's disk has too little room or fails.
        """
        fetched = {role: fetch(checkpoint, reads[role], progress=progress) for role, checkpoint in self.by_role.items()}
        return Sources(fetched.pop(SOURCE), fetched)


def percent(what: str, total: int, told: Callable[[str], None]) -> Progress:
    """A progress that is told in words, whenever the percentage has changed."""
    done, shown = 0, -1

    def progress(count: int) -> None:
        nonlocal done, shown
        done += count
        if done * 100 // max(total, 1) > shown:
            shown = done * 100 // max(total, 1)
            told(f"{what}, {shown}%")

    return progress
