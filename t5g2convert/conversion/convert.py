"""`convert`: make the plan, write it to a staging folder, and move that into place."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.hub.open_and_fetch import Origin, given_folders
from t5g2convert.checkpoint.hub.snapshot import download_again
from t5g2convert.checkpoint.sources import Folders, Sources, plain_name
from t5g2convert.command_options import takes_options
from t5g2convert.conversion.options import ConvertOptions, WriteOptions
from t5g2convert.conversion.output.path_rules import check_not_linked, check_target
from t5g2convert.conversion.output.staging import Staging
from t5g2convert.conversion.plan.builder import build_plan, open_sources
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.conversion.write.computed_tensors import TensorValues
from t5g2convert.conversion.write.resources import ASSET_BYTES, check_space, disk_space
from t5g2convert.conversion.write.resume import Journal
from t5g2convert.conversion.write.shards import Written, write_shards
from t5g2convert.conversion.write.small_files import write_assets
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.progress import Progress, silent

Downloading = Callable[[int], Progress]
"""Called with the number of bytes to download; returns the progress callback of the download."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished conversion.

    Attributes:
        output: The folder written.
        mapping: Name of the map used; None if trained values were put into a model.
        tensors: Number of tensors written.
        nbytes: Size of all shards in bytes.
        shards: sha256 by shard name, hexadecimal; None if hashing was switched off.
        parameters: Number of parameters by part, with `total`.
        notes: Notes for the user about this conversion.
        kept: Names of the shards that an earlier run finished.
        residual: Misfit of the embedding tables behind an aligned projector, from 0 (exact fit) to 1 (no fit); None
            without an aligned projector, or if an earlier run wrote it.
    """

    output: Path
    mapping: str | None
    tensors: int
    nbytes: int
    shards: Mapping[str, str | None]
    parameters: Mapping[str, int]
    notes: tuple[str, ...]
    kept: tuple[str, ...] = ()
    residual: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 convert --json` prints."""
        return {
            "output": str(self.output),
            "mapping": self.mapping,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "shards": [{"name": name, "sha256": digest} for name, digest in self.shards.items()],
            "parameters": dict(self.parameters),
            "notes": list(self.notes),
            "kept": list(self.kept),
            "residual": self.residual,
        }


@takes_options(ConvertOptions)
def convert(source: Origin, output: Path, options: ConvertOptions) -> Conversion:
    """Convert a Gemma 3 checkpoint into a T5Gemma 2 folder, or a Gemma 2 checkpoint into a T5Gemma folder.

    Example:
        >>> convert("google/gemma-3-4b-pt", Path("t5gemma-2-4b-4b"), dtype="bfloat16").parameters["total"]

    Args:
        source: The checkpoint folder to read. A str may also name a model on the Hub, org/name[@revision]: the files
            that are needed are downloaded into the Hub's cache.
        output: The folder to write. An existing empty folder is filled, and keeps its mode, owner and location.
        options: As keyword arguments; see `PlanOptions` and `WriteOptions`.

    Raises:
        CheckpointError: The source is damaged, does not match its config, or contains NaN or infinity.
        HubError: The Hub does not have a model, refuses access, or cannot be reached.
        MappingError: The map is faulty, does not fill the target, or an option does not fit this model.
        OutputError: The output exists or cannot be written.
        UsageError: An option has an impossible value.
    """
    plan, sources = prepare(source, output, options)
    return execute(plan, sources.folders, output, options)


def prepare(
    source: Origin, output: Path, options: ConvertOptions, *, downloading: Downloading | None = None
) -> tuple[Plan, Sources]:
    """Plan a conversion and download the files that it reads; see `convert`.

    Args:
        source: As in `convert`.
        output: As in `convert`.
        options: As in `convert`.
        downloading: Shows the progress of a download, if there is one.

    Returns:
        The plan, and the checkpoints, with all files that it reads on this machine.
    """
    folders = given_folders(source, options.decoder_from, options.vision_from)
    mapping = Path(options.mapping or "")
    # `os.path` here and in `check_target`: Path's methods raise for a name that is too long; later steps report it.
    read = [*folders, *([mapping] if os.path.isfile(mapping) else [])]  # noqa: PTH113
    check_target(output, *read, overwrite=options.overwrite)
    sources = open_sources(source, options)
    plan = build_plan(sources, options)
    if options.overwrite:
        # The links of the Hub's cache are known only now.
        check_not_linked(output, sources.folders.all)
    needed = disk_space(plan, sources, output)
    if needed.download:
        check_space(output, needed.output)
        sources = sources.fetch(plan.reads, None if downloading is None else downloading(needed.download))
        plan = plan.reading(sources.by_role)
    return plan, sources


