"""What is asked of a run, and all that can be checked before any process is started and any weight is read."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from t5g2convert.adaptation.data.packed import ImageDocument, Packed, check_tokenizer
from t5g2convert.adaptation.data.tokens import ModelTokens, read_tokens
from t5g2convert.adaptation.train.model_limits import ModelFacts, check_dropout, check_rope, read_facts
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.corruption import longest, needed_sentinels
from t5g2convert.adaptation.ul2.dataset import Samples, frame_of
from t5g2convert.adaptation.ul2.sampler import Schedule
from t5g2convert.adaptation.ul2.sentinels import Sentinels, check_reserved
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.errors import DataError, UsageError

SHOWN: Final = 5
"""Documents that an error names."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that can be started."""

    checkpoint: Checkpoint
    facts: ModelFacts
    tokens: ModelTokens
    samples: Samples
    notes: tuple[str, ...]

    @property
    def images(self) -> bool:
        """Whether there are image steps."""
        return self.samples.settings.image_every is not None


def prepare(model: Path, data: Path, settings: Settings, *, rope_scaling: str | None = None) -> Prepared:
    """Open model and data, and see whether they, the settings and each other fit.

    Args:
        model: A converted model.
        data: A folder that `t5g2 pack` wrote.
        settings: The run's.
        rope_scaling: `linear:F`, what the config must say; None for whatever it says.

    Raises:
        CheckpointError: The model is damaged, or of another kind.
        DataError: The data is missing, damaged, of another tokenizer, or does not fit the objective.
        UsageError: The settings do not fit the model or each other.
    """
    checkpoint = open_checkpoint(model)
    tokens = read_tokens(model)
    facts = read_facts(checkpoint.config, model / "config.json")
    check_rope(facts, rope_scaling)
    check_lengths(settings, facts)
    check_freezing(settings, checkpoint.tensors)
    check_dropout(checkpoint.config, model / "config.json")
    packed = Packed.open(data)
    check_tokenizer(packed, model)
    samples = make_samples(packed, settings, tokens, model)
    check_images(samples)
    factor = "factors that differ" if facts.rope_factor is None else f"linear factor {facts.rope_factor:g}"
    notes = [] if facts.rope_factor == 1 else [f"RoPE in full layers: {factor}, from config.json"]
    if settings.batch_tokens % settings.encoder_length:
        used = settings.samples * settings.encoder_length
        notes.append(f"a step has {settings.samples} samples, {used:,} encoder tokens of the {settings.batch_tokens:,}")
    return Prepared(checkpoint, facts, tokens, samples, tuple(notes))


def check_lengths(settings: Settings, facts: ModelFacts) -> None:
    """Refuse lengths that the model does not read, and a batch that holds no sample.

    Raises:
        UsageError: They do not fit.
    """
    for name, length, limit in (
        ("encoder", settings.encoder_length, facts.encoder_positions),
        ("decoder", settings.decoder_length, facts.decoder_positions),
    ):
        if length > limit:
            raise UsageError(
                f"--{name}-length {length} is more than the {limit} positions of the {name}",
                hint="config.json's max_position_embeddings says how far it reads",
            )
    if not settings.samples:
        raise UsageError(
            f"--batch-tokens {settings.batch_tokens} holds no sample of {settings.encoder_length} encoder tokens"
        )


def check_freezing(settings: Settings, names: Collection[str]) -> None:
    """Refuse a freeze that freezes nothing, or that never ends, and patterns that name no tensor.

    Args:
        settings: The run's.
        names: Of the model's tensors.

    Raises:
        UsageError: It does, or one does.
    """
    if bool(settings.freeze_until) != bool(settings.trainable):
        raise UsageError(
            "--freeze-until and --trainable belong together: until which step, and what is trained till then"
        )
    if settings.freeze_until >= settings.steps:
        raise UsageError(
            f"--freeze-until {settings.freeze_until} is not before the end, --steps {settings.steps}: "
            "the rest would never be trained"
        )
    for pattern in settings.trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"--trainable {pattern} names none of the model's {len(names)} tensors",
                hint="names are those in MODEL's safetensors, as model.encoder.layers.0.mlp.up_proj.weight",
            )


def make_samples(packed: Packed, settings: Settings, tokens: ModelTokens, model: Path) -> Samples:
    """The samples of packed data, if there is enough of it and it leaves the sentinels alone.

    Raises:
        DataError: It does not.
        UsageError: A task does not fit the lengths.
    """
    mixture, frame, special = settings.mixture, frame_of(settings, tokens), _special(tokens)
    if settings.encoder_bos and tokens.bos is None:
        raise UsageError("the model has no bos", hint="--no-encoder-bos leaves it out")
    raw = tuple(
        longest(task, frame, encoder=settings.encoder_length, decoder=settings.decoder_length) for task in mixture.tasks
    )
    sentinels = Sentinels.of(
        vocabulary=tokens.vocabulary,
        reserved=tokens.reserved | mixture.mode_tokens,
        needed=needed_sentinels(mixture, raw),
    )
    check_reserved(
        sentinels,
        special=special,
        mode_tokens=mixture.mode_tokens,
        highest=packed.highest,
        occurrences={token: int(count) for token, count in enumerate(packed.counts) if count},
        absent=special.keys() & {"pad"},
    )
    # Data of images alone has no text to be cut into samples, and needs none.
    schedule = None if settings.image_every == 1 else Schedule(mixture, raw, packed.tokens, settings.seed)
    return Samples(packed, settings, tokens, sentinels, schedule, model)


def _special(tokens: ModelTokens) -> dict[str, int]:
    named = {name: getattr(tokens, name) for name in ("bos", "eos", "pad", "boi", "eoi", "image")}
    return {name: token for name, token in named.items() if token is not None and 0 <= token < tokens.vocabulary}


def check_images(samples: Samples) -> None:
    """Refuse image steps without images, and documents that are too long: none is cut.

    Raises:
        DataError: There are no documents with images, or some do not fit the lengths.
        UsageError: The model has no vision tower.
    """
    settings, documents = samples.settings, samples.packed.images
    if settings.image_every is None:
        return
    if not samples.tokens.pictures:
        raise UsageError("--image-every was given, but the model has no vision tower")
    if not len(documents):
        raise DataError("has no documents with images", where=samples.packed.folder, hint="leave out --image-every")
    wrong = []
    for number, document in enumerate(documents):
        encoder, labels = image_lengths(document, samples)
        if encoder > settings.encoder_length or labels > settings.decoder_length:
            wrong.append(f"document {number}: {encoder} encoder tokens and {labels} labels")
    if wrong:
        raise DataError(
            f"{len(wrong)} document(s) with images are longer than {settings.encoder_length} encoder tokens or "
            f"{settings.decoder_length} labels, first {wrong[0]}",
            where=samples.packed.folder,
            details=wrong[:SHOWN],
        )


def image_lengths(document: ImageDocument, samples: Samples) -> tuple[int, int]:
    """Encoder tokens and labels of a document with images."""
    example = samples.image(document)
    return len(example.encoder), len(example.labels)
