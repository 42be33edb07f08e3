"""The inputs of a conversion by name, and the input that each part of the target is read from."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Literal, get_args

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
    """Return the input that a part of the target is read from.

    Args:
        part: The part.
        roles: The inputs that there are.
        table: The input that the embedding table comes from.
    """
    if part == EMBEDDING:
        return table
    return next((role for role, parts in _GIVEN.items() if role in roles and part in parts), SOURCE)


def named(role: Role, name: str) -> str:
    """Return the name of a file or tensor in a plan: those of other inputs than the source have its name in front.

    >>> named("source", "config.json"), named("vision_from", "config.json")
    ('config.json', 'vision_from/config.json')
    """
    return name if role == SOURCE else f"{role}/{name}"


def role_in(file: str) -> Role:
    """Return the input of a file, from its name in a plan."""
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
        """Every folder that is read."""
        return tuple(self.by_role.values())
