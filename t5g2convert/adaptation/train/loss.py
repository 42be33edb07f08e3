"""The loss of one micro-batch: a model, and a teacher if there is one, as the one module that the engine shards.

Legend of shape suffixes: B samples, E encoder tokens, D labels, R raw tokens, N labels that count, C hidden width,
V vocabulary, T tasks, I images.

The logits of 16,384 labels over 262,144 tokens are 16 GiB in float32. They never exist at once: head and softmax run
over `chunk` labels at a time, and each chunk's gradient is computed before the next chunk, so no logit is computed
twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from t5g2convert.adaptation.train.block_attention import run_by_blocks
from t5g2convert.adaptation.train.teacher import Teacher

IGNORED: Final = -100
"""Label of padding, ignored as in transformers and torch."""

PIXELS: Final = "pixel_values"
IDLE_PIXELS: Final = "idle_pixel_values"
"""Pixels of a batch without images in a pass where other processes have some: all must gather the same weights."""


class ModelWithLoss(nn.Module):
    """A model together with its summed loss.

    Args:
        model: A model with the interface of transformers' T5Gemma2ForConditionalGeneration: `model.model(...)` returns
            the decoder's last hidden state, and `model.lm_head(...)` its logits.
        tasks: Number of tasks; the loss of each is summed separately.
        softcap: The decoder's `final_logit_softcapping`, which the class applies outside its head.
        chunk: Labels per chunk of logits, to limit memory.
        teacher: The model to distil: labels that are raw tokens are learnt from its distribution.
        by_blocks: Whether the model attends by blocks; see `block_attention`.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        tasks: int,
        softcap: float | None,
        chunk: int,
        teacher: Teacher | None = None,
        by_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.by_blocks = model, by_blocks
        self.teacher = teacher
        self.tasks, self.softcap, self.chunk = tasks, softcap, chunk

    def forward(
        self, batch: Mapping[str, Tensor], *, new_tokens: int | None = None, eos: int = 0
    ) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """Compute the losses of a micro-batch, or with `new_tokens` generate: a sharded model runs only in here.

        Args:
            batch: As for `losses`.
            new_tokens: The most tokens to generate, the same on all processes.
            eos: The token that ends a generated text.

        Returns:
            As `losses`, or int64 [B, new_tokens or fewer], the most likely token at each step; what follows eos is
            padding.
        """
        return self.losses(batch) if new_tokens is None else self.generate(batch, new_tokens, eos)

    def generate(self, batch: Mapping[str, Tensor], new_tokens: int, eos: int) -> Tensor:
        """Generate the most likely tokens, with a cache of keys and values; see `forward`."""
        self._idle(batch)
        pixels = {PIXELS: batch[PIXELS]} if PIXELS in batch else {}
        written: Tensor = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"][:, :1],
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=eos,
            pad_token_id=eos,
            # All processes must gather the weights as often as the one with the longest text.
            synced_gpus=torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1,
            **pixels,
        )
        return written[:, 1:]

    def losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the losses of a micro-batch.

        Args:
            batch: From `ul2.dataset.collate`.

        Returns:
            The sum of all losses; the sums by task, [T], without gradient; and the number of labels by task, [T].
            Losses are float32, counts int64.
        """
        # Before the layers of text, in the order in which processes with images gather their weights.
        nothing = self._idle(batch)
        hidden_BDC = self._states(batch)
        if nothing is not None:
            hidden_BDC = hidden_BDC + nothing.to(hidden_BDC.dtype)
        counted_BD = batch["labels"] != IGNORED
        taught_NC, is_taught_N = self._taught(batch, counted_BD)
        tasks_N = batch["tasks"][:, None].expand_as(counted_BD)[counted_BD]
        if not len(tasks_N):
            # All is padding; the pass is still needed, because the other processes wait for its gradients.
            nothing = (hidden_BDC.sum() + self._table[0].sum()) * 0.0
            return nothing, nothing.detach().new_zeros(self.tasks), tasks_N.new_zeros(self.tasks)
        targets = _Targets(batch["labels"][counted_BD], self.teacher, taught_NC, is_taught_N)
        loss, loss_N = _SoftmaxLoss.apply(  # type: ignore[no-untyped-call]
            hidden_BDC[counted_BD], self._table, targets, self.chunk, self.softcap, torch.is_grad_enabled()
        )
        sums_T = loss_N.new_zeros(self.tasks).index_add_(0, tasks_N, loss_N)
        return loss, sums_T, torch.bincount(tasks_N, minlength=self.tasks)

    def _idle(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return 0, computed from pixels that are no part of the batch; None if there are none."""
        if IDLE_PIXELS not in batch:
            return None
        encoder = self.model.model.encoder
        features = encoder.multi_modal_projector(encoder.vision_tower(pixel_values=batch[IDLE_PIXELS])[0])
        return features.sum() * 0.0

    def _states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the decoder's last hidden states, [B, D, C]."""
        pixels = {PIXELS: batch[PIXELS]} if PIXELS in batch else {}
        if self.by_blocks:
            return run_by_blocks(self.model, batch, pixels)
        states: Tensor = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_attention_mask=batch["decoder_attention_mask"],
            **pixels,
        ).last_hidden_state
        return states

    @property
    def _table(self) -> nn.Parameter:
        """The softmax's matrix, [V, C]; whole in a forward pass, even if the model is sharded."""
        (table,) = self.model.lm_head.parameters()
        return table

    def _taught(self, batch: Mapping[str, Tensor], counted_BD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the teacher's states that predict the counted labels, [N, C], and which labels have one, [N]."""
        if self.teacher is None or "raw_ids" not in batch:
            return None, None
        at_BD = batch["teacher_positions"]
        states_BRC = self.teacher.states(batch["raw_ids"], batch["raw_mask"])
        rows_BD = torch.arange(len(at_BD), device=at_BD.device)[:, None].expand_as(at_BD)
        taught_NC = states_BRC[rows_BD[counted_BD], at_BD[counted_BD].clamp(min=0)]
        return taught_NC, at_BD[counted_BD] >= 0


@dataclass(frozen=True, slots=True)
class _Targets:
    """What the counted labels are learnt from.

    Attributes:
        labels_N: The labels.
        teacher: The model to distil.
        taught_NC: Its states that predict the labels.
        is_taught_N: Which labels have one.
    """

    labels_N: Tensor
    teacher: Teacher | None = None
    taught_NC: Tensor | None = None
    is_taught_N: Tensor | None = None

    def losses(self, logits_NV: Tensor, piece: slice) -> Tensor:
        """Return the losses of a chunk, float32 [N], and replace its logits by their gradient.

        A label's loss is its cross-entropy, with gradient softmax(logits) - onehot(label); or the divergence of the
        teacher's distribution q, with gradient softmax(logits) - q.
        """
        labels_N1 = self.labels_N[piece, None]
        logits_NV -= logits_NV.amax(-1, keepdim=True)
        wanted_N = logits_NV.gather(-1, labels_N1)[:, 0]
        expected_NV = self._expected(piece)
        if expected_NV is not None:
            wanted_N = (expected_NV * logits_NV).sum(-1) + torch.special.entr(expected_NV).sum(-1)
        total_N1 = logits_NV.exp_().sum(-1, keepdim=True)
        logits_NV /= total_N1
        if expected_NV is None:
            logits_NV.scatter_add_(-1, labels_N1, torch.full_like(total_N1, -1.0))
        else:
            logits_NV -= expected_NV
        return total_N1[:, 0].log() - wanted_N

    def _expected(self, piece: slice) -> Tensor | None:
        """Return the distribution that each label of a chunk is learnt from, float32 [N, V]; None without a teacher."""
        if self.teacher is None or self.taught_NC is None or self.is_taught_N is None:
            return None
        expected_NV = self.teacher.logits(self.taught_NC[piece]).softmax(-1)
        text_N = ~self.is_taught_N[piece]
        expected_NV[text_N] = functional.one_hot(self.labels_N[piece][text_N], expected_NV.shape[-1]).float()
        return expected_NV


class _SoftmaxLoss(torch.autograd.Function):
    """Head, softmax and loss, one chunk of labels at a time, with the gradients of each chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        table_VC: Tensor,
        targets: _Targets,
        chunk: int,
        softcap: float | None,
        trained: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of all losses, and the loss of each label without gradient; both float32."""
        loss_N = hidden_NC.new_empty(len(hidden_NC), dtype=torch.float32)
        d_hidden_NC = torch.empty_like(hidden_NC) if trained else None
        # The table is frozen if an adapter is trained.
        d_table_VC, trains_table = None, ctx.needs_input_grad[1]
        for start in range(0, len(loss_N), chunk):
            piece = slice(start, start + chunk)
            logits_NV = (hidden_NC[piece] @ table_VC.T).float()
            slopes_NV = None
            if softcap is not None:
                logits_NV.div_(softcap).tanh_()
                slopes_NV = 1 - logits_NV.square() if trained else None
                logits_NV *= softcap
            loss_N[piece] = targets.losses(logits_NV, piece)
            if d_hidden_NC is not None:
                gradient_NV = (logits_NV if slopes_NV is None else logits_NV.mul_(slopes_NV)).to(hidden_NC.dtype)
                d_hidden_NC[piece] = gradient_NV @ table_VC
                if d_table_VC is not None:
                    d_table_VC.addmm_(gradient_NV.T, hidden_NC[piece])
                elif trains_table:
                    d_table_VC = gradient_NV.T @ hidden_NC[piece]
        if trained:
            ctx.save_for_backward(d_hidden_NC, d_table_VC)
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward pass."""
        d_hidden_NC, d_table_VC = ctx.saved_tensors
        # In place: the gradient of a table is gigabytes, and each graph is used once.
        d_table_VC = None if d_table_VC is None else d_table_VC.mul_(d_loss)
        return d_hidden_NC.mul_(d_loss), d_table_VC, None, None, None, None
