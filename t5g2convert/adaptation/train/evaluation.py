"""Held-out losses during a run, by task: with the encoder visible to the decoder, and hidden from it.

Their difference is what the encoder is worth. A converted model that was not trained predicts better with the encoder
hidden; a model that has learnt to use its encoder predicts worse.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.dataset import Batch, Samples, load_batches
from t5g2convert.adaptation.train.distributed import raise_first_error, run_on_all_ranks
from t5g2convert.adaptation.train.evaluation_log import (
    Evaluation,
    Measure,
    Scores,
    best_of,
    read_evaluations,
    write_evaluations,
)
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.checkpoint.manifest_section import digest_of
from t5g2convert.errors import T5g2Error, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@torch.no_grad()
def evaluate(
    engine: "Fabric", module: nn.Module, held_out: Sequence[Samples[Any]], *, loop: LoopConfig, step: int
) -> Evaluation:
    """Compute the held-out losses, each process its share.

    Args:
        engine: Fabric, launched.
        module: The sharded `ModelWithLoss`.
        held_out: Held-out samples, each a run of one step.
        loop: Settings of the loop.
        step: Completed steps.

    Raises:
        T5g2Error: A sample cannot be made; on other ranks than 0, `ReportedElsewhere`.
    """
    names = held_out[0].task_names
    # Losses, losses with the encoder hidden, and labels; float64 holds all counts exactly.
    corpora = list(dict.fromkeys(samples.corpora[0].name for samples in held_out))
    every = torch.zeros(len(corpora), 3, len(names), dtype=torch.float64, device=engine.device)
    module.eval()
    for samples in held_out:
        sums = every[corpora.index(samples.corpora[0].name)]
        for _, batch in held_out_batches(engine, samples, loop):
            for row, seen in zip(sums, (batch, hide_encoder(batch)), strict=False):
                _, losses_T, labels_T = module(seen)
                row += losses_T
            sums[2] += labels_T
    module.train()
    if engine.world_size > 1:
        torch.distributed.all_reduce(every)
    by_corpus = {
        name: float(sums[0].sum() / sums[2].sum()) for name, sums in zip(corpora, every, strict=True) if len(every) > 1
    }
    return Evaluation.of_sums(step, names, every.sum(dim=0), by_corpus)


def held_out_batches(engine: "Fabric", samples: Samples[Any], loop: LoopConfig) -> Iterator[tuple[MicroBatch, Batch]]:
    """Yield this process's batches of held-out samples, each with its micro-batch.

    Raises:
        T5g2Error: A sample cannot be made; on other ranks than 0, `ReportedElsewhere`.
    """
    order = samples.order(loop, rank=engine.global_rank, world=engine.world_size)
    for place, made in load_batches(samples, order, workers=0):
        raise_first_error(engine, made if isinstance(made, T5g2Error) else None)
        assert not isinstance(made, T5g2Error), "raised before"
        yield place, engine.to_device(made)


def hide_encoder(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same samples with the encoder hidden from the decoder."""
    return {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}


@dataclass(frozen=True, slots=True)
class Policy:
    """What evaluations decide.

    Attributes:
        keep_best: Keep the checkpoint of the best evaluation.
        patience: Evaluations without a better one that end the run; None for a run to its last step.
        by: What makes an evaluation the best.
    """

    keep_best: bool = False
    patience: int | None = None
    by: Measure = "loss"


NOTHING_DECIDED: Final = Policy()


class Evaluator:
    """Evaluates a run after some of its steps, and keeps all results in evaluation.jsonl.

    Args:
        engine: Fabric, launched.
        module: The sharded `ModelWithLoss`.
        held_out: Held-out samples, each a run of one step; empty for no evaluation.
        loop: Settings of the loop.
        path: The run's evaluation.jsonl.
        start: Steps completed before; later evaluations in the file are dropped.
        made: The steps of the complete checkpoints: others up to the start cannot be the best any more.
        report: Called with every evaluation, on rank 0.
        policy: What the evaluations decide.
        generate: Returns the scores of generated texts, on all ranks; None to generate nothing.
    """

    def __init__(
        self,
        engine: "Fabric",
        module: nn.Module,
        held_out: Sequence[Samples[Any]],
        loop: LoopConfig,
        path: Path,
        *,
        start: int,
        made: Collection[int],
        report: Callable[[Evaluation], None],
        policy: Policy = NOTHING_DECIDED,
        generate: Callable[[nn.Module], Scores] | None = None,
    ) -> None:
        self._engine, self._module, self._held_out, self._loop = engine, module, held_out, loop
        self._path, self._report, self._policy, self._generate = path, report, policy, generate
        self._start, self._made, self._data = start, made, digest_of_held_out(held_out) if held_out else ""
        on_rank_0 = engine.global_rank == 0
        before = engine.broadcast(run_on_all_ranks(engine, lambda: read_evaluations(path) if on_rank_0 else []))
        self.evaluations: list[Evaluation] = [each for each in before if each.step <= start]
        if len(self.evaluations) < len(before):
            # Now: a run that dies before its next evaluation must not find those of steps that it went back from.
            run_on_all_ranks(engine, lambda: write_evaluations(path, self.evaluations) if on_rank_0 else None)
        others = {each.data for each in self.evaluations} - {"", self._data}
        if others and held_out and (policy.keep_best or policy.patience is not None):
            raise_first_error(
                engine,
                UsageError(
                    f"{path} has evaluations of other held-out pairs, which cannot be compared with these",
                    hint="use --eval and --eval-samples of the first start, or move the file away",
                ),
            )

    def __call__(self, done: int) -> Mapping[str, float]:
        """Evaluate after so many steps, and return scalars for TensorBoard.

        Return none without held-out data, or if the file has this evaluation from before a run resumed.
        """
        if not self._held_out or any(each.step == done for each in self.evaluations):
            return {}
        found = evaluate(self._engine, self._module, self._held_out, loop=self._loop, step=done)
        found = replace(found, data=self._data)
        if self._generate is not None:
            found = replace(found, generated=self._generate(self._module))
        self.evaluations.append(found)
        if self._engine.global_rank == 0:
            write_evaluations(self._path, self.evaluations)
            self._report(found)
        return found.scalars

    @property
    def best(self) -> int | None:
        """The step of the best evaluation after training began, if its checkpoint is there and to be kept."""
        there = [each for each in self.evaluations if each.step > self._start or each.step in self._made]
        best = best_of(there, self._policy.by) if self._policy.keep_best else None
        return None if best is None else best.step

    @property
    def notes(self) -> list[str]:
        """Notes for the user when the run starts."""
        best = best_of(self.evaluations, self._policy.by)
        if best is None or not self._policy.keep_best or best.step == self.best:
            return []
        return [f"step {best.step} was the best so far, but its checkpoint is gone: the best of the others is kept"]

    @property
    def is_over(self) -> bool:
        """Whether there were as many evaluations without a better one as the run waits for."""
        best, patience = best_of(self.evaluations, self._policy.by), self._policy.patience
        if best is None or patience is None:
            return False
        return len(self.evaluations) - 1 - self.evaluations.index(best) >= patience


def digest_of_held_out(held_out: Sequence[Samples[Any]]) -> str:
    """Return the sha256, hexadecimal, of what decides which held-out samples there are, and what their loss is."""
    return digest_of(
        [
            [part.corpora.sha256, settings.objective_sha256, settings.seed, settings.kind_of(0), settings.samples_of(0)]
            for part in held_out
            for settings in [part.settings]
        ]
    )
