"""The spellings of T5Gemma 2's tensor names that loaders accept, translated to the published one.

| saved by | encoder | vision tower | decoder |
|---|---|---|---|
| the Hub's repositories, `save_pretrained` of a loaded model | `model.encoder.` | `...vision_tower.vision_model.` | `model.decoder.` |
| `save_pretrained` of a model that was never loaded | `model.encoder.` | `...vision_tower.` | `model.decoder.` |
| a raw state dict (FSDP, DeepSpeed, merge tools) | `model.encoder.text_model.` | `...vision_tower.` | `model.decoder.` |
| T5Gemma2Model, either way | `encoder.`, `encoder.text_model.` | either | `decoder.` |

A raw state dict also holds the tied copies. With another class's head (`score.out_proj.weight`), a checkpoint is
complete without the head. The maps that extract parts of a T5Gemma 2 declare the same spellings as their roots; a test
compares the two.
"""  # noqa: E501 (the table)

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.t5gemma2 import ENCODER_TYPE, MODEL_TYPE
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor, some
from t5g2convert.errors import CheckpointError

TABLE: Final = "model.encoder.embed_tokens.weight"
EOI: Final = "model.encoder.embed_tokens.eoi_embedding"

ROOTS: Final[Mapping[str, tuple[str, ...]]] = {
    "encoder": ("model.encoder.", "model.encoder.text_model.", "encoder.", "encoder.text_model."),
    "vision": (
        "model.encoder.vision_tower.vision_model.", "model.encoder.vision_tower.",
        "encoder.vision_tower.vision_model.", "encoder.vision_tower.",
    ),
    "projector": ("model.encoder.multi_modal_projector.", "encoder.multi_modal_projector."),
    "decoder": ("model.decoder.", "decoder."),
}  # fmt: skip
"""Spellings of the roots of a whole model, the published one first."""

ALONE_ROOTS: Final[Mapping[str, tuple[str, ...]]] = {
    "encoder": ("", "text_model."),
    "vision": ("vision_tower.vision_model.", "vision_tower."),
    "projector": ("multi_modal_projector.",),
}
"""The same for a standalone encoder."""

COPIES: Final[Mapping[str, str]] = {
    "model.decoder.embed_tokens.weight": TABLE,
    "model.decoder.embed_tokens.eoi_embedding": EOI,
    "lm_head.out_proj.weight": TABLE,
}
"""Tied copies, and the tensors that they repeat."""

HEADS: Final = (
    "score.out_proj.weight", "score.out_proj.bias", "v_head.summary.weight", "v_head.summary.bias",
)  # fmt: skip
"""Heads of other classes: T5Gemma2ForSequenceClassification and -TokenClassification; TRL's value head."""

HEADED: Final = ("T5Gemma2ForSequenceClassification", "T5Gemma2ForTokenClassification")
"""Classes that save a head."""


@dataclass(frozen=True, slots=True)
class Published:
    """A T5Gemma 2, or its standalone encoder, under its published names.

    Attributes:
        checkpoint: The checkpoint, with each tensor under its published name; a `StoredTensor` keeps its stored name.
        spelled: The stored name of each of these tensors, by published name.
        copies: Tied copies by stored name, with the published name of the tensor that they repeat.
        heads: Names of the tensors of another class's head.
        unexpected: All other names.
    """

    checkpoint: Checkpoint
    spelled: Mapping[str, str]
    copies: Mapping[str, str]
    heads: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def layout(self) -> dict[str, str]:
        """The spelling of each root."""
        alone = self.checkpoint.config.get("model_type") == ENCODER_TYPE
        return dict(filter(None, (_root_of(name, alone=alone) for name in self.spelled.values())))

    @property
    def respelled(self) -> bool:
        """Whether any stored name differs from the published one."""
        return any(name != spelled for name, spelled in self.spelled.items())


def as_published(checkpoint: Checkpoint) -> Published:
    """Read the tensor names of a T5Gemma 2, or of its standalone encoder, in any spelling.

    Raises:
        CheckpointError: A tensor has two spellings, or the config is another model's.
    """
    where = checkpoint.path / "config.json"
    implied = {item.name for item in expected_tensors(checkpoint.config, where)}
    alone = checkpoint.config.get("model_type") == ENCODER_TYPE
    tensors: dict[str, StoredTensor] = {}
    copies: dict[str, str] = {}
    heads: list[str] = []
    unexpected: list[str] = []
    twice: list[str] = []
    for name, stored in checkpoint.tensors.items():
        published = published_name(name, alone=alone)
        if published in implied:
            twice += [f"{tensors[published].entry.name} and {name}"] if published in tensors else []
            tensors[published] = stored
        elif published in COPIES and not alone:
            copies[name] = COPIES[published]
        else:
            (heads if name in HEADS else unexpected).append(name)
    if twice:
        raise CheckpointError(
            f"spells {len(twice)} tensor(s) under two names each: {some(twice)}",
            where=checkpoint.path,
            hint="remove the outdated tensors",
        )
    spelled = {name: stored.entry.name for name, stored in tensors.items()}
    return Published(replace(checkpoint, tensors=tensors), spelled, copies, tuple(heads), tuple(unexpected))


def published_name(name: str, *, alone: bool = False) -> str:
    """Return the published name of a tensor; a name without a known root is returned unchanged.

    >>> published_name("encoder.text_model.layers.0.mlp.up_proj.weight")
    'model.encoder.layers.0.mlp.up_proj.weight'
    """
    found = _root_of(name, alone=alone)
    if found is None:
        return name
    root, spelling = found
    return (ALONE_ROOTS if alone else ROOTS)[root][0] + name.removeprefix(spelling)


def _root_of(name: str, *, alone: bool) -> tuple[str, str] | None:
    """Return the root of a name and its longest matching spelling; None if no spelling matches."""
    roots = ALONE_ROOTS if alone else ROOTS
    fitting = [(root, each) for root, spellings in roots.items() for each in spellings if name.startswith(each)]
    return max(fitting, key=lambda pair: len(pair[1]), default=None)


def is_t5gemma2(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is a T5Gemma 2 or its standalone encoder."""
    return checkpoint.config.get("model_type") in (MODEL_TYPE, ENCODER_TYPE)
