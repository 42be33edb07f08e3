"""Packing: documents are tokenized once, into memory-mapped shards that training reads."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from t5g2convert.adaptation.data.chat import PairMaker, template_sha256
from t5g2convert.adaptation.data.document_batches import MAX_FAULTS, DocumentBatches
from t5g2convert.adaptation.data.document_encoder import (
    DocumentEncoder,
    Encoded,
    Pieces,
    TooLong,
    encode_batches,
    pair_limits,
)
from t5g2convert.adaptation.data.images import PLACEHOLDER
from t5g2convert.adaptation.data.index import FORMAT, INDEX_FILE, AppendedEntry, Index, SkippedEntry, tokens_entry
from t5g2convert.adaptation.data.output_files import HashedFile, OutputFiles
from t5g2convert.adaptation.data.pack_journal import Deciding, Journal, Mark, PackState, counts_text, faults_text
from t5g2convert.adaptation.data.packed import SKIPPED_FILE, Packed
from t5g2convert.adaptation.data.packed_files import PackedFiles
from t5g2convert.adaptation.data.packed_output import check_packed_output, open_existing, packed_listing
from t5g2convert.adaptation.data.pair_documents import PairDocument
from t5g2convert.adaptation.data.rows import Fault, Row
from t5g2convert.adaptation.data.tokens import read_tokens
from t5g2convert.adaptation.pack_options import PackOptions
from t5g2convert.command_options import takes_options
from t5g2convert.conversion.output.path_rules import check_apart, check_target
from t5g2convert.conversion.output.staging import Staging
from t5g2convert.errors import DataError, UsageError
from t5g2convert.version import __version__

LONG_HINT: Final = "--truncate skip leaves such pairs out, --truncate input cuts inputs"
KEPT_HINT: Final = "what was packed is kept; --resume continues it with the same options and any --skip-bad"


@dataclass(frozen=True, slots=True)
class Packing:
    """The result of packing.

    Attributes:
        output: The folder.
        index: Its index, with `append` of all documents, old and new.
        sha256: sha256 of index.json, the identity of the data.
        notes: Notes for the user.
    """

    output: Path
    index: Index
    sha256: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 pack --json` prints."""
        index = self.index
        return {
            "output": str(self.output),
            "documents": index.text.documents,
            "tokens": index.text.tokens,
            "image_documents": index.image.documents,
            "image_tokens": index.image.tokens,
            "pairs": index.pair.documents,
            "pair_tokens": index.pair.tokens,
            "cut": index.pair.cut,
            "too_long": index.pair.too_long,
            "images": index.pictures.images,
            "empty": index.empty,
            "skipped": 0 if index.skipped is None else index.skipped.documents,
            "shards": len(index.text.shards) + len(index.image.shards) + len(index.pair.shards),
            "tokenizer_sha256": index.tokenizer_sha256,
            "sha256": self.sha256,
            "highest": index.highest,
            "special": dict(index.special),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def pack_documents(model: Path, output: Path, documents: Iterable[Row | PairDocument], options: PackOptions) -> Packing:
    """Write documents as packed data, in a folder that appears when it is complete.

    `pack` is the same with the options as keyword arguments:

    ```python
    pack(Path("t5gemma-2"), Path("packed"), [Document("greeting", "Hello, world")], bos=True)
    ```

    With `workers`, a script must call it below `if __name__ == "__main__"`, since each worker imports the script.

    Args:
        model: The folder of the model to train: its tokenizer and token ids are used.
        output: The folder to write. An empty folder is filled, and keeps its mode and owner.
        documents: The documents, pairs and conversations, in order.
        options: The options of `t5g2 pack`.

    Raises:
        CheckpointError: The model has no tokenizer, or its config is not valid.
        DataError: More documents cannot be packed than may be skipped (`details` lists them), or there are none. Or
            the existing data of `append` is missing, damaged, or was packed with another tokenizer or `bos`. Or the run
            that `resume` continues had other documents or options.
        MachineError: A worker process died.
        OutputError: The output exists and is not replaced, or the disk is full or fails. Or the files of the run that
            `resume` continues are damaged.
        UsageError: `bos` is set, but the model has no bos; or both `append` and `overwrite` are set.
    """
    bos, append, flush = options.bos, options.append, options.flush
    if append and options.overwrite:
        raise UsageError("pass either --append or --overwrite, not both")
    overwrite = append or options.overwrite
    tokens = read_tokens(model)
    check_apart(output, model, *options.sources)
    check_packed_output(output)
    check_target(output, model, *options.sources, overwrite=overwrite, listing=packed_listing)
    if bos and tokens.bos is None:
        raise UsageError("--bos needs a model with a bos token")
    encoder = DocumentEncoder(model, tokens, bos=bos, limits=pair_limits(model, options))
    maker = PairMaker(model, tokens, encoder.text.special, all_turns=options.all_turns)
    with (
        Staging(
            output,
            overwrite=overwrite,
            flush=flush,
            resume=options.resume,
            kept_hint=KEPT_HINT,
            listing=packed_listing,
            last=[INDEX_FILE],
            # Files that are linked are not lost, and hashing them would take longer than packing.
            thoroughly=not append,
        ) as staging,
        ExitStack() as stack,
    ):
        # A killed run's data is back in its place only now.
        existing = open_existing(output, model, bos=bos) if append else None
        journal = Journal(staging.folder, _deciding(encoder, options, existing), flush=flush)
        begun = journal.read() if options.resume else None
        output_files = OutputFiles(staging.folder, flush=flush, kept=None if begun is None else begun.files)
        counts = np.zeros(tokens.vocabulary, np.uint64) if begun is None else begun.read_counts()
        files = PackedFiles(stack.enter_context(output_files), options.shard_tokens, counts)
        batches = DocumentBatches(maker, tokens, begun, skip_bad=options.skip_bad)
        packer = _Packer(files, encoder, batches, options)
        packer.start(existing, begun)
        packer.run(documents, journal)
        if options.resume and begun is None and existing is not None and _is_there(existing, batches.sha256):
            journal.remove()
            return Packing(output, existing.index, existing.sha256, ("these documents were appended before",))
        index = packer.finish()
        text = index.model_dump_json(indent=1).encode() + b"\n"
        with HashedFile(staging.folder / INDEX_FILE) as file:
            file.write(text)
            file.finish(flush=flush)
        staging.commit()
    notes = [*staging.notes]
    if begun is not None:
        notes.append(f"continued an interrupted pack after its first {begun.rows:,} documents")
    if batches.plain_placeholders:
        notes.append(
            f"{batches.plain_placeholders:,} document(s) without images contain {PLACEHOLDER}, packed as plain text"
        )
    if files.pictures.losing:
        notes.append(
            f"{files.pictures.losing:,} image(s) have 16-bit or float values or transparency, which become 8-bit RGB "
            "as in transformers: check that they still show what they should"
        )
    return Packing(output, index, hashlib.sha256(text).hexdigest(), tuple(notes))


pack = takes_options(PackOptions)(pack_documents)


def _is_there(existing: Packed, rows: str) -> bool:
    """Return whether rows are what was appended last, by a run that was killed behind its commit."""
    appended = existing.index.appended
    return appended is not None and appended.rows == rows


def _deciding(encoder: DocumentEncoder, options: PackOptions, existing: Packed | None) -> Deciding:
    limits = encoder.limits
    truncate = "" if options.truncate is None else f" --truncate {options.truncate}"
    return Deciding(
        version=__version__,
        tokenizer_sha256=encoder.text.sha256,
        tokens=tokens_entry(encoder.tokens),
        bos=encoder.bos,
        shard_tokens=options.shard_tokens,
        pairs=f"--max-input {limits.source} --max-target {limits.target}{truncate}"
        + " --all-turns" * options.all_turns,
        template=template_sha256(encoder.model),
        existing=None if existing is None else existing.sha256,
    )


class _Packer:
    """Tokenizes documents in batches and writes them; memory depends only on the number of distinct images."""

    def __init__(
        self, files: PackedFiles, encoder: DocumentEncoder, batches: DocumentBatches, options: PackOptions
    ) -> None:
        self._files, self._encoder, self._batches = files, encoder, batches
        self._skip_bad, self._workers = options.skip_bad, options.workers
        self._skip_long = options.truncate == "skip"
        self._empty = self._before = self._cut = self._too_long = 0
        self._existing: Packed | None = None

    def start(self, existing: Packed | None, begun: PackState | None) -> None:
        """Start with all documents of existing packed data, or with those of an interrupted run, which has these too.

        Raises:
            DataError: The tables of the existing data cannot be read, or were modified.
            OutputError: The disk is full or fails.
        """
        self._existing = existing
        if existing is not None:
            index = existing.index
            self._before = index.text.documents + index.image.documents + index.pair.documents
            if begun is None:
                self._cut, self._too_long, self._batches.blank = index.pair.cut, index.pair.too_long, index.empty
                self._files.take_over(existing)
        if begun is not None:
            self._cut, self._too_long, self._files.pictures.losing = begun.cut, begun.too_long, begun.losing

    def run(self, rows: Iterable[Row | PairDocument], journal: Journal) -> None:
        """Pack all documents.

        Raises:
            DataError: More cannot be packed than may be skipped, or there are none.
        """
        known = self._files.pictures.known
        batches = self._batches.read(rows)
        with closing(encode_batches(batches, self._encoder, known, workers=self._workers)) as encoded:
            for batch, results in encoded:
                self._write_batch(batch, results)
                mark = self._batches.next_mark()
                if mark is not None and journal.is_due:
                    journal.save(partial(self._state, mark, journal.deciding))
        if len(self._batches.faults) > self._skip_bad:
            raise _refusal(self._in_order(), self._skip_bad)
        if self._files.documents == self._before:
            index = None if self._existing is None else self._existing.index
            empty = self._batches.blank + self._empty - (0 if index is None else index.empty)
            too_long = self._too_long - (0 if index is None else index.pair.too_long)
            counts = f"{empty} empty" + f", {too_long} too long" * (too_long > 0)
            if skipped := len(self._batches.faults):
                counts += f", {skipped} skipped"
            raise DataError(f"no document can be packed ({counts})", hint="pass other input")

    def _state(self, mark: Mark, deciding: Deciding) -> PackState:
        """Return the state after the rows of a mark, when the system has all their bytes, or the disk."""
        return PackState(
            format=1,
            deciding=deciding,
            rows=mark.rows,
            sha256=mark.sha256,
            documents=mark.documents,
            empty=mark.blank + self._empty,
            cut=self._cut,
            too_long=self._too_long,
            plain_placeholders=mark.plain_placeholders,
            losing=self._files.pictures.losing,
            faults=faults_text(self._batches.faults, mark.documents),
            counts=counts_text(self._files.counts),
            files=self._files.files.states(),
        )

    def _in_order(self) -> list[Fault]:
        return [fault for _, fault in sorted(self._batches.faults.items())]

    def _write_batch(self, batch: list[Pieces], results: list[Encoded | Fault | None]) -> None:
        packed = []
        for document, result in zip(batch, results, strict=True):
            if result is None:
                self._empty += 1
            elif isinstance(result, TooLong) and self._skip_long:
                self._too_long += 1
            elif isinstance(result, Fault):
                self._batches.faults[document.number] = result
            else:
                packed.append(result)
                self._cut += result.cut
        self._files.add(packed)

    def finish(self) -> Index:
        """Close all files and return their index."""
        return Index(
            format=FORMAT,
            tokenizer_sha256=self._encoder.text.sha256,
            tokens=tokens_entry(self._encoder.tokens),
            bos=self._encoder.bos,
            empty=self._batches.blank + self._empty,
            skipped=self._write_skipped(),
            appended=None
            if self._existing is None
            else AppendedEntry(existing=self._existing.sha256, rows=self._batches.sha256),
            **self._files.finish(self._encoder.text.special, cut=self._cut, too_long=self._too_long),
        )

    def _write_skipped(self) -> SkippedEntry | None:
        """Write the list of the skipped documents, if there are any: a line of JSON for each."""
        earlier = None if self._existing is None else self._existing.index.skipped
        if not self._batches.faults and earlier is None:
            return None
        with HashedFile(self._files.files.folder / SKIPPED_FILE) as file:
            if self._existing is not None and earlier is not None:
                file.copy(self._existing.folder / SKIPPED_FILE, earlier.sha256)
            for fault in self._in_order():
                file.write(json.dumps({"where": fault.where, "reason": fault.reason}).encode() + b"\n")
            count = len(self._batches.faults) + (0 if earlier is None else earlier.documents)
            return SkippedEntry(documents=count, sha256=file.finish(flush=self._files.files.flush))


def _refusal(faults: Sequence[Fault], skip_bad: int) -> DataError:
    if len(faults) == 1:
        hint = LONG_HINT if isinstance(faults[0], TooLong) else "--skip-bad 1 packs the others"
        return DataError(faults[0].reason, where=faults[0].where, hint=hint)
    count = f"{len(faults)} documents" + " or more" * (len(faults) >= skip_bad + MAX_FAULTS)
    return DataError(
        f"{count} cannot be packed",
        where=faults[0].where,
        hint=LONG_HINT
        if all(isinstance(each, TooLong) for each in faults)
        else f"mend them, or skip up to N with --skip-bad N{f' (now {skip_bad})' if skip_bad else ''}",
        details=[f"{it.where}: {it.reason}" for it in faults],
    )
