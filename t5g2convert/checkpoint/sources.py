"""The checkpoints that a conversion reads, open by their headers; what is on the Hub of them is fetched when needed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub import Origin, again, fetch, missing, open_source, size_of
from t5g2convert.checkpoint.hubfiles import Progress
from t5g2convert.checkpoint.roles import SOURCE, VISION_FROM, Folders, Role

Reads = Mapping[Role, Iterable[str]]
"""Files by their names in the checkpoint of each role."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The source of a conversion, and the donor of a vision tower if there is one."""

    source: Checkpoint
    vision_from: Checkpoint | None = None

    @classmethod
    def open(cls, source: Origin, vision_from: Origin | None = None) -> "Sources":
        """Open both by their headers.

        Raises:
            CheckpointError: One is not sound.
            HubError: The Hub does not have one or give it out, or cannot be reached.
        """
        return cls(open_source(source), None if vision_from is None else open_source(vision_from))

    @property
    def folders(self) -> Folders:
        """Where they lie, or will."""
        return Folders(self.source.path, vision_from=None if self.vision_from is None else self.vision_from.path)

    @property
    def origins(self) -> tuple[Origin, Origin | None]:
        """What to open both from again."""
        return again(self.source), None if self.vision_from is None else again(self.vision_from)

    def missing(self, reads: Reads) -> dict[Role, list[str]]:
        """Those of the files that are on the Hub and not yet here."""
        found = {role: missing(checkpoint, reads[role]) for role, checkpoint in self._roles().items()}
        return {role: names for role, names in found.items() if names}

    def size(self, reads: Reads) -> int:
        """Bytes of files that are on the Hub."""
        return sum(size_of(checkpoint, reads.get(role, ())) for role, checkpoint in self._roles().items())

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
        roles = self._roles().items()
        return Sources(**{role: fetch(checkpoint, reads[role], progress=progress) for role, checkpoint in roles})

    def _roles(self) -> dict[Role, Checkpoint]:
        return {SOURCE: self.source, **({} if self.vision_from is None else {VISION_FROM: self.vision_from})}


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
