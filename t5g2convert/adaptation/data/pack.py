"""Packing: documents are tokenized once, into memory-mapped shards that training reads."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from t5g2convert.adaptation.data.document_encoder import DocumentEncoder, Encoded, Pieces, encode_batches
from t5g2convert.adaptation.data.documents import Document, Fault
from t5g2convert.adaptation.data.image_documents import PICTURES_FILE
from t5g2convert.adaptation.data.images import PLACEHOLDER, text_pieces
from t5g2convert.adaptation.data.index import FORMAT, INDEX_FILE, Index, PairEntry, SkippedEntry, tokens_entry
from t5g2convert.adaptation.data.packed import COUNTS_FILE, SKIPPED_FILE, Packed
from t5g2convert.adaptation.data.packed_output import check_packed_output, open_existing, packed_listing
from t5g2convert.adaptation.data.packed_writer import HashedFile, PictureFiles, StreamFiles, places_of
from t5g2convert.adaptation.data.pair_documents import PairDocument, Part, with_places
from t5g2convert.adaptation.data.pairs import PAIR, PAIR_PICTURES_FILE
from t5g2convert.adaptation.data.token_stream import END
from t5g2convert.adaptation.data.tokens import read_tokens
from t5g2convert.adaptation.options import PackOptions
from t5g2convert.command_options import takes_options
from t5g2convert.conversion.output.path_rules import check_apart, check_target
from t5g2convert.conversion.output.staging import Staging
from t5g2convert.errors import DataError, UsageError

BATCH_CHARACTERS: Final = 1 << 20
"""Characters tokenized at once, plus at most one document."""

BATCH_DOCUMENTS: Final = 4096

BATCH_IMAGES: Final = 64
"""Images in memory at once, plus those of at most one document."""

MAX_FAULTS: Final = 100
"""Faulty documents after which packing stops."""


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


def pack_documents(
    model: Path, output: Path, documents: Iterable[Document | PairDocument | Fault], options: PackOptions
) -> Packing:
    """Write documents as packed data, in a folder that appears when it is complete.

    `pack` is the same with the options as keyword arguments:

    ```python
    pack(Path("t5gemma-2"), Path("packed"), [Document("greeting", "Hello, world")], bos=True)
    ```

    With `workers`, a script must call it below `if __name__ == "__main__"`, since each worker imports the script.

    Args:
        model: The folder of the model to train: its tokenizer and token ids are used.
        output: The folder to write. An empty folder is filled, and keeps its mode and owner.
        documents: The documents and pairs, in order.
        options: The options of `t5g2 pack`.

    Raises:
        CheckpointError: The model has no tokenizer, or its config is not valid.
        DataError: More documents cannot be packed than may be skipped (`details` lists them), or there are none. Or
            the existing data of `append` is missing, damaged, or was packed with another tokenizer or `bos`.
        MachineError: A worker process died.
        OutputError: The output exists and is not replaced, or the disk is full or fails.
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
    encoder = DocumentEncoder(model, tokens, bos=bos)
    with (
        Staging(
            output,
            overwrite=overwrite,
            flush=flush,
            listing=packed_listing,
            last=[INDEX_FILE],
            # Files that are linked are not lost, and hashing them would take longer than packing.
            thoroughly=not append,
        ) as staging,
        ExitStack() as stack,
    ):
        # A killed run's data is back in its place only now.
        existing = open_existing(output, model, bos=bos) if append else None
        files = _Files(staging.folder, options.shard_tokens, stack, flush=flush)
        packer = _Packer(files, encoder, skip_bad=options.skip_bad, workers=options.workers)
        if existing is not None:
            packer.take_over(existing)
        packer.run(documents)
        index = packer.finish()
        text = index.model_dump_json(indent=1).encode() + b"\n"
        with HashedFile(staging.folder / INDEX_FILE) as file:
            file.write(text)
            file.finish(flush=flush)
        staging.commit()
    notes = [*staging.notes]
    if packer.plain_placeholders:
        notes.append(
            f"{packer.plain_placeholders:,} document(s) without images contain {PLACEHOLDER}, packed as plain text"
        )
    if files.pictures.losing:
        notes.append(
            f"{files.pictures.losing:,} image(s) have 16-bit or float values or transparency, which become 8-bit RGB "
            "as in transformers: check that they still show what they should"
        )
    return Packing(output, index, hashlib.sha256(text).hexdigest(), tuple(notes))


