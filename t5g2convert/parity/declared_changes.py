"""Settings that a manifest declares as changed: remarks on them, and the config with the old values."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

from t5g2convert.checkpoint.families.registry import target_of
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.manifest import ChangeRecord
from t5g2convert.errors import CheckpointError

LENGTH: Final = "max_position_embeddings"
"""A setting that no computation depends on."""


def change_remarks(target: Checkpoint, changes: Mapping[str, ChangeRecord]) -> Iterator[str]:
    """Yield remarks on the changes."""
    if "dtype" in changes:
        yield (
            f"weights were cast from {changes['dtype'].source} to {changes['dtype'].target}, as declared: "
            "the parities are judged on the source with its weights so cast"
        )
    for setting, (before, after) in stack_changes(
        changes, tuple(target_of(target.config, target.path).stacks.values())
    ).items():
        remark = f"{setting} was changed from {before} to {after}, as declared"
        yield remark if LENGTH in setting else f"{remark}: the parities are judged with {before}"


def stack_changes(changes: Mapping[str, ChangeRecord], stacks: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Return old and new values by setting; one name for a setting that changed alike in all stacks."""
    found: dict[str, tuple[Any, Any]] = {}
    for field, change in changes.items():
        values = change.source, change.target
        stack = next((stack for stack in stacks if field.startswith(stack)), "")
        setting = field.removeprefix(stack)
        others = [changes.get(stack + setting) for stack in stacks]
        alike = all(other is not None and (other.source, other.target) == values for other in others)
        if "." in field:
            found[f"{setting} of both stacks" if alike else field] = values
    return found


def on_source_settings(target: Checkpoint, changes: Mapping[str, ChangeRecord]) -> dict[str, Any]:
    """Return the target's config.json with the old values of declared changes.

    Raises:
        CheckpointError: config.json lacks a setting that is declared as changed.
    """
    config = deepcopy(dict(target.config))
    for field, change in changes.items():
        *path, last = field.split(".")
        section: Any = config
        for key in path:
            section = section.get(key) if isinstance(section, dict) else None
        if path and not (isinstance(section, dict) and last in section):
            raise CheckpointError(f"t5g2.json declares a change of {field}, which config.json lacks")
        if path:
            section[last] = change.source
    return config