def execute(
    plan: Plan,
    folders: Folders,
    output: Path,
    options: WriteOptions | None = None,
    *,
    values: TensorValues | None = None,
) -> Conversion:
    """Execute a plan; see `convert`.

    Args:
        plan: The plan.
        folders: The folders of the checkpoints that the plan reads.
        output: As in `convert`.
        options: How the output is written.
        values: The trained values, for a plan that puts them into a model (`plan_adapted`).
    """
    options = options or WriteOptions()
    hashing, flush, resume, allow_nonfinite = options.hashing, options.flush, options.resume, options.allow_nonfinite
    if values is not None and resume:
        raise UsageError("an export of trained values cannot be resumed: a finished shard may hold other values")
    with Staging(output, overwrite=options.overwrite, flush=flush, resume=resume) as staging:
        journal = Journal(staging.folder, plan, allow_nonfinite=allow_nonfinite, flush=flush) if hashing else None
        begun = journal is not None and journal.path.exists()
        kept = journal.salvage() if journal is not None and resume else {}
        try:
            missing = sum(shard.size for shard in plan.shards if shard.name not in kept)
            check_space(staging.target, missing + ASSET_BYTES)
            written = write_shards(
                plan,
                folders,
                staging.folder,
                journal=journal,
                kept=kept,
                allow_nonfinite=allow_nonfinite,
                flush=flush,
                progress=options.progress or silent,
                values=values,
            )
            _check_downloads(plan, folders, written)
            write_assets(plan, folders, staging.folder, written, flush=flush)
            if options.judge is not None:
                options.judge(staging.folder)
            staging.check_unchanged()  # before the journal is removed, so that --resume finds the finished shards
        except BaseException:
            if journal is not None and resume:
                journal.prune()
            raise
        if journal is not None:
            journal.remove()
        staging.commit()
    notes = (*plan.notes, *_notes(plan, kept, written, begun=begun), *staging.notes)
    return _conversion(plan, output, written, kept, notes)


def _conversion(
    plan: Plan, output: Path, written: Written, kept: Mapping[str, str], notes: tuple[str, ...]
) -> Conversion:
    return Conversion(
        output=output,
        mapping=plan.mapping,
        tensors=len(plan.tensors),
        nbytes=plan.nbytes,
        shards={shard.name: written.shards.get(shard.name) for shard in plan.shards},
        parameters=plan.parameters,
        notes=notes,
        kept=tuple(kept),
        residual=written.residual,
    )


def _check_downloads(plan: Plan, folders: Folders, written: Written) -> None:
    """Refuse downloaded files with another sha256 than the Hub states."""
    read = [(source.hub, file) for source in plan.sources.values() for file in source.files]
    for hub, file in read if written.sources else ():
        expected = None if hub is None else hub.files[plain_name(file.name)].sha256
        if expected not in (None, written.sources[file.name]):
            raise CheckpointError(
                f"has sha256 {written.sources[file.name]}, the Hub gives {expected}",
                where=folders.path(file.name),
                hint=download_again(folders.path(file.name)),
            )


def _notes(plan: Plan, kept: Mapping[str, str], written: Written, *, begun: bool) -> Iterator[str]:
    if kept:
        yield f"kept {len(kept)} of {len(plan.shards)} shards, which an earlier run finished"
    elif begun:
        yield "no shards of an earlier run match this conversion: all were written"
    if written.residual is not None:
        yield f"residual of the aligned embedding tables: {written.residual:.3g} (0: they fit exactly, 1: not at all)"
    elif any(tensor.content.alignment is not None for tensor in plan.tensors):
        yield "the aligned projector is in a kept shard; verify reports its residual"
    if written.nonfinite:
        where = " in the shards written now" if kept else ""
        yield f"{len(written.nonfinite)} tensor(s){where} hold NaN or infinity, copied as they are: " + some(
            written.nonfinite
        )
