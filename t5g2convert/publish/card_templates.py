"""The kinds of folders that have a card: what each is and is not, what loads it, and what is still to be done."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from t5g2convert.checkpoint.families.config_section import describe_model_type
from t5g2convert.errors import CheckpointError
from t5g2convert.publish.markdown import fenced

T5GEMMA2_PAPER: Final = "[arXiv 2512.14856](https://arxiv.org/abs/2512.14856)"
T5GEMMA_PAPER: Final = "[arXiv 2504.06225](https://arxiv.org/abs/2504.06225)"

TEXT: Final = "text-generation"
"""The Hub's task for encoder-decoders that read no images too: text2text-generation is no longer on its list."""

IMAGES: Final = "image-text-to-text"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a card says of a kind of folder.

    Attributes:
        title: What it is called.
        pipeline: The Hub's task.
        tags: The Hub's tags, beside the tool's name.
        loader: The class of transformers that loads it.
        what: What it is and is not, in Markdown.
        adapt: What is to be done with it, in Markdown.
        part: What it was taken out of an encoder-decoder as; None if it was converted.
        images: Whether it reads images.
    """

    title: str
    pipeline: str
    tags: tuple[str, ...]
    loader: Literal[
        "AutoModelForSeq2SeqLM",
        "AutoModelForCausalLM",
        "AutoModel",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    ]
    what: str
    adapt: str
    part: Literal["encoder", "decoder"] | None = None
    images: bool = False


def kind_elsewhere(config: Mapping[str, Any], where: Path) -> Kind:
    """The kind of a folder that was trained elsewhere.

    Raises:
        CheckpointError: It is not T5Gemma 2, nor its encoder.
    """
    match config.get("model_type"):
        case "t5gemma2":
            return _elsewhere(config, images=_looks(config.get("encoder")))
        case "t5gemma2_encoder":
            kind = _encoder(images=_looks(config))
            return replace(
                kind,
                title="The encoder of a T5Gemma 2, trained elsewhere",
                what=(
                    "The encoder of a T5Gemma 2, taken out and then **trained outside the tool that wrote this card**. "
                    "What it was trained on and what it can do is not known here."
                ),
            )
    raise CheckpointError(f"{describe_model_type(config)} has no card of this tool", where=where)


def kind_of(config: Mapping[str, Any], where: Path, *, adapted: bool = False) -> Kind:
    """The kind of a folder by its config.json, and by whether it was trained further.

    Raises:
        CheckpointError: It is none that this tool writes.
    """
    match config.get("model_type"):
        case "t5gemma2":
            make = _adapted if adapted else _t5gemma2
            return make(images=_looks(config.get("encoder")))
        case "t5gemma":
            return _T5GEMMA
        case "t5gemma2_encoder":
            return _encoder(images=_looks(config))
        case "gemma3":
            return _gemma3(images=True)
        case "gemma3_text":
            return _gemma3(images=False)
    raise CheckpointError(f"{describe_model_type(config)} has no card of this tool", where=where)


def _looks(section: object) -> bool:
    """Whether a vision tower has layers: a model without images has one of none."""
    vision = section.get("vision_config") if isinstance(section, dict) else None
    depth = vision.get("num_hidden_layers") if isinstance(vision, dict) else None
    return isinstance(depth, int) and depth > 0


def _t5gemma2(*, images: bool) -> Kind:
    seen = (
        " It reads images with the encoder." if images else " It reads text alone: its vision tower is an empty stub."
    )
    return Kind(
        title="T5Gemma 2 made of Gemma 3",
        pipeline=IMAGES if images else TEXT,
        tags=("t5gemma2", "encoder-decoder"),
        loader="AutoModelForSeq2SeqLM",
        what=(
            "A Gemma 3 in the form of a T5Gemma 2 encoder-decoder: a layer of the parent starts one of the encoder and "
            "one of the decoder, whose merged attention reads both its own states and the encoder's output. "
            "**It is converted and not further trained.** With the encoder's output hidden by its mask the decoder "
            "computes what its parent computes. The encoder-decoder as a whole has not learnt to use its encoder: it "
            f"needs adaptation before it is useful, and until then do not expect sense from it.{seen}"
        ),
        adapt=(
            f"T5Gemma 2 ({T5GEMMA2_PAPER}) was adapted with UL2: half of the examples are a text whose first part the "
            "encoder reads and whose rest the decoder writes, in the other half spans of the text are masked for the "
            "encoder and written by the decoder; the vision tower stays frozen. transformers trains this class as it "
            "is; the encoder's `attention_mask` must be given, as a tokenizer does."
        ),
        images=images,
    )


def _adapted(*, images: bool) -> Kind:
    seen = " It reads images with the encoder." if images else " It reads text alone."
    return Kind(
        title="T5Gemma 2, trained further",
        pipeline=IMAGES if images else TEXT,
        tags=("t5gemma2", "encoder-decoder", "ul2"),
        loader="AutoModelForSeq2SeqLM",
        what=(
            "A T5Gemma 2 encoder-decoder that was made of a Gemma 3 and **trained further**, so that its decoder "
            f"learns to use its encoder, as the paper of T5Gemma 2 ({T5GEMMA2_PAPER}) has it. How far that went is "
            "told by the tokens below, beside the paper's two trillion; what the model can do was not measured by the "
            f"tool that wrote this card.{seen}"
        ),
        adapt=(
            "It was adapted already, and can be adapted further by the same command, or trained for a task. "
            "transformers trains this class as it is; the encoder's `attention_mask` must be given, as a tokenizer "
            "does."
        ),
        images=images,
    )


_CLASSIFIERS: Final[Mapping[str, tuple[str, Any]]] = {
    "T5Gemma2ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "T5Gemma2ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
}
"""The Hub's task and the loader of a class with a head of its own."""