pack = takes_options(PackOptions)(pack_documents)


class _Files:
    """All files of the output except its index."""

    def __init__(self, folder: Path, shard_tokens: int, stack: ExitStack, *, flush: bool) -> None:
        self.folder, self.flush = folder, flush
        self.text = stack.enter_context(StreamFiles(folder, "text", shard_tokens, flush=flush))
        self.image = stack.enter_context(StreamFiles(folder, "image", shard_tokens, flush=flush))
        self.pair = stack.enter_context(StreamFiles(folder, PAIR, shard_tokens, flush=flush))
        self.pictures = stack.enter_context(PictureFiles(folder, flush=flush))
        self.image_rows, self.pair_rows = (
            stack.enter_context(HashedFile(folder / name)) for name in (PICTURES_FILE, PAIR_PICTURES_FILE)
        )
        self.counts = stack.enter_context(HashedFile(folder / COUNTS_FILE))

    @property
    def documents(self) -> int:
        return self.text.documents + self.image.documents + self.pair.documents


class _Packer:
    """Tokenizes documents in batches and writes them; memory depends only on the number of distinct images."""

    def __init__(self, files: _Files, encoder: DocumentEncoder, *, skip_bad: int, workers: int) -> None:
        self._files, self._encoder, self._tokens = files, encoder, encoder.tokens
        self._skip_bad, self._workers = skip_bad, workers
        self._counts = np.zeros(self._tokens.vocabulary, dtype=np.uint64)
        self._faults: dict[int, Fault] = {}
        """By the numbers of the documents."""
        self._empty = self._before = 0
        self._existing: Packed | None = None
        self.plain_placeholders = 0
        """Documents without images that have a placeholder in their text."""

    def take_over(self, existing: Packed) -> None:
        """Start with all documents of existing packed data.

        Raises:
            DataError: Its tables cannot be read, or were modified.
            OutputError: The disk is full or fails.
        """
        files, index, self._existing = self._files, existing.index, existing
        files.text.take_over(existing.folder, index.text)
        files.image.take_over(existing.folder, index.image)
        rows = [(files.image_rows, index.pictures.places, index.pictures.sha256)]
        if index.has_pair_files:
            files.pair.take_over(existing.folder, index.pair)
            rows.append((files.pair_rows, index.pair.places, index.pair.pictures))
        files.pictures.take_over(existing.folder, index.pictures, *rows)
        self._before, self._empty = files.documents, index.empty
        self._counts += existing.counts

    def run(self, documents: Iterable[Document | PairDocument | Fault]) -> None:
        """Pack all documents.

        Raises:
            DataError: More cannot be packed than may be skipped, or there are none.
        """
        known = self._files.pictures.known
        with closing(encode_batches(self._batches(documents), self._encoder, known, workers=self._workers)) as encoded:
            for batch, results in encoded:
                self._write_batch(batch, results)
        if len(self._faults) > self._skip_bad:
            raise _refusal(self._in_order(), self._skip_bad)
        if self._files.documents == self._before:
            empty = self._empty - (0 if self._existing is None else self._existing.index.empty)
            raise DataError(f"no document has text ({empty} empty)", hint="pass other input")

    def _in_order(self) -> list[Fault]:
        return [fault for _, fault in sorted(self._faults.items())]

    def _batches(self, documents: Iterable[Document | PairDocument | Fault]) -> Iterator[list[Pieces]]:
        """Yield the documents in batches, until there are too many faults."""
        batch, characters, images = list[Pieces](), 0, 0
        for number, document in enumerate(documents):
            if isinstance(document, Fault):
                self._faults[number] = document
            elif (pieces := self._pieces(number, document)) is not None:
                batch.append(pieces)
                characters += sum(
                    len(part) for part in (*pieces.source, *(pieces.target or ())) if isinstance(part, str)
                )
                images += len(document.images)
            if len(self._faults) >= self._skip_bad + MAX_FAULTS:
                break
            if characters >= BATCH_CHARACTERS or images >= BATCH_IMAGES or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, characters, images = [], 0, 0
        if batch:
            yield batch

    def _pieces(self, number: int, document: Document | PairDocument) -> Pieces | None:
        if isinstance(document, Document) and not document.images and not document.text.strip():
            self._empty += 1
            return None
        try:
            if document.images and not self._tokens.pictures:
                raise ValueError("has images, but the model has no vision tower")
            if isinstance(document, PairDocument):
                return Pieces(number, document.where, document.source, document.target, document.images)
            parts: Sequence[Part] = [document.text]
            if document.images:
                parts = with_places(text_pieces(document.text, len(document.images)), self._tokens)
        except ValueError as error:
            self._faults[number] = Fault(document.where, str(error))
            return None
        self.plain_placeholders += not document.images and PLACEHOLDER in document.text
        return Pieces(number, document.where, parts, None, document.images)

    def _write_batch(self, batch: list[Pieces], results: list[Encoded | Fault | None]) -> None:
        packed = []
        for document, result in zip(batch, results, strict=True):
            if result is None:
                self._empty += 1
            elif isinstance(result, Fault):
                self._faults[document.number] = result
            else:
                packed.append(result.tokens)
                self._write(result)
        if packed:
            self._counts += np.bincount(np.concatenate(packed), minlength=len(self._counts)).astype(np.uint64)

    def _write(self, document: Encoded) -> None:
        files = self._files
        if not document.pair and not document.images:
            files.text.add(document.tokens)
            return
        stream, rows = (files.pair, files.pair_rows) if document.pair else (files.image, files.image_rows)
        files.pictures.add(document.images, rows)
        stream.add(document.tokens, places_of(rows), document.split)

    def finish(self) -> Index:
        """Close all files and return their index."""
        files = self._files
        pairs, places = files.pair.finish(), places_of(files.pair_rows)
        files.counts.write(self._counts.astype(END))
        present, special = np.flatnonzero(self._counts), self._encoder.text.special
        return Index(
            format=FORMAT,
            tokenizer_sha256=self._encoder.text.sha256,
            tokens=tokens_entry(self._tokens),
            bos=self._encoder.bos,
            text=files.text.finish(),
            image=files.image.finish(),
            pair=PairEntry(**dict(pairs), places=places, pictures=files.pair_rows.finish(flush=files.flush)),
            pictures=files.pictures.finish(files.image_rows),
            counts=files.counts.finish(flush=files.flush),
            highest=int(present[-1]),
            special={str(token): int(self._counts[token]) for token in present.tolist() if token in special},
            empty=self._empty,
            skipped=self._write_skipped(),
        )

    def _write_skipped(self) -> SkippedEntry | None:
        """Write the list of the skipped documents, if there are any: a line of JSON for each."""
        earlier = None if self._existing is None else self._existing.index.skipped
        if not self._faults and earlier is None:
            return None
        with HashedFile(self._files.folder / SKIPPED_FILE) as file:
            if self._existing is not None and earlier is not None:
                file.copy(self._existing.folder / SKIPPED_FILE, earlier.sha256)
            for fault in self._in_order():
                file.write(json.dumps({"where": fault.where, "reason": fault.reason}).encode() + b"\n")
            count = len(self._faults) + (0 if earlier is None else earlier.documents)
            return SkippedEntry(documents=count, sha256=file.finish(flush=self._files.flush))


def _refusal(faults: Sequence[Fault], skip_bad: int) -> DataError:
    if len(faults) == 1:
        return DataError(faults[0].reason, where=faults[0].where, hint="--skip-bad 1 packs the others")
    count = f"{len(faults)} documents" + " or more" * (len(faults) >= skip_bad + MAX_FAULTS)
    return DataError(
        f"{count} cannot be packed",
        where=faults[0].where,
        hint=f"mend them, or skip up to N with --skip-bad N{f' (now {skip_bad})' if skip_bad else ''}",
        details=[f"{it.where}: {it.reason}" for it in faults],
    )
