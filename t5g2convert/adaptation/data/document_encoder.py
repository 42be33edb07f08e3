"""Batches of documents as token ids and checked images, made in this process or, in the same order, in several."""

import os
import signal
import threading
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.documents import Fault
from t5g2convert.adaptation.data.image_columns import ImageSource
from t5g2convert.adaptation.data.packed_writer import CheckedImage, checked_image
from t5g2convert.adaptation.data.pair_documents import Part
from t5g2convert.adaptation.data.tokens import ModelTokens, TextEncoder
from t5g2convert.errors import MachineError

WAITING: Final = 2
"""Batches per process that are in work or wait to be written; they bound the memory."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A document to encode.

    Attributes:
        number: Its number, for the order of faults.
        where: The file with the line or row, for errors.
        source: Its text, or the input of a pair.
        target: The target of a pair; None for a document.
        images: Its images.
    """

    number: int
    where: str
    source: Sequence[Part]
    target: Sequence[Part] | None
    images: tuple[ImageSource, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document to write.

    Attributes:
        tokens: Token ids, complete.
        split: Start of the text after the last image, or of the target of a pair.
        images: Its images.
        pair: Whether it is a pair.
    """

    tokens: NDArray[np.uint32]
    split: int
    images: tuple[CheckedImage, ...]
    pair: bool


class DocumentEncoder:
    """Encodes batches of documents.

    Args:
        model: The folder of the model.
        tokens: Its token ids.
        bos: Start each document with bos.
    """

    def __init__(self, model: Path, tokens: ModelTokens, *, bos: bool) -> None:
        self.model, self.tokens, self.bos = model, tokens, bos
        self.text = TextEncoder(model, tokens)
        self._picture = np.array([tokens.boi, *[tokens.image] * tokens.per_image, tokens.eoi], dtype=np.uint32)

    def encode(self, batch: list[Pieces], known: Container[bytes] = frozenset()) -> list[Encoded | Fault | None]:
        """Return each document, why it cannot be packed, or None if its text has no token.

        Images with a sha256 in `known` were checked before.
        """
        texts = [part for document in batch for part in _parts(document) if isinstance(part, str)]
        encoded = iter(self.text.encode(texts))
        return [self._one(document, encoded, known) for document in batch]

    def _one(
        self, document: Pieces, encoded: Iterator[NDArray[np.uint32]], known: Container[bytes]
    ) -> Encoded | Fault | None:
        pieces = [next(encoded) if isinstance(part, str) else self._token(part) for part in _parts(document)]
        texts = (piece for part, piece in zip(_parts(document), pieces, strict=True) if isinstance(part, str))
        if reason := next(filter(None, map(self.text.fault, texts)), None):
            return Fault(document.where, reason)
        try:
            images = tuple(checked_image(image, known) for image in document.images)
        except ValueError as error:
            return Fault(document.where, str(error))
        if document.target is None:
            return self._document(pieces, images)
        return self._pair(document.where, pieces[: len(document.source)], pieces[len(document.source) :], images)

    def _document(self, pieces: list[NDArray[np.uint32]], images: tuple[CheckedImage, ...]) -> Encoded | None:
        if not images and not any(map(len, pieces)):
            return None
        tokens = _joined(self.tokens.bos if self.bos else None, pieces, self.tokens.eos)
        return Encoded(tokens, len(tokens) - len(pieces[-1]) - 1, images, pair=False)

    def _pair(
        self,
        where: str,
        source: list[NDArray[np.uint32]],
        target: list[NDArray[np.uint32]],
        images: tuple[CheckedImage, ...],
    ) -> Encoded | Fault:
        bos, eos = self.tokens.bos, self.tokens.eos
        before, behind = _joined(None, source, None), _joined(None, target, None)
        for name, tokens in (("input", before), ("target", behind)):
            if not len(tokens):
                return Fault(where, f"the {name} has no token")
        if bos is not None and before[0] != bos:
            before = np.insert(before, 0, bos)
        if behind[-1] != eos:
            behind = np.append(behind, np.uint32(eos))
        return Encoded(np.concatenate([before, behind]), len(before), images, pair=True)

    def _token(self, token: int) -> NDArray[np.uint32]:
        return self._picture if token == self.tokens.boi else np.array([token], dtype=np.uint32)


def _parts(document: Pieces) -> list[Part]:
    return [*document.source, *(document.target or ())]


def _joined(before: int | None, pieces: Sequence[NDArray[np.uint32]], behind: int | None) -> NDArray[np.uint32]:
    first, last = (np.array([] if token is None else [token], dtype=np.uint32) for token in (before, behind))
    return np.concatenate([first, *pieces, last])


Result = tuple[list[Pieces], list[Encoded | Fault | None]]


def encode_batches(
    batches: Iterable[list[Pieces]], encoder: DocumentEncoder, known: Container[bytes], *, workers: int
) -> Generator[Result, None, None]:
    """Yield each batch and its documents, in order; the results do not depend on the number of workers.

    Raises:
        MachineError: A worker process died.
    """
    if not workers:
        for batch in batches:
            yield batch, encoder.encode(batch, known)
        return
    waiting: deque[tuple[list[Pieces], Future[list[Encoded | Fault | None]]]] = deque()
    given = (encoder.model, encoder.tokens, encoder.bos)
    # A forked copy of this process would have locks of the tokenizer's threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=given)
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) > WAITING * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise MachineError(
            "a worker process of pack died; it may have run out of memory", hint="pack again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_workers_encoder: list[DocumentEncoder] = []


def _start(model: Path, tokens: ModelTokens, bos: bool) -> None:
    """Prepare a worker process; it ends with its parent, which alone reacts to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _workers_encoder[:] = [DocumentEncoder(model, tokens, bos=bos)]


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this is a worker process"
    parent.join()
    os._exit(1)


def _encode(batch: list[Pieces]) -> list[Encoded | Fault | None]:
    return _workers_encoder[0].encode(batch)