def _elsewhere(config: Mapping[str, Any], *, images: bool) -> Kind:
    seen = " It reads images with the encoder." if images else " It reads text alone."
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    pipeline, loader = _CLASSIFIERS.get(first, (IMAGES if images else TEXT, "AutoModelForSeq2SeqLM"))
    return Kind(
        title="T5Gemma 2, trained elsewhere",
        pipeline=pipeline,
        tags=("t5gemma2", "encoder-decoder"),
        loader=loader,
        what=(
            "A T5Gemma 2 encoder-decoder that was **trained outside the tool that wrote this card**, with transformers "
            "or another library. What it was trained on, for how long, and what it can do is not known here; who "
            f"trained it can tell.{seen}"
        ),
        adapt=(
            "transformers trains this class as it is; the encoder's `attention_mask` must be given, as a tokenizer "
            "does. Its Trainer loses the encoder on resume "
            "([transformers#48805](https://github.com/huggingface/transformers/issues/48805)): "
            "`t5g2 verify FOLDER --source START` finds that out."
        ),
        images=images,
    )


_T5GEMMA: Final = Kind(
    title="T5Gemma made of Gemma 2",
    pipeline=TEXT,
    tags=("t5gemma", "encoder-decoder"),
    loader="AutoModelForSeq2SeqLM",
    what=(
        "A Gemma 2 in the form of a T5Gemma encoder-decoder of the first generation: a layer of the parent starts one "
        "of the encoder and one of the decoder, whose cross-attention starts as its self-attention. "
        "**It is converted and not further trained.** Without its cross-attention the decoder computes what its parent "
        "computes. The encoder-decoder as a whole has not learnt to use its encoder: it needs adaptation before it is "
        "useful, and until then do not expect sense from it."
    ),
    adapt=(
        f"T5Gemma ({T5GEMMA_PAPER}) was adapted with prefix language modelling, where the encoder reads the first part "
        "of a text and the decoder writes the rest, or with UL2; models of two equal stacks reached their parent's "
        "score after tens of billions of tokens."
    ),
)


