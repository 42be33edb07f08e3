"""The headers, file names and manifest of an output, compared for provenance with its plan."""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from t5g2convert.checkpoint.file_names import INDEX_FILE, weight_files
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.checkpoint.folder import Checkpoint, read_json_object
from t5g2convert.checkpoint.manifest import Manifest, SourceRecord
from t5g2convert.checkpoint.sources import Folders, plain_name
from t5g2convert.conversion.plan.types import Plan, PlannedSource
from t5g2convert.version import __version__

THREADS: Final = 2


def header_faults(plan: Plan, target: Checkpoint) -> Iterator[str]:
    """Yield tensors that differ from the plan in name, dtype or shape."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    yield from (f"{name} is missing" for name in planned if name not in target.tensors)
    for name, stored in target.tensors.items():
        if name not in planned:
            yield f"{name} does not come from the source"
        elif (stored.entry.dtype, stored.entry.shape) != (planned[name].dtype, planned[name].shape):
            yield (
                f"{name} is {stored.entry.dtype} {list(stored.entry.shape)}, "
                f"expected {planned[name].dtype} {list(planned[name].shape)}"
            )


def file_faults(plan: Plan, target: Checkpoint, manifest: Manifest | None) -> Iterator[str]:
    """Yield missing files, and files that a loader may read but a conversion does not write."""
    count = len(target.files)
    weights = {*weight_files(count), *([] if count == 1 else [INDEX_FILE])}
    settings = {"config.json"} if plan.generation_config is None else {"config.json", "generation_config.json"}
    expected = settings | weights | {file.name for file in plan.files}
    found = expected if manifest is None else set(manifest.files)
    yield from (f"{name} is not a file of this conversion" for name in sorted(found - expected))
    yield from (f"{name} is not in t5g2.json" for name in sorted(expected - found))
    for name, header in target.files.items():
        if header.metadata != {"format": "pt"}:
            yield f"{name} has metadata {dict(header.metadata)!r}, expected format pt"
    if count > 1:
        metadata = read_json_object(target.path / INDEX_FILE).get("metadata")
        size = sum(tensor.nbytes for tensor in plan.tensors)
        if metadata != {"total_parameters": plan.parameters["total"], "total_size": size}:
            yield f"{INDEX_FILE} has metadata {metadata!r}, expected the counts of parameters and bytes"


def manifest_faults(plan: Plan, manifest: Manifest | None) -> Iterator[str]:
    """Yield differences between the manifest and the plan."""
    if manifest is None:
        return
    recorded, document = manifest.document(), plan.to_json()
    made_with = None if manifest.mapping is None else manifest.mapping.name
    if made_with != plan.mapping:
        yield f"t5g2.json was made with mapping {made_with!r}, not {plan.mapping!r}: pass that one with --mapping"
    if recorded.get("adaptation") != document.get("adaptation"):
        yield (
            "t5g2.json records trained names or parts that this source does not have"
            if plan.merged is None
            else "t5g2.json records another training of the source than the source's own t5g2.json"
        )
    if recorded.get("merged") != document.get("merged"):
        yield from _merge_faults(recorded.get("merged") or {}, document.get("merged") or {})
    for key in ("dtype", "parameters", "options", "changes", "tokens"):
        if recorded[key] != document[key]:
            yield f"t5g2.json says {key} {recorded[key]!r}, expected {document[key]!r}"
    # By name only, since the reasons may be reworded.
    dropped, expected = ([drop["name"] for drop in each["dropped"]] for each in (recorded, document))
    if dropped != expected:
        yield f"t5g2.json says dropped {dropped!r}, expected {expected!r}"
    for role, source in plan.sources.items():
        yield from _source_faults(role, source, manifest.sources.get(role))


def _merge_faults(recorded: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Yield differences between the recorded merge and the merge of this adapter."""
    told, found = recorded.get("adapter", {}), expected.get("adapter", {})
    for name in sorted(told.keys() | found.keys()):
        if told.get(name) != found.get(name):
            yield f"t5g2.json records another adapter: {name} has sha256 {found.get(name)}, not {told.get(name)}"
    for key in ("method", "targets", "tensors"):
        if recorded.get(key) != expected.get(key):
            yield f"t5g2.json records other {key} of the merged adapter than this adapter has"
    if recorded.get("before") != expected.get("before"):
        yield "t5g2.json records another merge before this one than the source's own t5g2.json"


