"""Batches of documents as token ids and checked images, made in this process or, in the same order, in several."""

import os
import signal
import threading
from collections import deque
from collections.abc import Container, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.documents import Fault
from t5g2convert.adaptation.data.image_columns import ImageSource
from t5g2convert.adaptation.data.images import with_images
from t5g2convert.adaptation.data.packed_writer import CheckedImage, checked_image
from t5g2convert.adaptation.data.tokens import ModelTokens, TextEncoder
from t5g2convert.errors import MachineError

WAITING: Final = 2
"""Batches per process that are in work or wait to be written; they bound the memory."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A document to encode: the texts before, between and after its images."""

    number: int
    where: str
    texts: list[str]
    images: tuple[ImageSource, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document to write.

    Attributes:
        tokens: Token ids, with bos if documents start with it, and eos.
        split: Start of the text after the last image.
        images: Its images.
    """

    tokens: NDArray[np.uint32]
    split: int
    images: tuple[CheckedImage, ...]


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
        self._before = np.array([tokens.bos] if bos else [], dtype=np.uint32)
        self._behind = np.array([tokens.eos], dtype=np.uint32)

    def encode(self, batch: list[Pieces], known: Container[bytes] = frozenset()) -> list[Encoded | Fault | None]:
        """Return each document, why it cannot be packed, or None if its text has no token.

        Images with a sha256 in `known` were checked before.
        """
        encoded = iter(self.text.encode([text for document in batch for text in document.texts]))
        return [self._one(document, list(islice(encoded, len(document.texts))), known) for document in batch]

    def _one(
        self, document: Pieces, pieces: list[NDArray[np.uint32]], known: Container[bytes]
    ) -> Encoded | Fault | None:
        if reason := next(filter(None, map(self.text.fault, pieces)), None):
            return Fault(document.where, reason)
        if not document.images and not len(pieces[0]):
            return None
        try:
            images = tuple(checked_image(image, known) for image in document.images)
        except ValueError as error:
            return Fault(document.where, str(error))
        tokens = np.concatenate([self._before, with_images(pieces, self.tokens), self._behind])
        return Encoded(tokens, len(tokens) - len(pieces[-1]) - len(self._behind), images)


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
