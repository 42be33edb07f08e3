"""What a user should know of a conversion before it is made, in sentences."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.roles import VISION_FROM
from t5g2convert.checkpoint.targets import target_of
from t5g2convert.conversion.layout import Draft
from t5g2convert.conversion.options import KEEP, Options
from t5g2convert.conversion.plan import Change
from t5g2convert.conversion.vocabulary import has_names
from t5g2convert.mapping.resolve import Resolution
from t5g2convert.mapping.schema import WeightMap

LENGTH: Final = "max_position_embeddings"
FACTORS: Final[Mapping[str, str]] = {
    "rope_parameters.full_attention.factor": "full layers",
    "rope_parameters.factor": "all layers",
}
"""Linear factors of RoPE, and the layers that they count in."""


def plan_notes(
    resolution: Resolution,
    drafts: Sequence[Draft],
    changes: Sequence[Change],
    options: Options,
    weight_map: WeightMap,
    config: Mapping[str, Any],
) -> Iterator[str]:
    """All notes of a plan, in the order in which they are shown; `config` is the target's."""
    for checkpoint in resolution.checkpoints.values():
        yield from checkpoint.notes
    yield from _vocabulary(resolution, drafts, changes)
    yield from _settings(changes, target_of(config, Path("config.json")).stacks)
    if options.preset is not None:
        for name in weight_map.presets[options.preset].assumed:
            yield f"preset {options.preset}: what the release has for {name} is not established"
    yield from _images(resolution, drafts)
    dtypes = sorted({draft.dtype for draft in drafts})
    if options.dtype == KEEP and len(dtypes) > 1:
        yield f"tensors have several dtypes ({', '.join(dtypes)}); config.json names {config['dtype']}"
    for drop in resolution.drops:
        yield f"{drop.tensor.entry.name} is dropped: {drop.drop.because}"


def _vocabulary(resolution: Resolution, drafts: Sequence[Draft], changes: Sequence[Change]) -> Iterator[str]:
    for change in changes:
        if change.field == "vocab_size":
            yield f"the embedding table is cut from {change.source} to {change.target} rows"
        elif change.field in resolution.model.values and "vision" in resolution.model.conditions:
            yield f"{change.field} moves from {change.source} to {change.target}"
    for draft in drafts:
        if draft.content.kind == "zeros" and draft.origin is not None:
            yield f"{draft.name} is zeros: the vocabulary has no such token"


def _settings(changes: Sequence[Change], stacks: Sequence[str]) -> Iterator[str]:
    """Settings that are not the source's: one note for all stacks where they agree."""
    by_setting: dict[tuple[str, Any, Any], list[str]] = {}
    for change in changes:
        stack = next((stack for stack in stacks if change.field.startswith(stack)), None)
        if stack is not None:
            setting = change.field.removeprefix(stack)
            by_setting.setdefault((setting, change.source, change.target), []).append(change.field)
    for (setting, source, target), named in by_setting.items():
        name = setting if len(named) == len(stacks) else named[0]
        yield f"{name} is {target}, the source's is {source}: {_effect(setting, source, target)}"


def _effect(setting: str, source: Any, target: Any) -> str:
    """What it means that a setting is not the source's."""
    if setting == LENGTH:
        return "longer inputs are allowed" if target > source else "shorter inputs are allowed"
    if setting in FACTORS:
        return f"positions in {FACTORS[setting]} are divided by {target:g}"
    return "that changes what is computed"


def _images(resolution: Resolution, drafts: Sequence[Draft]) -> Iterator[str]:
    conditions = resolution.model.conditions
    if any(item.part == "vision" and item.source is None for item in resolution.targets):
        yield "the source has no vision tower: the target gets a stub of no layers and cannot read images"
    if VISION_FROM in resolution.checkpoints:
        taken = sum(item.role == VISION_FROM and item.source is not None for item in resolution.targets)
        left = len(resolution.checkpoints[VISION_FROM].tensors) - taken
        yield f"{taken} tensors are the donor's; its other {left} are left behind"
    if "projector_zeros" in conditions:
        yield "the projector is zeros: images mean nothing until it is trained"
    for alignment in (draft.content.alignment for draft in drafts):
        if alignment is not None:
            rows = f"{alignment.rows} rows of both embedding tables"
            yield f"the projector is the donor's, carried over by least squares between {rows}"
            if not has_names(resolution):
                yield f"that the {rows} are the same tokens was not looked at: a tokenizer.json is missing"
