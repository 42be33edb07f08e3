"""The texts of a model card that depend on the kind of model: description, loading, next steps."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from t5g2convert.checkpoint.families.config_section import describe_model_type
from t5g2convert.checkpoint.file_names import PIECES_FILE, PROCESSOR_FILE, TOKENIZER_FILE
from t5g2convert.errors import CheckpointError
from t5g2convert.publish.markdown import fenced

T5GEMMA2_PAPER: Final = "[arXiv 2512.14856](https://arxiv.org/abs/2512.14856)"
T5GEMMA_PAPER: Final = "[arXiv 2504.06225](https://arxiv.org/abs/2504.06225)"

TEXT: Final = "text-generation"
"""The Hub's task for text-only models, including encoder-decoders: the Hub no longer lists text2text-generation."""

IMAGES: Final = "image-text-to-text"

_ATTENTION_MASK: Final = (
    "transformers trains this class as is; pass the encoder's `attention_mask`, which a tokenizer returns."
)


@dataclass(frozen=True, slots=True)
class CardTemplate:
    """The texts for one kind of model.

    Attributes:
        title: The heading of a card without a repository name.
        pipeline: The Hub's task.
        tags: The Hub's tags, without the name of this tool.
        loader: The class of transformers that loads the model.
        what: The description of what the model is and is not, in Markdown.
        adapt: The next steps with the model, in Markdown.
        part: The part of an encoder-decoder that was extracted; None for a whole model.
        images: Whether the model reads images.
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


def template_for(
    config: Mapping[str, Any], where: Path, *, trained: Literal["ul2", "pairs", "merged"] | None = None
) -> CardTemplate:
    """Return the template for a folder that this tool wrote.

    Args:
        config: Its config.json.
        where: The path of config.json, for errors.
        trained: How the model was changed after its conversion: trained by this tool, or merged with an adapter.

    Raises:
        CheckpointError: This tool does not write models of that type.
    """
    match config.get("model_type"):
        case "t5gemma2":
            make = {None: _t5gemma2, "ul2": _adapted, "pairs": _finetuned, "merged": _merged}[trained]
            return make(images=_reads_images(config.get("encoder")))
        case "t5gemma":
            return _T5GEMMA
        case "t5gemma2_encoder":
            return _encoder(images=_reads_images(config))
        case "gemma3":
            return _gemma3(images=True)
        case "gemma3_text":
            return _gemma3(images=False)
    raise CheckpointError(f"no model card for this model: {describe_model_type(config)}", where=where)


def template_for_trained_elsewhere(config: Mapping[str, Any], where: Path) -> CardTemplate:
    """Return the template for a folder trained elsewhere.

    Raises:
        CheckpointError: The folder is neither a T5Gemma 2 nor its standalone encoder.
    """
    match config.get("model_type"):
        case "t5gemma2":
            return _trained_elsewhere(config, images=_reads_images(config.get("encoder")))
        case "t5gemma2_encoder":
            return replace(
                _encoder(images=_reads_images(config)),
                title="The encoder of a T5Gemma 2, trained elsewhere",
                what=(
                    "The encoder of a T5Gemma 2, extracted and then **trained outside the tool that wrote this card**. "
                    "The training data and the model's abilities are not known here."
                ),
            )
    raise CheckpointError(f"no model card for this model: {describe_model_type(config)}", where=where)


def _reads_images(section: object) -> bool:
    """Return whether the vision tower has layers; a text-only model has a tower without layers."""
    vision = section.get("vision_config") if isinstance(section, dict) else None
    depth = vision.get("num_hidden_layers") if isinstance(vision, dict) else None
    return isinstance(depth, int) and depth > 0


def _t5gemma2(*, images: bool) -> CardTemplate:
    input_text = "It reads images with the encoder." if images else "It reads text only: its vision tower is a stub."
    return CardTemplate(
        title="T5Gemma 2 converted from Gemma 3",
        pipeline=IMAGES if images else TEXT,
        tags=("t5gemma2", "encoder-decoder"),
        loader="AutoModelForSeq2SeqLM",
        what=(
            "A Gemma 3 converted to a T5Gemma 2 encoder-decoder. The layers of both stacks are copies of the parent's "
            "layers; the decoder's merged attention reads both its own states and the encoder's output. "
            "**It was converted and not trained further.** With the encoder's output masked out, the decoder computes "
            "what its parent computes. The encoder-decoder as a whole has not learned to use its encoder: it "
            f"needs adaptation before it is useful, and its outputs make no sense until then. {input_text}"
        ),
        adapt=(
            f"T5Gemma 2 ({T5GEMMA2_PAPER}) was adapted with UL2. In half of the examples the encoder reads the first "
            "part of a text and the decoder writes the rest; in the other half, spans of the text are masked for the "
            f"encoder and written by the decoder. The vision tower stays frozen. {_ATTENTION_MASK}"
        ),
        images=images,
    )


def _adapted(*, images: bool) -> CardTemplate:
    return _trained(
        "T5Gemma 2, trained further",
        what=(
            "A T5Gemma 2 encoder-decoder that was converted from Gemma 3 and **trained further**, so that its decoder "
            f"learns to use its encoder, as in the T5Gemma 2 paper ({T5GEMMA2_PAPER}). The table below has the number "
            "of training tokens; the paper used two trillion. The tool that wrote this card did not measure what the "
            "model can do."
        ),
        adapt="It was already adapted. Continue with the same command, or train it for a task.",
        tags=("ul2",),
        images=images,
    )


def _merged(*, images: bool) -> CardTemplate:
    return _trained(
        "T5Gemma 2 with a merged LoRA adapter",
        what=(
            "A T5Gemma 2 encoder-decoder with a **LoRA adapter merged into its weights**. It needs no adapter to load. "
            "The tool that wrote this card did not measure what the model can do, and does not know what the adapter "
            "was trained on."
        ),
        adapt="Train it for another task, in full or with a new adapter.",
        tags=("lora",),
        images=images,
    )


def _finetuned(*, images: bool) -> CardTemplate:
    return _trained(
        "T5Gemma 2, fine-tuned",
        what=(
            "A T5Gemma 2 encoder-decoder that was converted from Gemma 3 and **fine-tuned on pairs of an input and a "
            "target**: its encoder reads the input, its decoder writes the target. The tool that wrote this card did "
            "not measure what the model can do."
        ),
        adapt="It was already trained for a task. Fine-tune it further with the same command.",
        images=images,
    )


def _trained(title: str, *, what: str, adapt: str, images: bool, tags: tuple[str, ...] = ()) -> CardTemplate:
    input_text = "It reads images with the encoder." if images else "It reads text only."
    return CardTemplate(
        title=title,
        pipeline=IMAGES if images else TEXT,
        tags=("t5gemma2", "encoder-decoder", *tags),
        loader="AutoModelForSeq2SeqLM",
        what=f"{what} {input_text}",
        adapt=f"{adapt} {_ATTENTION_MASK}",
        images=images,
    )


_CLASSIFIERS: Final[Mapping[str, tuple[str, Any]]] = {
    "T5Gemma2ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "T5Gemma2ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
}
"""The Hub's task and the loader for each class with a classification head."""


