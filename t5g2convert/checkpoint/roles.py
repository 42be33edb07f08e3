"""The checkpoints that one conversion may read, and which of them a part of the target comes from."""

from collections.abc import Collection
from pathlib import Path
from typing import Final, Literal

Role = Literal["source", "vision_from"]

SOURCE: Final = "source"
"""The checkpoint that is converted."""

VISION_FROM: Final = "vision_from"
"""The donor of a vision tower to a source that has none."""

GRAFTED_PARTS: Final = frozenset({"vision", "projector"})
"""Parts of the target that come from the donor, where there is one."""


def role_of(parts: Collection[str], roles: Collection[Role]) -> Role:
    """The role of the checkpoint that a row for these parts reads, among those that there are."""
    return VISION_FROM if VISION_FROM in roles and GRAFTED_PARTS.issuperset(parts) else SOURCE


def named(role: Role, file: str) -> str:
    """A file of the checkpoint in a role, as plans name it: the source's own as it is, others behind their role."""
    return file if role == SOURCE else f"{role}/{file}"


def role_in(file: str) -> Role:
    """The role of the checkpoint that a file is of, by its name in a plan."""
    return VISION_FROM if file.startswith(f"{VISION_FROM}/") else SOURCE


def plain_name(file: str) -> str:
    """The name in its checkpoint of a file as plans name it."""
    return file.rpartition("/")[2]


class Folders:
    """Where the checkpoints of a conversion lie.

    Args:
        source: The folder of the source.
        vision_from: The folder of the donor of a vision tower.
    """

    def __init__(self, source: Path, *, vision_from: Path | None = None) -> None:
        self.source, self.vision_from = source, vision_from

    def path(self, file: str) -> Path:
        """The path of a file by its name in a plan; a plain name cannot hold a slash."""
        role, _, name = file.rpartition("/")
        folder = self.vision_from if role == VISION_FROM else self.source
        assert folder is not None, "a plan reads only what it was made from"
        return folder / name

    @property
    def all(self) -> tuple[Path, ...]:
        """Every folder that is read."""
        return (self.source,) if self.vision_from is None else (self.source, self.vision_from)
