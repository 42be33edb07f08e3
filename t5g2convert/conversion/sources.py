"""The checkpoints that a conversion reads, open, and what of them must be here before it begins."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub import Origin, absent, again, fetch, missing_bytes, open_source
from t5g2convert.conversion.plan import Plan
from t5g2convert.conversion.staging import ASSET_BYTES, check_space, same_disk
from t5g2convert.mapping.roles import SOURCE, VISION_FROM, Folders, Role

Downloading = Callable[[int], Callable[[int], None]]
"""Called with the bytes that will be downloaded; gives the function that is told of each piece."""


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
    def origins(self) -> tuple[Origin, Origin | None]:
        """What to open both from again."""
        return again(self.source), None if self.vision_from is None else again(self.vision_from)

    @property
    def folders(self) -> Folders:
        """Where they lie, or will."""
        return Folders(self.source.path, vision_from=None if self.vision_from is None else self.vision_from.path)

    def fetch(self, plan: Plan, output: Path, downloading: Downloading | None = None) -> "Sources":
        """Make sure that all files that a plan reads are on this machine.

        Args:
            plan: The plan, made of these.
            output: Where its output will go; there must be room for both on a disk that they share.
            downloading: Shows the download.

        Returns:
            These, if all was here; else what is here now, of which the plan must be made again.

        Raises:
            CheckpointError: A file has another header than was read on the Hub.
            HubError: The Hub does not give a file out, or cannot be reached.
            OutputError: There is too little room on a disk.
        """
        wanted = {role: (checkpoint, plan.reads[role]) for role, checkpoint in self._roles().items()}
        if not any(absent(*item) for item in wanted.values()):
            return self
        total = sum(missing_bytes(*item) for item in wanted.values())
        shared = any(same_disk(checkpoint.path, output) for checkpoint, names in wanted.values())
        check_space(output, plan.nbytes + ASSET_BYTES + (total if shared else 0))
        progress = None if downloading is None else downloading(total)
        return Sources(**{role: fetch(*item, progress=progress) for role, item in wanted.items()})

    def _roles(self) -> dict[Role, Checkpoint]:
        return {SOURCE: self.source, **({} if self.vision_from is None else {VISION_FROM: self.vision_from})}
