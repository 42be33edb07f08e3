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

from t5g2convert.adaptation.data.image_columns import ImageSource
from t5g2convert.adaptation.data.packed_writer import CheckedImage, checked_image
from t5g2convert.adaptation.data.pair_documents import Part
from t5g2convert.adaptation.data.rows import Fault
from t5g2convert.adaptation.data.tokens import ModelTokens, TextEncoder, read_positions
from t5g2convert.adaptation.pack_options import PackOptions
from t5g2convert.errors import MachineError, UsageError

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
        cut: Whether its input was cut.
    """

    tokens: NDArray[np.uint32]
    split: int
    images: tuple[CheckedImage, ...]
    pair: bool
    cut: bool = False


class TooLong(Fault):
    """A pair that is too long."""


@dataclass(frozen=True, slots=True)
class PairLimits:
    """The limits of pairs.

    Attributes:
        source: Most tokens of an input; the first ones after bos are left out if `cut`.
        target: Most tokens of a target.
        cut: Whether inputs are cut.
    """

    source: int
    target: int
    cut: bool = False


def pair_limits(model: Path, options: PackOptions) -> PairLimits:
    """Return the limits that the options give to pairs, at most what the model reads.

    Raises:
        UsageError: A limit is more than the model reads.
    """
    encoder, decoder = read_positions(model)
    for name, limit, most in (("input", options.max_input, encoder), ("target", options.max_target, decoder)):
        if limit is not None and limit > most:
            raise UsageError(f"--max-{name} is {limit}, but the model reads at most {most} tokens")
    return PairLimits(options.max_input or encoder, options.max_target or decoder, cut=options.truncate == "input")


class DocumentEncoder:
    """Encodes batches of documents.

    Args:
        model: The folder of the model.
        tokens: Its token ids.
        bos: Start each document with bos.
        limits: The limits of pairs.
    """

    def __init__(self, model: Path, tokens: ModelTokens, *, bos: bool, limits: PairLimits) -> None:
        self.model, self.tokens, self.bos, self.limits = model, tokens, bos, limits
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
        limits = self.limits
        if len(behind) > limits.target:
            return TooLong(where, f"its target has {len(behind)} tokens, more than {limits.target}")
        if len(before) <= limits.source:
            return Encoded(np.concatenate([before, behind]), len(before), images, pair=True)
        if not limits.cut:
            return TooLong(where, f"its input has {len(before)} tokens, more than {limits.source}")
        before = self._cut(before)
        if len(before) == (bos is not None):
            return TooLong(where, f"its input ends with an image of more than {limits.source} tokens")
        kept = int(np.count_nonzero(before == self.tokens.eoi))
        return Encoded(np.concatenate([before, behind]), len(before), images[len(images) - kept :], pair=True, cut=True)

    def _cut(self, source: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return the end of an input, after its bos; an image that would lose tokens is left out."""
        first = int(self.tokens.bos is not None)
        start = len(source) - (self.limits.source - first)
        begun, ended = (int(np.count_nonzero(source[:start] == token)) for token in (self.tokens.boi, self.tokens.eoi))
        if begun > ended:
            start += int(np.argmax(source[start:] == self.tokens.eoi)) + 1
        return np.concatenate([source[:first], source[start:]])

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
    given = (encoder.model, encoder.tokens, encoder.bos, encoder.limits)
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


def _start(model: Path, tokens: ModelTokens, bos: bool, limits: PairLimits) -> None:
    """Prepare a worker process; it ends with its parent, which alone reacts to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _workers_encoder[:] = [DocumentEncoder(model, tokens, bos=bos, limits=limits)]


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this is a worker process"
    parent.join()
    os._exit(1)


def _encode(batch: list[Pieces]) -> list[Encoded | Fault | None]:
    return _workers_encoder[0].encode(batch)