def _encoder(*, images: bool) -> Kind:
    return Kind(
        title="The encoder of a T5Gemma 2",
        pipeline="feature-extraction",
        tags=("t5gemma2", "encoder", "feature-extraction"),
        loader="AutoModel",
        what=(
            "The encoder of a T5Gemma 2, taken out tensor by tensor. It turns text"
            f"{' and images' if images else ''} into states, a vector a token, and writes nothing. "
            "**Taking it out trained nothing:** it is as good as the encoder of its source. That of a model which was "
            "only converted has not been trained to see both ways, and its vectors mean little yet."
        ),
        adapt=(
            "For embeddings, pool the states over the tokens and train with pairs of texts, as sentence-transformers "
            "does; for classes, put a head on top. It takes little of either if the source was adapted before."
        ),
        part="encoder",
        images=images,
    )


def _gemma3(*, images: bool) -> Kind:
    return Kind(
        title="Gemma 3 taken out of a T5Gemma 2",
        pipeline=IMAGES if images else TEXT,
        tags=("gemma3", "decoder"),
        loader="AutoModelForCausalLM",
        what=(
            "The decoder of a T5Gemma 2, taken out as the Gemma 3 that it is without an encoder's output to read. "
            "**Taking it out trained nothing.** Of a model that was only converted this is its parent again; of one "
            "that was trained further it is what the decoder has become, which nobody has trained to write alone."
        ),
        adapt="It is a Gemma 3: whatever trains and serves Gemma 3 takes it.",
        part="decoder",
        images=images,
    )


def loading(kind: Kind, files: Collection[str], name: str) -> Iterator[str]:
    """How to load a folder, in Markdown, a paragraph or block at a time.

    Args:
        kind: Its kind.
        files: The names of its files.
        name: What it is loaded by.
    """
    tokenizer = "tokenizer.json" in files or "tokenizer.model" in files
    processor = tokenizer and kind.images and "processor_config.json" in files
    imports = [kind.loader, *["AutoProcessor"] * processor, *["AutoTokenizer"] * tokenizer]
    lines = [f"from transformers import {', '.join(imports)}", "", f'name = "{name}"']
    if tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(name)")
    if processor:
        lines.append("processor = AutoProcessor.from_pretrained(name)  # for text with images")
    lines.append(f"model = {kind.loader}.from_pretrained(name)")
    if tokenizer:
        lines += ["", 'inputs = tokenizer("Once upon a time", return_tensors="pt")']
        if kind.loader == "AutoModel":
            lines.append("states = model(**inputs).last_hidden_state  # [texts, tokens, width]")
        elif kind.loader.endswith("Classification"):
            lines.append("scores = model(**inputs).logits")
        else:
            lines.append("written = model.generate(**inputs, max_new_tokens=20, do_sample=False)")
            lines.append("print(tokenizer.decode(written[0], skip_special_tokens=True))")
    yield "transformers 5.0 or newer loads it:"
    yield fenced("python", lines)
    if not tokenizer:
        yield "It has no tokenizer, as its source had none: take that of the model which the source was made of."
    if processor and kind.loader != "AutoModel":
        yield f'`pipeline("{IMAGES}", model=name)` takes a picture and a text.'


def adapting(kind: Kind, files: Collection[str]) -> Iterator[str]:
    """How to go on with a folder, in Markdown; what `loading` defines is there."""
    yield kind.adapt
    if kind.loader == "AutoModelForSeq2SeqLM" and ("tokenizer.json" in files or "tokenizer.model" in files):
        yield fenced(
            "python",
            [
                'inputs = tokenizer("The encoder reads the first part of a text", return_tensors="pt")',
                'labels = tokenizer("and the decoder writes the rest.", return_tensors="pt").input_ids',
                "model(**inputs, labels=labels).loss.backward()",
            ],
        )
