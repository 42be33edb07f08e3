"""`convert`: plan, write, put in place."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.hub.model import Origin, given_folders
from t5g2convert.checkpoint.hub.snapshot import download_again
from t5g2convert.checkpoint.inputs import Folders, plain_name
from t5g2convert.checkpoint.sources import OtherOrigins, Sources
from t5g2convert.conversion.options import Options, PlanOptions
from t5g2convert.conversion.plan.builder import build_plan
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.conversion.write.assets import write_assets
from t5g2convert.conversion.write.computed_tensors import Given
from t5g2convert.conversion.write.copy import Progress
from t5g2convert.conversion.write.output_path import check_not_linked, check_target
from t5g2convert.conversion.write.resources import ASSET_BYTES, check_space, disk_space
from t5g2convert.conversion.write.resume import Journal
from t5g2convert.conversion.write.shards import Written, write_shards
from t5g2convert.conversion.write.staging import Staging
from t5g2convert.errors import CheckpointError, UsageError

Downloading = Callable[[int], Callable[[int], None]]
"""Called with the bytes that will be downloaded; gives the function that is told of each piece."""

Judge = Callable[[Path], None]
"""Raises if a folder is not what it should be."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished conversion.

    Attributes:
        output: The folder written.
        mapping: Name of the map used; None where trained values were put into a model.
        tensors: Number of tensors written.
        nbytes: Bytes of all shards.
        shards: sha256 by shard name, hexadecimal; None where hashing was switched off.
        parameters: Number of parameters by part, with `total`.
        notes: What a user should know of this conversion.
        kept: Names of the shards that an earlier run had finished.
        residual: How far the tables of an aligned projector are from fitting each other, 0 exactly and 1 not at all;
            None without one, or where it stands in a shard that was kept.
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
        """What `t5g2 convert --json` prints."""
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


def convert(
    source: Origin,
    output: Path,
    *,
    hashing: bool = True,
    flush: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    judge: Judge | None = None,
    **options: Unpack[PlanOptions],
) -> Conversion:
    """Convert a Gemma 3 checkpoint folder into a T5Gemma 2 folder, or a Gemma 2 into a T5Gemma.

    Args:
        source: The checkpoint folder to read; a str may also be a model of the Hub, org/name[@revision], of which the
            files that are needed are downloaded into the Hub's cache.
        output: The folder to write. One that is empty is filled, and keeps its mode, owner and place.
        hashing: Compute sha256 of all files while they are copied and record it in the manifest.
        flush: Wait until the disk has every byte before the output appears; without, a power loss may spoil it.
        overwrite: Replace an output of this tool that is there, at the end; nothing else is ever replaced.
        resume: Keep the shards that an earlier run into the same output had finished, after a look at their sha256; and
            leave finished ones for a later run if this one is stopped or the disk fails.
        allow_nonfinite: Copy NaN and infinity as they are; without, tensors that hold them are refused.
        progress: Called with the bytes just written, from any thread.
        judge: Called with the finished folder before it appears under its name; what it raises leaves no output.
        options: What decides the output's bytes beside the source; see `Options`.

    Raises:
        CheckpointError: The source is not sound, is not what its config implies, or holds NaN or infinity.
        HubError: The Hub does not have a model or give it out, or cannot be reached.
        MappingError: The map is faulty, does not fill the target, or an option does not fit this model.
        OutputError: The output exists or cannot be written.
        UsageError: An argument has no meaning.
    """
    plan, sources = prepare(source, output, overwrite=overwrite, hashing=hashing, resume=resume, **options)
    return execute(
        plan,
        sources.folders,
        output,
        overwrite=overwrite,
        hashing=hashing,
        flush=flush,
        resume=resume,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
        judge=judge,
    )


