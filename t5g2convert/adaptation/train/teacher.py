"""The teacher for distillation: Gemma 3 reads the raw text and predicts each next token."""

from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from t5g2convert.adaptation.train.model import quiet_transformers
from t5g2convert.adaptation.train.sharding import parameters_on_meta
from t5g2convert.checkpoint.families.config_section import describe_model_type
from t5g2convert.checkpoint.families.gemma3 import MULTIMODAL, TEXT_ONLY, read_gemma3
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.errors import CheckpointError

ROOTS: Final = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
"""Prefixes of the text stack's tensors: text-only folders, and the two spellings of multimodal ones; the last two are
those of an untied head."""

FILL_ROWS: Final = 64
"""Unused rows at the end of Gemma 3's table of 262208 rows, which a conversion cuts off."""


class Teacher(nn.Module):
    """A frozen decoder-only model.

    Args:
        stack: Module from token ids to last hidden states.
        lm_head: Module from hidden states to logits.
        vocabulary: Rows of the student's table; the teacher's further rows are ignored.
        softcap: `final_logit_softcapping`, if set.
    """

    def __init__(self, stack: nn.Module, lm_head: nn.Module, *, vocabulary: int, softcap: float | None) -> None:
        super().__init__()
        self.stack, self.lm_head = stack, lm_head
        self.vocabulary, self.softcap = vocabulary, softcap
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, even if the module that contains this one is trained."""
        return super().train(False)

    @torch.no_grad()
    def states(self, ids_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """Return the last hidden states, [B, R, width]; each predicts the next token."""
        return self.stack(input_ids=ids_BR, attention_mask=mask_BR, use_cache=False).last_hidden_state

    @torch.no_grad()
    def logits(self, states_NC: Tensor) -> Tensor:
        """Return logits over the student's vocabulary, float32 [N, V]."""
        logits_NV = self.lm_head(states_NC)[:, : self.vocabulary]
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV.float()


def check_teacher(folder: Path, *, vocabulary: int, longest: int) -> None:
    """Refuse a teacher that does not fit the student, from its config alone.

    Args:
        folder: A Gemma 3 folder.
        vocabulary: Rows of the student's table.
        longest: Tokens of the longest sample.

    Raises:
        CheckpointError: It is not a Gemma 3, has another vocabulary, or too few positions.
    """
    config = open_checkpoint(folder).config
    where = folder / "config.json"
    if config.get("model_type") not in (MULTIMODAL, TEXT_ONLY):
        raise CheckpointError(
            f"cannot be distilled: expected a Gemma 3, found {describe_model_type(config)}", where=where
        )
    text = read_gemma3(config, where).text
    if text.vocab_size not in (vocabulary, vocabulary + FILL_ROWS):
        raise CheckpointError(
            f"has a vocabulary of {text.vocab_size}, but the model to train has {vocabulary}", where=where
        )
    if text.max_position_embeddings < longest:
        raise CheckpointError(
            f"reads at most {text.max_position_embeddings} tokens, but samples have up to {longest}", where=where
        )


def build_teacher(folder: Path, *, vocabulary: int, dtype: torch.dtype) -> Teacher:
    """Build the text stack of a Gemma 3 folder, frozen, with its parameters on the meta device."""
    transformers: Any = quiet_transformers()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    text = getattr(config, "text_config", config)
    with parameters_on_meta():
        model = transformers.Gemma3ForCausalLM._from_config(text, dtype=dtype)
    return Teacher(model.model, model.lm_head, vocabulary=vocabulary, softcap=text.final_logit_softcapping)


def teacher_names(teacher: Teacher, checkpoint: Checkpoint) -> dict[str, str]:
    """Map the names of a teacher's parameters to the names of their tensors on disk; tied parameters appear once.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    names = {}
    for name, parameter in teacher.named_parameters():
        inner = name.removeprefix("stack.")
        candidates = [root + inner for root in ROOTS if root + inner in checkpoint.tensors]
        shapes = [checkpoint.tensors[candidate].entry.shape for candidate in candidates]
        if shapes != [tuple(parameter.shape)]:
            raise CheckpointError(
                f"cannot be distilled: expected one {inner} of shape {tuple(parameter.shape)}, found {shapes}",
                where=checkpoint.path,
            )
        names[name] = candidates[0]
    return names