def _trained_elsewhere(config: Mapping[str, Any], *, images: bool) -> CardTemplate:
    input_text = "It reads images with the encoder." if images else "It reads text only."
    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    pipeline, loader = _CLASSIFIERS.get(first, (IMAGES if images else TEXT, "AutoModelForSeq2SeqLM"))
    return CardTemplate(
        title="T5Gemma 2, trained elsewhere",
        pipeline=pipeline,
        tags=("t5gemma2", "encoder-decoder"),
        loader=loader,
        what=(
            "A T5Gemma 2 encoder-decoder that was **trained outside the tool that wrote this card**, with transformers "
            "or another library. The training data, the length of the training and the model's abilities are not known "
            f"here; ask whoever trained it. {input_text}"
        ),
        adapt=(
            f"{_ATTENTION_MASK} Its Trainer loses the encoder on resume "
            "([transformers#48805](https://github.com/huggingface/transformers/issues/48805)): "
            "`t5g2 verify FOLDER --source START` detects that."
        ),
        images=images,
    )


_T5GEMMA: Final = CardTemplate(
    title="T5Gemma converted from Gemma 2",
    pipeline=TEXT,
    tags=("t5gemma", "encoder-decoder"),
    loader="AutoModelForSeq2SeqLM",
    what=(
        "A Gemma 2 converted to a T5Gemma encoder-decoder of the first generation. The layers of both stacks are "
        "copies of the parent's layers, and the decoder's cross-attention is a copy of its self-attention. "
        "**It was converted and not trained further.** Without its cross-attention the decoder computes what "
        "its parent computes. The encoder-decoder as a whole has not learned to use its encoder: it needs adaptation "
        "before it is useful, and its outputs make no sense until then."
    ),
    adapt=(
        f"T5Gemma ({T5GEMMA_PAPER}) was adapted with prefix language modelling, where the encoder reads the first part "
        "of a text and the decoder writes the rest, or with UL2. Models with two equal stacks reached their parent's "
        "score after tens of billions of tokens."
    ),
)


