"""The plan of a conversion, training or merge, rebuilt from its source and the options in its manifest.

Only provenance and its modules use the converter, and only for the origin of each tensor. They read the bytes
themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.adapter import Adapter, open_adapter
from t5g2convert.checkpoint.file_names import ADAPTER_FILE
from t5g2convert.checkpoint.file_store import is_there, sha256_of
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.conversion.options import PlanOptions
from t5g2convert.conversion.plan.builder import build_plan, open_sources
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.conversion.trained_model import named_by, plan_adapted, plan_merged
from t5g2convert.errors import CheckpointError, MappingError, UsageError


@dataclass(frozen=True, slots=True)
class Replay:
    """The conversion that this version would make of a source.

    Attributes:
        plan: Its plan.
        mismatch: Why the plan differs from the manifest's; None if it may be the same.
        shipped: Whether the map ships with this tool, so that it may change between versions.
        adapter: The adapter that the plan merges into the source.
    """

    plan: Plan
    mismatch: str | None = None
    shipped: bool = True
    adapter: Adapter | None = None


def replay_conversion(
    sources: Sources, manifest: Manifest | None, mapping: str | None, part: str | None = None
) -> Replay:
    """Plan a conversion again; without the recorded options if no conversion can have had them.

    Args:
        sources: The checkpoints that the conversion read.
        manifest: The manifest of the conversion, if the folder has one.
        mapping: The map, if not the shipped one for the source.
        part: The part that was extracted, if the source was not converted whole.

    Raises:
        CheckpointError: The source does not match its config.
        MappingError: The map is faulty, or does not fill the target.
    """
    # A user's own map is named by its file.
    shipped = mapping is None or not (mapping.endswith((".yaml", ".yml")) or "/" in mapping)
    recorded = {} if manifest is None else manifest.options
    try:
        return Replay(replay_plan(sources, recorded, mapping, part), None, shipped)
    except (CheckpointError, MappingError, UsageError) as error:
        with_heads = None if manifest is None else _without_heads(sources, recorded, mapping, part)
        if with_heads is not None:
            mismatch = "t5g2.json does not record drop_heads, but this source cannot be converted without it"
            return Replay(with_heads, mismatch, shipped)
        if not recorded:
            raise
        # If the source cannot be planned without options either, the manifest is not at fault.
        plan = replay_plan(sources, {}, mapping, part)
        mismatch = f"t5g2.json records options that do not apply to this source: {error.message}"
        return Replay(plan, mismatch, shipped)


def replay_plan(sources: Sources, recorded: Mapping[str, Any], mapping: str | None, part: str | None = None) -> Plan:
    """Return the plan that this version makes with the recorded options; see `replay_conversion`."""
    options = PlanOptions.of_record(recorded, mapping=mapping, part=part, **sources.other_origins)
    return build_plan(open_sources(sources.origin, options), options)


def _without_heads(sources: Sources, recorded: Mapping[str, Any], mapping: str | None, part: str | None) -> Plan | None:
    """Return the plan with drop_heads, which the manifest does not record; None if that is not possible either."""
    if recorded.get("drop_heads"):
        return None
    try:
        return replay_plan(sources, {**recorded, "drop_heads": True}, mapping, part)
    except (CheckpointError, MappingError, UsageError):
        return None


def replay_training(sources: Sources, manifest: Manifest | None, _mapping: str | None = None) -> Replay:
    """Plan again the copy of a model with trained values.

    Raises:
        CheckpointError: The source does not match its config.
    """
    source = sources.source
    if manifest is None or manifest.adaptation is None:
        return Replay(plan_adapted(source, {}, None), "t5g2.json records no adaptation")
    recorded = {key: value for key, value in manifest.adaptation.document().items() if key not in ("trained", "frozen")}
    names = named_by(manifest.adaptation.trained, source.tensors)
    dtype = PlanOptions.of_record(manifest.options).dtype
    shapes = {name: source.tensors[name].entry.shape if name in source.tensors else () for name in names}
    try:
        return Replay(plan_adapted(source, shapes, recorded, dtype=dtype))
    except CheckpointError as error:
        # If the source cannot be planned without the training either, the manifest is not at fault.
        reason = error.details[0] if error.details else error.message
        mismatch = f"t5g2.json records a training that does not fit this source: {reason}"
        return Replay(plan_adapted(source, {}, None), mismatch)


def replay_merge(
    sources: Sources, manifest: Manifest | None, _mapping: str | None = None, adapter: Path | None = None
) -> Replay:
    """Plan again the merge of an adapter into a model.

    Raises:
        CheckpointError: The source does not match its config, or the adapter is damaged or does not fit it.
    """
    assert adapter is not None, "verify requires an adapter for a merge"
    opened = open_adapter(adapter)
    digests = {path.name: sha256_of(path) for path in (adapter / ADAPTER_FILE, opened.weights)}
    options = {} if manifest is None else manifest.options
    record = None if manifest is None else manifest.merged
    mismatch = None if manifest is None or record is not None else "t5g2.json records no merged adapter"
    adaptation, merged = None if manifest is None else manifest.adaptation, None if record is None else record.before
    if is_there(sources.source.path / MANIFEST_FILE):
        before = read_manifest(sources.source.path)
        adaptation, merged = before.adaptation, before.merged
    dtype = PlanOptions.of_record(options).dtype
    return Replay(
        plan_merged(sources.source, opened, digests, adaptation, merged, dtype=dtype), mismatch, adapter=opened
    )


def check_options(manifest: Manifest) -> None:
    """Refuse a manifest with options that no conversion can have had.

    Raises:
        CheckpointError: An option is not valid.
    """
    others = {"decoder_from": manifest.decoder_from, "vision_from": manifest.vision_from}
    origins = {role: Path() for role, record in others.items() if record is not None}
    try:
        PlanOptions.of_record(manifest.options, **origins)
    except UsageError as error:
        raise CheckpointError(f"records an invalid option: {error.message}") from None