def mapping_faults(plan: Plan, manifest: Manifest | None, *, shipped: bool) -> Iterator[str]:
    """Yield a fault if the manifest names another map than the plan; a shipped map may change between versions."""
    told = _map_digest(manifest)
    if manifest is None or told in (None, plan.mapping_sha256) or (shipped and manifest.tool.version != __version__):
        return
    yield f"t5g2.json says that mapping {plan.mapping} has sha256 {told}, but it has {plan.mapping_sha256}"


def _map_digest(manifest: Manifest | None) -> str | None:
    return None if manifest is None or manifest.mapping is None else manifest.mapping.sha256


def maker_remarks(plan: Plan, manifest: Manifest) -> list[str]:
    """Return a remark on the version that wrote the manifest."""
    made_by = manifest.tool.version
    if made_by == __version__:
        return []
    remarks = []
    if _release(made_by) > _release(__version__):
        remarks.append(
            f"t5g2.json was written by t5g2convert {made_by}, which is newer than this version, {__version__}"
        )
    told = _map_digest(manifest)
    if told is not None and told != plan.mapping_sha256:
        remarks.append(
            f"not checked: that it was made with mapping {plan.mapping} of sha256 {told[:16]}; t5g2convert {made_by} "
            f"had a different map than this version, {__version__}, which gives the same bytes"
        )
    return remarks


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, so that versions compare in order."""
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def weights_faults(plan: Plan, folders: Folders, manifest: Manifest | None) -> Iterator[str]:
    """Yield source weights with another sha256 than the manifest records, if it records one."""
    unhashed = manifest is None or all(file.sha256 is None for file in manifest.files.values())
    recorded = {} if manifest is None else manifest.sources
    named = []
    for role, source in plan.sources.items():
        told = recorded[role].files if role in recorded else {}
        for file in source.files:
            record = told.get(plain_name(file.name))
            if record is not None and record.sha256 is not None:
                named.append((role, file.name, record.sha256))
            elif not unhashed:
                yield f"t5g2.json records no sha256 for {plain_name(file.name)} of the {role}, but for other files"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: sha256_of(folders.path(item[1])), named)
        for (role, name, digest), actual in zip(named, found, strict=True):
            if actual != digest:
                yield (f"t5g2.json records sha256 {digest} for {plain_name(name)} of the {role}, but it has {actual}")


def _source_faults(role: str, planned: PlannedSource, told: SourceRecord | None) -> Iterator[str]:
    """Yield differences between the record of a source and the source."""
    if told is None:
        yield f"t5g2.json does not record a {role}"
        return
    found = {"family": (told.family, planned.family), "layout": (told.layout, dict(planned.layout))}
    for key, (actual, expected) in found.items():
        if actual != expected:
            yield f"t5g2.json says {role} {key} {actual!r}, expected {expected!r}"
    # A conversion of a model on the Hub may be compared with a local copy of the model, and the other way round.
    made_of, opened = (None if hub is None else f"{hub.repo}@{hub.revision}" for hub in (told.hub, planned.hub))
    if made_of is not None and opened is not None and made_of != opened:
        yield f"t5g2.json records {role} {made_of}, but {opened} was passed: pass the one that was converted"
    files = told.files
    sizes = {file.name.rpartition("/")[2]: file.identity.size for file in planned.files}
    sizes["config.json"] = planned.config.size
    if {name: file.bytes for name, file in files.items()} != sizes:
        yield f"t5g2.json records files with other names or sizes: {', '.join(files) or 'none'}"
    elif files["config.json"].sha256 != planned.config.sha256:
        yield f"t5g2.json records a {role} with a different config.json"