def _encoder(*, images: bool) -> CardTemplate:
    return CardTemplate(
        title="The encoder of a T5Gemma 2",
        pipeline="feature-extraction",
        tags=("t5gemma2", "encoder", "feature-extraction"),
        loader="AutoModel",
        what=(
            "The encoder of a T5Gemma 2, extracted tensor by tensor. It turns text"
            f"{' and images' if images else ''} into hidden states, one vector per token, and generates nothing. "
            "**It was not trained after extraction.** It is as good as the encoder of its source. The encoder of a "
            "model that was only converted has not been trained to attend both ways, so its vectors mean little yet."
        ),
        adapt=(
            "For embeddings, pool the states over the tokens and train on pairs of texts, as sentence-transformers "
            "does; for classification, add a head. Either takes little training if the source was already adapted."
        ),
        part="encoder",
        images=images,
    )


def _gemma3(*, images: bool) -> CardTemplate:
    return CardTemplate(
        title="Gemma 3 extracted from a T5Gemma 2",
        pipeline=IMAGES if images else TEXT,
        tags=("gemma3", "decoder"),
        loader="AutoModelForCausalLM",
        what=(
            "The decoder of a T5Gemma 2, extracted as the Gemma 3 that it is without an encoder's output to read. "
            "**It was not trained after extraction.** If the source was only converted, this is its parent again. If "
            "the source was trained further, nobody has trained this decoder to write on its own."
        ),
        adapt="It is a Gemma 3: use it with anything that trains or serves Gemma 3.",
        part="decoder",
        images=images,
    )


def loading(template: CardTemplate, files: Collection[str], name: str) -> Iterator[str]:
    """Yield the instructions for loading a model, in Markdown, one paragraph or block at a time.

    Args:
        template: The texts for its kind.
        files: The names of its files.
        name: The argument of `from_pretrained`.
    """
    tokenizer = TOKENIZER_FILE in files or PIECES_FILE in files
    processor = tokenizer and template.images and PROCESSOR_FILE in files
    imports = [template.loader, *["AutoProcessor"] * processor, *["AutoTokenizer"] * tokenizer]
    lines = [f"from transformers import {', '.join(imports)}", "", f'name = "{name}"']
    if tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(name)")
    if processor:
        lines.append("processor = AutoProcessor.from_pretrained(name)  # for text with images")
    lines.append(f"model = {template.loader}.from_pretrained(name)")
    if tokenizer:
        lines += ["", 'inputs = tokenizer("Once upon a time", return_tensors="pt")']
        if template.loader == "AutoModel":
            lines.append("states = model(**inputs).last_hidden_state  # [texts, tokens, width]")
        elif template.loader.endswith("Classification"):
            lines.append("scores = model(**inputs).logits")
        else:
            lines.append("written = model.generate(**inputs, max_new_tokens=20, do_sample=False)")
            lines.append("print(tokenizer.decode(written[0], skip_special_tokens=True))")
    yield "Load it with transformers 5.0 or newer:"
    yield fenced("python", lines)
    if not tokenizer:
        yield "It has no tokenizer because its source has none: use that of the model the source was made from."
    if processor and template.loader != "AutoModel":
        yield f'`pipeline("{IMAGES}", model=name)` takes an image and a text.'


def adapting(template: CardTemplate, files: Collection[str]) -> Iterator[str]:
    """Yield the next steps with a model, in Markdown; the code uses the names that `loading` defines."""
    yield template.adapt
    if template.loader == "AutoModelForSeq2SeqLM" and (TOKENIZER_FILE in files or PIECES_FILE in files):
        yield fenced(
            "python",
            [
                'inputs = tokenizer("The encoder reads the first part of a text", return_tensors="pt")',
                'labels = tokenizer("and the decoder writes the rest.", return_tensors="pt").input_ids',
                "model(**inputs, labels=labels).loss.backward()",
            ],
        )