def prepare(
    source: Origin,
    output: Path,
    *,
    overwrite: bool = False,
    hashing: bool = True,
    resume: bool = False,
    downloading: Downloading | None = None,
    **options: Unpack[PlanOptions],
) -> tuple[Plan, Sources]:
    """Plan a conversion, and make sure that all files it reads are on this machine; see `convert`.

    Args:
        source: As in `convert`.
        output: As in `convert`.
        overwrite: As in `convert`.
        hashing: As in `convert`.
        resume: As in `convert`.
        downloading: Shows the download, if there is one.
        options: As in `convert`.
    """
    wanted = Options(**options)
    _check_resumable(hashing=hashing, resume=resume)
    given = given_folders(source, wanted.decoder_from, wanted.vision_from)
    mapping = Path(wanted.mapping or "")
    # `os.path` here and in `target`: Path's methods raise for a name that is too long, of which later steps tell.
    read = [*given, *([mapping] if os.path.isfile(mapping) else [])]  # noqa: PTH113
    check_target(output, *read, overwrite=overwrite)
    plan, sources = open_and_plan(source, **options)
    if overwrite:
        # The Hub's cache is known by now, and its links.
        check_not_linked(output, sources.folders.all)
    needed = disk_space(plan, sources, output)
    if needed.download:
        check_space(output, needed.output)
        sources = sources.fetch(plan.reads, None if downloading is None else downloading(needed.download))
        # Again, now that the files' identities are known.
        options = {**options, **sources.opened}
        plan = build_plan(sources.source, **options)
    return plan, sources


def open_and_plan(source: Origin, **options: Unpack[PlanOptions]) -> tuple[Plan, Sources]:
    """Plan a conversion of checkpoints that are opened for it; see `build_plan`."""
    others: OtherOrigins = {
        "decoder_from": options.get("decoder_from"),
        "vision_from": options.get("vision_from"),
    }
    sources = Sources.open(source, **others)
    options = {**options, **sources.opened}
    return build_plan(sources.source, **options), sources


def execute(
    plan: Plan,
    folders: Folders,
    output: Path,
    *,
    overwrite: bool = False,
    hashing: bool = True,
    flush: bool = True,
    resume: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    judge: Judge | None = None,
    given: Given | None = None,
) -> Conversion:
    """Execute a plan that `build_plan` made of the checkpoints in these folders; see `convert`.

    `given` are the values of a plan that puts trained ones into a model (`plan_adapted`).
    """
    _check_resumable(hashing=hashing, resume=resume)
    if given is not None and resume:
        raise UsageError("what is given to tensors cannot be resumed: a finished shard may hold other values")
    with Staging(output, overwrite=overwrite, flush=flush, resume=resume) as staging:
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
                progress=progress or _silent,
                given=given,
            )
            _check_downloads(plan, folders, written)
            write_assets(plan, folders, staging.folder, written, flush=flush)
            if judge is not None:
                judge(staging.folder)
            staging.check_unchanged()  # before the journal goes, so that --resume finds what is finished
        except BaseException:
            if journal is not None and resume:
                journal.prune()
            raise
        if journal is not None:
            journal.remove()
        staging.commit()
    return Conversion(
        output=output,
        mapping=plan.mapping,
        tensors=len(plan.tensors),
        nbytes=plan.nbytes,
        shards={shard.name: written.shards.get(shard.name) for shard in plan.shards},
        parameters=plan.parameters,
        notes=(*plan.notes, *_notes(plan, kept, written, begun=begun), *staging.notes),
        kept=tuple(kept),
        residual=written.residual,
    )


def _check_resumable(*, hashing: bool, resume: bool) -> None:
    if resume and not hashing:
        raise UsageError("a run can be resumed only with sha256: what was finished is known by it")


def _check_downloads(plan: Plan, folders: Folders, written: Written) -> None:
    """What was read of a model of the Hub must have the sha256 that the Hub tells, where it tells one."""
    read = [(source.hub, file) for source in plan.sources.values() for file in source.files]
    for hub, file in read if written.sources else ():
        expected = None if hub is None else hub.files[plain_name(file.name)].sha256
        if expected not in (None, written.sources[file.name]):
            raise CheckpointError(
                f"has sha256 {written.sources[file.name]}, the Hub tells {expected}",
                where=folders.path(file.name),
                hint=download_again(folders.path(file.name)),
            )


def _notes(plan: Plan, kept: Mapping[str, str], written: Written, *, begun: bool) -> Iterator[str]:
    if kept:
        yield f"{len(kept)} of {len(plan.shards)} shards were finished by an earlier run, and kept"
    elif begun:
        yield "an earlier run had finished nothing of this very conversion: all was written anew"
    if written.residual is not None:
        yield f"residual of the aligned embedding tables: {written.residual:.3g} (0: they fit exactly, 1: not at all)"
    elif any(tensor.content.alignment is not None for tensor in plan.tensors):
        yield "the aligned projector is in a shard that was kept; verify tells the residual"
    if written.nonfinite:
        where = " in the shards written now" if kept else ""
        yield f"{len(written.nonfinite)} tensor(s){where} hold NaN or infinity, copied as they are: " + some(
            written.nonfinite
        )


def _silent(count: int) -> None:
    """No progress is shown."""
