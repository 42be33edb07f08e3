"""The checkpoints that one conversion may read, and which of them a part of the target comes from."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Literal, get_args

Role = Literal["source", "decoder_from", "vision_from"]

SOURCE: Final = "source"
"""The checkpoint that is converted."""

DECODER_FROM: Final = "decoder_from"
"""Another parent for the decoder."""

VISION_FROM: Final = "vision_from"
"""The donor of a vision tower to a source that has none."""

ROLES: Final[tuple[Role, ...]] = get_args(Role)

STACKS: Final = ("encoder", "decoder")
"""The parts of the target that are text stacks."""

EMBEDDING: Final = "embedding"
"""The part that both stacks share: either parent may give it."""

_GIVEN: Final[Mapping[Role, frozenset[str]]] = {
    DECODER_FROM: frozenset({"decoder"}),
    VISION_FROM: frozenset({"vision", "projector"}),
}
"""The parts of the target that come from another checkpoint than the source, where there is one."""


def role_of(part: str, roles: Collection[Role], *, table: Role = SOURCE) -> Role:
    """The role of the checkpoint that a part of the target is read from.

    Args:
        part: The part.
        roles: The roles that there are.
        table: Which of them gives the embedding table.
    """
    if part == EMBEDDING:
        return table
    return next((role for role, parts in _GIVEN.items() if role in roles and part in parts), SOURCE)


def named(role: Role, name: str) -> str:
    """A file or tensor of the checkpoint in a role, as plans name it: the source's own as it is, others behind their
    role."""
    return name if role == SOURCE else f"{role}/{name}"


def role_in(file: str) -> Role:
    """The role of the checkpoint that a file is of, by its name in a plan."""
    return next((role for role in ROLES if role != SOURCE and file.startswith(f"{role}/")), SOURCE)


def plain_name(file: str) -> str:
    """The name in its checkpoint of a file as plans name it."""
    return file.removeprefix(named(role_in(file), ""))


class Folders:
    """Where the checkpoints of a conversion lie.

    Attributes:
        source: The folder of the source.
        by_role: All of them.

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
        """The path of a file by its name in a plan, which was made from these folders."""
        return self.by_role[role_in(file)] / plain_name(file)

    @property
    def all(self) -> tuple[Path, ...]:
        """Every folder that is read."""
        return tuple(self.by_role.values())
