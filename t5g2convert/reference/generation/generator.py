"""Text from prompts: `generate` for one, streamed; `Generator` for many, in batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t5g2convert.checkpoint.families import t5gemma
from t5g2convert.checkpoint.families.text_and_vision import ImageTokens
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.command_options import takes_options
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.reference.generation.chat_template import ChatTemplate
from t5g2convert.reference.generation.decoding import read_decoding
from t5g2convert.reference.generation.engines import Engine, ReferenceEngine, TransformersEngine
from t5g2convert.reference.generation.infill import Masked, Masks
from t5g2convert.reference.generation.loop import Finish, Row, write_batch
from t5g2convert.reference.generation.sampling import Chooser
from t5g2convert.reference.generation.text_stream import TextStream
from t5g2convert.reference.options import GenerateOptions
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma import T5GemmaReference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import check_device, not_finite


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one text is generated from.

    Attributes:
        text: The encoder's text.
        decoder: The text that the decoder continues.
        image: A picture before the encoder's text.
    """

    text: str = ""
    decoder: str = ""
    image: Path | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated text.

    Attributes:
        text: The text, without the decoder's prompt and without the stop text; with `infill`, the prompt with its masks
            filled.
        tokens: The written tokens, without the end token.
        finish: Why it ended.
        spans: With `infill`, the text of each mask; None for a mask that was not filled.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    spans: tuple[str | None, ...] | None = None


@takes_options(GenerateOptions)
def generate(folder: Path, prompt: str | None = None, options: GenerateOptions = GenerateOptions()) -> Iterator[str]:  # noqa: B008 - frozen
    """Generate text from a prompt that the encoder reads; yield it piece by piece.

    ```python
    for piece in generate(Path("t5gemma-2-270m-270m"), "Rain is", max_new_tokens=16):
        print(piece, end="")
    ```

    Args:
        folder: A T5Gemma or T5Gemma 2 folder with a tokenizer.
        prompt: The encoder's text; None with `hide_encoder`.
        options: As keyword arguments; see `GenerateOptions`.

    Raises:
        CheckpointError: The folder is damaged, has no tokenizer, or its logits are not finite.
        UsageError: The prompt or an option does not fit the model, or float16 overflows.
    """
    if prompt is not None and options.hide_encoder:
        raise UsageError("--hide-encoder hides --prompt from the decoder", hint="pass the text with --decoder-prompt")
    if prompt is None and not options.hide_encoder:
        raise UsageError("a prompt is missing", hint="pass --prompt TEXT or --prompts FILE")
    chosen = Prompt(prompt or "", options.decoder_prompt, options.image)
    yield from Generator(folder, options).stream(chosen)


