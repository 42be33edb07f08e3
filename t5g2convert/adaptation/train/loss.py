"""The loss of one micro-batch: a model, and a teacher if there is one, as the one module that the engine shards.

Legend of shape suffixes: B samples, E encoder tokens, D labels, R raw tokens, N labels that count, C hidden width,
V vocabulary, T tasks, I images.

The logits of 16,384 labels over 262,144 tokens are 16 GiB in float32. They never exist at once: the head and the
softmax run over `chunk` labels at a time, and the backward pass computes each chunk's logits again.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from t5g2convert.adaptation.train.teacher import Teacher

IGNORED: Final = -100
"""Label of padding, ignored as in transformers and torch."""


class ModelWithLoss(nn.Module):
    """A model together with its summed loss.

    Args:
        model: A model with the interface of transformers' T5Gemma2ForConditionalGeneration: `model.model(...)` returns
            the decoder's last hidden state, and `model.lm_head(...)` its logits.
        tasks: Number of tasks; the loss of each is summed separately.
        softcap: The decoder's `final_logit_softcapping`, which the class applies outside its head.
        chunk: Labels per chunk of logits, to limit memory.
        teacher: The model to distil: labels that are raw tokens are learnt from its distribution.
    """

    model: Any

    def __init__(
        self, model: nn.Module, *, tasks: int, softcap: float | None, chunk: int, teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.tasks, self.softcap, self.chunk = tasks, softcap, chunk

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the losses of a micro-batch.

        Args:
            batch: From `ul2.dataset.collate`.

        Returns:
            The sum of all losses; the sums by task, [T], without gradient; and the number of labels by task, [T].
            Losses are float32, counts int64.
        """
        pixels = {"pixel_values": batch["pixel_values"]} if "pixel_values" in batch else {}
        hidden_BDC = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_attention_mask=batch["decoder_attention_mask"],
            **pixels,
        ).last_hidden_state
        counted_BD = batch["labels"] != IGNORED
        taught_NC, is_taught_N = self._taught(batch, counted_BD)
        tasks_N = batch["tasks"][:, None].expand_as(counted_BD)[counted_BD]
        if not len(tasks_N):
            # All is padding; the pass is still needed, because the other processes wait for its gradients.
            nothing = self._chunk(hidden_BDC[:1, 0], batch["labels"].new_zeros(1), None, None).sum() * 0.0
            return nothing, nothing.detach().new_zeros(self.tasks), tasks_N.new_zeros(self.tasks)
        loss_N = self._losses(hidden_BDC[counted_BD], batch["labels"][counted_BD], taught_NC, is_taught_N)
        sums_T = loss_N.new_zeros(self.tasks).index_add_(0, tasks_N, loss_N.detach())
        return loss_N.sum(), sums_T, torch.bincount(tasks_N, minlength=self.tasks)

    def _taught(self, batch: Mapping[str, Tensor], counted_BD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the teacher's states that predict the counted labels, [N, C], and which labels have one, [N]."""
        if self.teacher is None or "raw_ids" not in batch:
            return None, None
        at_BD = batch["teacher_positions"]
        states_BRC = self.teacher.states(batch["raw_ids"], batch["raw_mask"])
        rows_BD = torch.arange(len(at_BD), device=at_BD.device)[:, None].expand_as(at_BD)
        taught_NC = states_BRC[rows_BD[counted_BD], at_BD[counted_BD].clamp(min=0)]
        return taught_NC, at_BD[counted_BD] >= 0

    def _losses(
        self, hidden_NC: Tensor, labels_N: Tensor, taught_NC: Tensor | None, is_taught_N: Tensor | None
    ) -> Tensor:
        """Return the loss of each label, float32 [N]."""
        pieces = [hidden_NC.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(labels_N), self.chunk):
            piece = slice(start, start + self.chunk)
            teaching = (
                (None, None) if taught_NC is None or is_taught_N is None else (taught_NC[piece], is_taught_N[piece])
            )
            pieces.append(checkpoint(self._chunk, hidden_NC[piece], labels_N[piece], *teaching, use_reentrant=False))
        return torch.cat(pieces)

    def _chunk(
        self, hidden_NC: Tensor, labels_N: Tensor, taught_NC: Tensor | None, is_taught_N: Tensor | None
    ) -> Tensor:
        logits_NV = self.model.lm_head(hidden_NC)
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        logits_NV = logits_NV.float()
        loss_N = functional.cross_entropy(logits_NV, labels_N, reduction="none")
        if self.teacher is None or taught_NC is None or is_taught_N is None:
            return loss_N
        with torch.no_grad():
            expected_NV = self.teacher.logits(taught_NC).log_softmax(-1)
        divergence_N = (expected_NV.exp() * (expected_NV - logits_NV.log_softmax(-1))).sum(-1)
        return torch.where(is_taught_N, divergence_N, loss_N)
