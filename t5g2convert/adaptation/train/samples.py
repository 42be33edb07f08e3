"""The samples of a run: made from the corpora and the settings after all checks, and described in notes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np

from t5g2convert.adaptation.data.corpora import Corpora, Corpus
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.corruption import Frame, longest, needed_sentinels, spans
from t5g2convert.adaptation.ul2.dataset import UL2Dataset, frame_of
from t5g2convert.adaptation.ul2.mixture import Mixture
from t5g2convert.adaptation.ul2.sampler import DocumentSampler, Sampler
from t5g2convert.adaptation.ul2.sentinels import FirstSentinel, Sentinels, check_reserved
from t5g2convert.adaptation.ul2.texts import Chunks, Pieces
from t5g2convert.checkpoint.families.registry import read_trainable
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.checkpoint.tokenizer.files import Tokenizer
from t5g2convert.errors import DataError, UsageError

CHECKED_AT_ONCE: Final = 1 << 20
"""Sizes of documents compared at once."""

SHOWN: Final = 5
"""Documents listed in an error."""

READ_OFTEN: Final = 4
"""Up to so many epochs, repeated text is worth nearly as much as new text (arXiv 2305.16264)."""

MEASURED: Final = 4096
"""About how many samples of single documents are measured for their mean."""


def make_samples(corpora: Corpora, settings: Settings, tokens: ModelTokens, model: Checkpoint) -> UL2Dataset:
    """Return the samples of packed data, after checking its size and that it leaves the sentinels unused.

    Their settings name the first sentinel that was found in the tokenizer.

    Raises:
        DataError: There is too little data, there are no documents with images for image steps, a sentinel occurs, or
            the model was trained with other sentinels.
        UsageError: A task does not fit the lengths.
    """
    _check_kinds(corpora)
    first = find_first_sentinel(settings, tokens, model)
    settings = settings.model_copy(
        update={"mixture": settings.mixture.model_copy(update={"first_sentinel": first.recorded})}
    )
    mixture, frame, special = settings.mixture, frame_of(settings, tokens), _special(tokens)
    if settings.encoder_bos and tokens.bos is None:
        raise UsageError("the model has no bos", hint="pass --no-encoder-bos")
    raw = raw_lengths(settings, frame)
    sentinels = Sentinels.of(
        vocabulary=tokens.vocabulary,
        reserved=tokens.reserved | mixture.mode_tokens,
        needed=needed_sentinels(mixture, raw),
        first=first.id,
    )
    for corpus in corpora:
        check_reserved(
            sentinels,
            special=special,
            mode_tokens=mixture.mode_tokens,
            highest=corpus.packed.highest,
            occurrences={token: int(count) for token, count in enumerate(corpus.packed.counts) if count},
            absent=special.keys() & {"pad"},
        )
    # A run of image steps only needs no text.
    sampler = None if settings.image_every == 1 else make_sampler(corpora, settings, raw)
    documents = None if settings.image_every is None else _documents(corpora, settings, tokens)
    shapes = read_trainable(model.config, model.path / "config.json")
    return UL2Dataset(corpora, settings, tokens, sentinels, sampler, documents, model.path, shapes)


def _check_kinds(corpora: Corpora) -> None:
    if (pairs := corpora.pairs) and not any(corpus.packed.tokens or len(corpus.packed.images) for corpus in corpora):
        where = corpora[0].packed.folder if len(corpora) == 1 else "DATA"
        raise DataError(f"has no text: it has {pairs:,} pairs, which t5g2 finetune trains on", where=where)


def find_first_sentinel(settings: Settings, tokens: ModelTokens, model: Checkpoint) -> FirstSentinel:
    """Return the first sentinel of a mixture for a model.

    Raises:
        DataError: The tokenizer does not have it, or the model was trained with another one.
    """
    tokenizer = Tokenizer(model).json
    names = {} if tokenizer is None else tokenizer.vocabulary()
    reserved = tokens.reserved | settings.mixture.mode_tokens
    first = FirstSentinel.find(settings.mixture.first_sentinel, names, vocabulary=tokens.vocabulary, reserved=reserved)
    record = read_manifest(model.path).adaptation if is_there(model.path / MANIFEST_FILE) else None
    trained = None if record is None else record.ul2
    if trained is not None and any(task.sentinel for task in trained.mixture.tasks):
        before = trained.mixture.first_sentinel
        # Version 0.1.0 recorded no name: it began with the highest id.
        if before is None:
            before = Sentinels.available(vocabulary=tokens.vocabulary, reserved=tokens.reserved).first
        if (names.get(before) if isinstance(before, str) else before) != first.id:
            raise DataError(
                f"was trained with sentinels from {before} downwards, but this mixture's first is {first.recorded}",
                where=model.path,
                hint=f"add `first_sentinel: {json.dumps(before)}` to a mixture",
            )
    return first


def _special(tokens: ModelTokens) -> dict[str, int]:
    named = {name: getattr(tokens, name) for name in ("bos", "eos", "pad", "boi", "eoi", "image")}
    return {name: token for name, token in named.items() if token is not None and 0 <= token < tokens.vocabulary}


def raw_lengths(settings: Settings, frame: Frame) -> tuple[int, ...]:
    """Return the most raw tokens of a sample, by task.

    A document's pieces are cut before their tasks are known, so each must fit all tasks.

    Raises:
        UsageError: A task does not fit the lengths.
    """
    most = tuple(
        longest(task, frame, encoder=settings.encoder_length, decoder=settings.decoder_length)
        for task in settings.mixture.tasks
    )
    return most if settings.documents == "packed" else (min(most),) * len(most)


def make_sampler(corpora: Corpora, settings: Settings, raw: tuple[int, ...]) -> Sampler:
    """Return the order of text samples.

    Args:
        corpora: The data.
        settings: The run's settings.
        raw: From `raw_lengths`.

    Raises:
        DataError: A corpus has too little text.
        UsageError: A task cannot make spans of texts of some lengths, so documents cannot be single.
    """
    mixture, seed = settings.mixture, settings.seed
    shortest = 0 if settings.documents == "packed" else shortest_text(mixture, raw[0])

    def texts(number: int, corpus: Corpus) -> Chunks | Pieces:
        try:
            if settings.documents == "packed":
                return Chunks(mixture, raw, corpus.packed.tokens, seed, corpus=number)
            return Pieces(corpus.ends, raw[0], shortest, seed, corpus=number)
        except DataError as error:
            error.where = str(corpus.packed.folder)
            raise

    # Corpora without text only have documents with images; without any text, the first corpus is refused.
    chosen = [number for number, corpus in enumerate(corpora) if corpus.packed.tokens] or [0]
    weights = [corpora.shares[number] for number in chosen]
    return Sampler(mixture, raw, [texts(number, corpora[number]) for number in chosen], weights=weights, seed=seed)


def shortest_text(mixture: Mixture, most: int) -> int:
    """Return the fewest tokens from which on every task can make spans, up to `most`; 2 for usual mixtures.

    Raises:
        UsageError: They are more than half of `most`, so that pieces of long documents would be too short.
    """
    for length in range(most, 1, -1):
        for task in mixture.tasks:
            try:
                spans(length, task)
            except DataError:
                if 2 * (length + 1) <= most + 1:
                    return length + 1
                raise UsageError(
                    f"task {task.name!r} cannot make spans of {length} tokens, so documents cannot be cut into pieces "
                    f"of at most {most}",
                    hint="give the task a longer mean_span or a lower rate, or use --documents packed",
                ) from None
    return 2


def _documents(corpora: Corpora, settings: Settings, tokens: ModelTokens) -> DocumentSampler:
    if not tokens.pictures:
        raise UsageError("--image-every needs a model with a vision tower")
    counts = [len(corpus.packed.images) for corpus in corpora]
    if not any(counts):
        where = corpora[0].packed.folder if len(corpora) == 1 else None
        raise DataError("has no documents with images", where=where or "DATA", hint="omit --image-every")
    return DocumentSampler(counts, corpora.shares, seed=settings.seed)


@dataclass(frozen=True, slots=True)
class Means:
    """Mean encoder tokens and labels of a kind of sample."""

    encoder: Fraction
    labels: Fraction


@dataclass(frozen=True, slots=True)
class Sizes:
    """The mean sizes of text samples and of documents with images; None if no step reads them."""

    text: Means | None
    images: Means | None

    def per_step(self, settings: Settings) -> dict[str, int | None]:
        """Return the settings that these sizes decide: how many samples of the mean size a batch has room for."""
        single = self.text if settings.documents == "single" else None
        return {
            name: None if means is None else max(1, settings.batch_tokens // means.encoder)
            for name, means in (("text_samples", single), ("image_samples", self.images))
        }


def measure(samples: UL2Dataset) -> Sizes:
    """Measure the samples, and refuse documents with images that are too long: they are never cut.

    The means of documents with images are over all that are drawn. Those of text are exact across documents, and of
    single documents over the first samples.

    Raises:
        DataError: Documents are too long.
    """
    return Sizes(_text_means(samples), _image_means(samples))


def _text_means(samples: UL2Dataset) -> Means | None:
    if samples.sampler is None:
        return None
    block = samples.settings.mixture.block
    count = block if samples.settings.documents == "packed" else -(-MEASURED // block) * block
    sizes = [samples.text_size(samples.sampler.task(i), samples.sampler.length(i)) for i in range(count)]
    return Means(
        Fraction(sum(size.encoder for size in sizes), count), Fraction(sum(size.labels for size in sizes), count)
    )


def _image_means(samples: UL2Dataset) -> Means | None:
    if samples.documents is None:
        return None
    encoder = labels = Fraction(0)
    for number, share in samples.documents.shares.items():
        means = _means_of_documents(samples, number)
        encoder, labels = encoder + share * means.encoder, labels + share * means.labels
    return Means(encoder, labels)


def _means_of_documents(samples: UL2Dataset, corpus: int) -> Means:
    """Return the means of a corpus, from the table of its documents alone."""
    settings, packed = samples.settings, samples.corpora[corpus].packed
    documents = len(packed.images)
    totals, wrong, shown = np.zeros(2, np.int64), 0, list[str]()
    for start in range(0, documents, CHECKED_AT_ONCE):
        sizes = samples.image_sizes(corpus, start, min(start + CHECKED_AT_ONCE, documents))[:, :2]
        totals += sizes.sum(axis=0)
        over = np.flatnonzero((sizes > (settings.encoder_length, settings.decoder_length)).any(axis=1))
        wrong += len(over)
        for number in over[: SHOWN - len(shown)].tolist():
            encoder, labels = sizes[number].tolist()
            shown.append(f"document {start + number}: {encoder} encoder tokens and {labels} labels")
    if wrong:
        raise DataError(
            f"{wrong} document(s) with images are longer than {settings.encoder_length} encoder tokens or "
            f"{settings.decoder_length} labels, first {shown[0]}",
            where=packed.folder,
            details=shown,
        )
    return Means(*(Fraction(total, documents) for total in totals.tolist()))


def notes_of(samples: UL2Dataset, sizes: Sizes) -> Iterator[str]:
    """Yield notes on what the steps of a run read.

    Args:
        samples: The samples, with the run's settings.
        sizes: From `measure`.
    """
    settings, sampler = samples.settings, samples.sampler
    if pairs := samples.corpora.pairs:
        yield f"{pairs:,} pairs are not read: t5g2 finetune trains on them"
    if sampler is not None and sizes.text is not None:
        yield from _notes_of_steps(settings, sampler, sizes.text)
        yield from _notes_of_corpora(samples.corpora, settings, sampler)
    if sizes.images is None or settings.image_samples is None:
        return
    tokens, labels = (settings.image_samples * mean for mean in (sizes.images.encoder, sizes.images.labels))
    note = f"an image step has {settings.image_samples:,} documents, on average {_step_text(tokens, labels)}"
    text_steps = text_steps_of(settings)
    image_steps = settings.steps - text_steps
    if sizes.text is not None and image_steps:
        by_text = (text_steps * settings.samples * mean for mean in (sizes.text.encoder, sizes.text.labels))
        read, written = (
            float(image_steps * images / (image_steps * images + text))
            for images, text in zip((tokens, labels), by_text, strict=True)
        )
        note += (
            f"; image steps have {read:.1%} of all encoder tokens and {written:.1%} of all labels, at the same "
            "learning rate"
        )
    yield note


def _notes_of_steps(settings: Settings, sampler: Sampler, means: Means) -> Iterator[str]:
    if settings.documents == "packed":
        if settings.batch_tokens % settings.encoder_length:
            used = settings.samples * settings.encoder_length
            yield f"a step has {settings.samples} samples, {used:,} encoder tokens of the {settings.batch_tokens:,}"
        return
    step = _step_text(settings.samples * means.encoder, settings.samples * means.labels)
    yield (
        f"a text step has {settings.samples:,} documents or pieces of at most {max(sampler.raw_lengths):,} tokens; "
        f"on average {step}"
    )
    skipped = sum(texts.skipped for texts in sampler.texts if isinstance(texts, Pieces))
    if skipped:
        yield f"{skipped:,} document(s) are shorter than the tasks need, and are not read"


def _step_text(encoder: Fraction, labels: Fraction) -> str:
    return f"{float(encoder):,.0f} encoder tokens and {float(labels):,.0f} labels"


def _notes_of_corpora(corpora: Corpora, settings: Settings, sampler: Sampler) -> Iterator[str]:
    epochs_of = sampler.epochs(text_steps_of(settings) * settings.samples)
    for texts, share, epochs in zip(sampler.texts, sampler.shares, epochs_of, strict=True):
        corpus = corpora[texts.corpus]
        often = f"; more than {READ_OFTEN} add little (arXiv 2305.16264)" if epochs > READ_OFTEN else ""
        if len(corpora) > 1:
            yield (
                f"{corpus.name}: {corpus.packed.tokens:,} text tokens, {float(share):.1%} of the text that is read; "
                f"read {float(epochs):.3g} times{often}"
            )
        elif often:
            yield f"the text is read {float(epochs):.3g} times{often}"


def text_steps_of(settings: Settings) -> int:
    """Return the number of text steps of a run."""
    return settings.steps - (0 if settings.image_every is None else settings.steps // settings.image_every)