class Generator:
    """A model that generates.

    Args:
        folder: A T5Gemma or T5Gemma 2 folder with a tokenizer.
        options: The options of `generate`; `decoder_prompt` and `image` are part of each `Prompt`.

    Attributes:
        codec: The folder's tokenizer.
        decoding: The settings of the decoding.

    Raises:
        CheckpointError: The folder is damaged or has no tokenizer.
        UsageError: An option does not fit the model.
    """

    def __init__(self, folder: Path, options: GenerateOptions) -> None:
        check_device(options.dtype, options.device)
        self._folder, self._options = folder, options
        checkpoint = open_checkpoint(folder)
        self._dtype = getattr(torch, options.dtype or CONFIG_NAMES.get(checkpoint.dtype, "float32"))
        self._first_generation = checkpoint.config.get("model_type") == t5gemma.MODEL_TYPE
        reference = T5GemmaReference if self._first_generation else T5Gemma2Reference
        self._model: T5GemmaReference | T5Gemma2Reference = reference(
            checkpoint, dtype=self._dtype, device=options.device, resident=True, kernel="sdpa"
        )
        _check_options(options, first_generation=self._first_generation)
        start = self._model.model.decoder.bos_token_id
        if start is None:
            raise UsageError("the decoder's config has no bos_token_id to start from", hint=f"see {folder}/config.json")
        self._start = start
        self.codec = TextCodec(folder, self._model.encoder.settings.vocab_size)
        self.decoding = read_decoding(folder, options, eos=self._model.model.decoder.eos_token_id)
        self._template = ChatTemplate(folder) if options.chat else None
        self._masks = Masks(folder, self.codec, self._reserved) if options.infill else None
        self._engine: Engine | None = None

    def stream(self, prompt: Prompt) -> Iterator[str]:
        """Yield the text of a prompt, piece by piece, as soon as it is certain; with `infill`, in one piece."""
        row = self.row(prompt)
        if row.masked is not None:
            return iter([self.write([row])[0].text])
        return (piece for _, piece in self._written([row]))

    def texts(self, prompts: Iterable[Prompt]) -> Iterator[Generated]:
        """Yield the texts of prompts, in order; `batch` prompts run at once."""
        rows: list[Row] = []
        for number, prompt in enumerate(prompts):
            rows.append(self.row(prompt, number))
            if len(rows) == self._options.batch:
                yield from self.write(rows)
                rows = []
        if rows:
            yield from self.write(rows)

    def write(self, rows: Sequence[Row]) -> list[Generated]:
        """Return the texts of a batch."""
        texts = [""] * len(rows)
        for number, piece in self._written(rows):
            texts[number] += piece
        return [self._generated(text, row) for text, row in zip(texts, rows, strict=True)]

    def _generated(self, text: str, row: Row) -> Generated:
        assert row.finish is not None, "a batch is written to its end"
        spans = None
        if row.masked is not None:
            spans = row.masked.spans(row.tokens, self.codec, special=self._options.show_special)
            text = row.masked.filled(spans)
        return Generated(text, tuple(row.tokens), row.finish, spans)

    def row(self, prompt: Prompt, number: int = 0) -> Row:
        """Return the tokens of a prompt, ready to be continued.

        Args:
            prompt: The prompt.
            number: Its number among all prompts.

        Raises:
            CheckpointError: The chat template fails, or a token has no row in the embedding table.
            UsageError: The model has no vision tower, or the prompt is empty.
        """
        if self._options.hide_encoder and (prompt.text or prompt.image is not None):
            raise UsageError("--hide-encoder hides the prompt and --image", hint="pass the text with --decoder-prompt")
        masked = None
        if self._masks is not None:
            if prompt.decoder or prompt.image is not None:
                raise UsageError("--infill takes no --decoder-prompt and no --image")
            masked = self._masks.read(prompt.text)
        tokens, pixels = ([], None) if self._options.hide_encoder else self._encoded(prompt, masked)
        if self._template is not None and tokens[:1] != [self._start]:
            # As in training on conversations: bos comes first, also if the template does not write it.
            tokens = [self._start, *tokens]
        return Row(
            tokens,
            [self._start, *self.codec.encode(prompt.decoder, special=False)],
            Chooser(self.decoding, number),
            TextStream(self.codec, self.decoding.stops, special=self._options.show_special),
            pixels,
            ends=frozenset() if masked is None or self._masks is None else self._masks.after(masked),
            masked=masked,
        )

    @property
    def notes(self) -> Iterator[str]:
        """What a user should know about the model and its settings."""
        if not self._options.hide_encoder and _only_converted(self._folder):
            yield f"{self._folder} was converted but not trained: its decoder has not learned to use the encoder"
        if self.decoding.ignored:
            yield f"generation_config.json sets {', '.join(self.decoding.ignored)}, which t5g2 generate does not apply"

    def _encoded(self, prompt: Prompt, masked: Masked | None) -> tuple[list[int], Tensor | None]:
        if masked is not None:
            return masked.tokens(self.codec), None
        text, template = prompt.text, self._template
        if template is not None:
            text = template.render(text, image=prompt.image is not None)
        if prompt.image is not None:
            if not isinstance(self._model, T5Gemma2Reference) or self._model.vision is None:
                raise UsageError(f"cannot read {prompt.image}: {self._folder} has no vision tower")
            tokens = self._with_image(text, self._model.vision.tokens)
            pixels = picture(prompt.image, self._model.vision, self._folder, self._dtype).to(self._options.device)
            return tokens, pixels
        tokens = self.codec.encode(text, special=template is None)
        if not tokens:
            raise UsageError("the prompt is empty")
        return tokens, None

    def _with_image(self, text: str, tokens: ImageTokens) -> list[int]:
        """Return the ids of an image and the text; a chat template says where the image is."""
        before, chat = "", self._template is not None
        if chat:
            begin = self.codec.token_name(tokens.boi_token_index)
            if begin is None or begin not in text:
                raise UsageError("the chat template has no place for an image", hint="omit --chat or --image")
            before, _, text = text.partition(begin)
        if tokens.image_token_index in self.codec.encode(before + text):
            raise UsageError("the prompt already has image tokens; --image adds its own before the prompt")
        return self.codec.encode_with_image(
            text,
            boi=tokens.boi_token_index,
            eoi=tokens.eoi_token_index,
            image=tokens.image_token_index,
            count=tokens.mm_tokens_per_image,
            before=before,
            special=not chat,
        )

    @property
    def _reserved(self) -> frozenset[int]:
        """Ids of tokens that are not sentinels."""
        text, ends = self._model.model.decoder, self.decoding.ends
        named = {text.bos_token_id, text.pad_token_id} | self._model.reserved | ends
        if isinstance(self._model, T5Gemma2Reference):
            named.add(self._model.model.tokens.boi_token_index)
        return frozenset(token for token in named if token is not None)

    def _written(self, rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
        pieces = write_batch(self._loaded(), rows, self.decoding, self._options.device, self._refuse_not_finite)
        while True:
            # A generator must not leave inference mode on for its caller.
            with torch.inference_mode():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _loaded(self) -> Engine:
        if self._engine is None:
            if self._options.engine == "reference":
                self._engine = ReferenceEngine(self._model)
            else:
                name = f"{'T5Gemma' if self._first_generation else 'T5Gemma2'}ForConditionalGeneration"
                self._engine = TransformersEngine(self._folder, name, dtype=self._dtype, device=self._options.device)
        return self._engine

    def _refuse_not_finite(self, logits_BV: Tensor) -> None:
        # The most probable token of NaN would be the first.
        if not bool(torch.isfinite(logits_BV).all()):
            raise not_finite("the logits", self._model.weights)


def _check_options(options: GenerateOptions, *, first_generation: bool) -> None:
    """Refuse options that contradict each other or the model.

    Raises:
        UsageError: Two options contradict each other, or the model does not have what one needs.
    """
    if options.hide_encoder and first_generation:
        raise UsageError(
            "--hide-encoder works with T5Gemma 2: the decoder of T5Gemma has a separate attention to the encoder"
        )
    for name in ("chat", "infill"):
        if options.hide_encoder and getattr(options, name):
            raise UsageError(
                f"--{name} is for the encoder's text, but --hide-encoder hides it", hint="omit one of them"
            )
    if options.infill and (options.chat or options.stop):
        raise UsageError(f"--infill cannot be used with {'--chat' if options.chat else '--stop'}")


def _only_converted(folder: Path) -> bool:
    """Return whether a folder's manifest is a conversion's, and its weights still have their sizes."""
    if not is_there(folder / MANIFEST_FILE):
        return False
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False  # `t5g2 verify` reports it; for generation it decides nothing
    return manifest.mapping is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == record.bytes
        for name, record in manifest.files.items()
        if name.endswith(".safetensors")
    )
