"""Short runs of fine-tuning in this process, compared with plain torch, and requests that are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import t5g2convert.adaptation.finetune as finetune_module
from t5g2convert import verify
from t5g2convert.adaptation.adapt import adapt
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.rows import PairRow
from t5g2convert.adaptation.finetune import FinetuneRequest, finetune, prepare
from t5g2convert.adaptation.finetune_options import FinetuneOptions
from t5g2convert.adaptation.merge import merge
from t5g2convert.adaptation.pairs.preflight import with_steps
from t5g2convert.adaptation.train import checkpoints, distributed, evaluation
from t5g2convert.adaptation.train.checkpoint_manifest import complete_checkpoints
from t5g2convert.adaptation.train.evaluation_log import Evaluation, Measure, Scores, best_of
from t5g2convert.adaptation.train.history import read_history
from t5g2convert.adaptation.train.loss import IDLE_PIXELS, IGNORED, PIXELS
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.errors import CheckpointError, DataError, T5g2Error, UsageError
from t5g2convert.publish.card import model_card
from tests.adaptation.adapters import write_adapter
from tests.adaptation.finetunings import finetune_here, finetune_request
from tests.adaptation.trainings import request_of, run, settings_of, steps_of, tensors_of

pytestmark = pytest.mark.usefixtures("one_process")

Names = dict[str, Tensor]


def changed(request: FinetuneRequest, **changes: Any) -> FinetuneRequest:
    return replace(request, options=request.options.replace(**changes))


# What is learnt


def plain_run(request: FinetuneRequest, rates: dict[str, float] | None = None) -> tuple[Names, list[float]]:
    """Train with transformers and a plain loop, one pair at a time, and return the values and losses of the steps."""
    from transformers import T5Gemma2ForConditionalGeneration

    from t5g2convert.adaptation.train.model import names_on_disk, parts_of
    from t5g2convert.checkpoint.folder import open_checkpoint

    prepared = prepare(request)
    samples, options = prepared.samples, request.options
    model = T5Gemma2ForConditionalGeneration.from_pretrained(request.model, dtype=torch.float32).train()
    names = names_on_disk(model, open_checkpoint(request.model))
    parts = parts_of(open_checkpoint(request.model))
    trained = {names[name]: each for name, each in model.named_parameters() if parts[names[name]] != "vision"}
    groups = [
        {"params": [each], "lr": (rates or {}).get(parts[name], options.lr)} for name, each in sorted(trained.items())
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), eps=options.eps, weight_decay=0.0)
    losses = []
    for step in range(options.steps):
        total, count = torch.zeros(()), 0
        for number in range(step * options.batch_pairs, (step + 1) * options.batch_pairs):
            pair = samples.pair(number)
            source, target = (torch.from_numpy(each.astype(np.int64))[None] for each in (pair.source, pair.target))
            batch = samples[MicroBatch(step, (number,), (True,))]
            pixels = {PIXELS: batch[PIXELS]} if pair.images else {}
            found = model(input_ids=source, attention_mask=torch.ones_like(source), labels=target, **pixels)
            total = total + found.loss * target.shape[1]
            count += target.shape[1]
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {name: each.detach() for name, each in trained.items()}, losses


@pytest.mark.parametrize("rates", [{}, {"encoder": 1e-3, "decoder": 2e-3, "projector": 5e-3}])
def test_steps_equal_those_of_a_plain_loop_with_transformers(
    rates: dict[str, float], small: Path, pairs: Path, tmp_path: Path
) -> None:
    # With the default epsilon, AdamW makes a visible step from the rounding of a gradient that is nearly 0.
    options = {"eps": 1e-5, **{f"lr_{part}": rate for part, rate in rates.items()}}
    request = finetune_request(
        small, pairs, tmp_path / "run", steps=3, warmup=0, lr_floor=1.0, save_every=1, micro_batch=3, **options
    )
    expected, losses = plain_run(request, rates)
    _, steps = finetune_here(request)
    assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-5)
    assert {name for step in steps for name in step.tasks} == {"pairs", "images"}
    found = tensors_of(tmp_path / "run", 3)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).abs().max() < 1e-5, name


def test_a_batch_has_the_pairs_as_they_are_packed(small: Path, pairs: Path, tmp_path: Path) -> None:
    samples = prepare(finetune_request(small, pairs, tmp_path / "run")).samples
    tokens = samples.tokens
    for number in range(40):
        pair = samples.pair(number)
        batch = samples[MicroBatch(0, (number, (number + 1) % 40), (True, False))]
        source, target = pair.source.tolist(), pair.target.tolist()
        assert batch["input_ids"][0, : len(source)].tolist() == source
        assert batch["attention_mask"][0].tolist() == [1] * len(source) + [0] * (
            batch["input_ids"].shape[1] - len(source)
        )
        assert batch["decoder_input_ids"][0, : len(target)].tolist() == [tokens.bos, *target[:-1]]
        assert [label for label in batch["labels"][0].tolist() if label != IGNORED] == target
        assert (batch["labels"][1] == IGNORED).all()
        assert batch["tasks"].tolist()[0] == bool(pair.images)
        size = samples.size(0, number)
        assert (size.encoder, size.labels, size.images) == (len(source), len(target), len(pair.images))


def test_pixels_of_a_mixed_batch_are_those_of_its_images_in_order(small: Path, pairs: Path, tmp_path: Path) -> None:
    samples = prepare(finetune_request(small, pairs, tmp_path / "run")).samples
    numbers = sorted(range(40), key=lambda number: -len(samples.pair(number).images))
    chosen = (numbers[0], numbers[-1], numbers[1])
    assert [len(samples.pair(number).images) for number in chosen] == [2, 0, 1]
    pixels = samples[MicroBatch(0, chosen, (True,) * 3)][PIXELS]
    alone = [samples[MicroBatch(0, (number,), (True,))][PIXELS] for number in (chosen[0], chosen[2])]
    assert torch.equal(pixels, torch.cat(alone))
    text = samples[MicroBatch(0, (numbers[-1],), (True,))]
    assert not text.keys() & {PIXELS, IDLE_PIXELS}
    assert samples[MicroBatch(0, (numbers[-1],), (True,), has_images=True)][IDLE_PIXELS].abs().sum() == 0


def test_all_passes_of_a_step_have_images_where_one_process_has(small: Path, pairs: Path, tmp_path: Path) -> None:
    request = finetune_request(small, pairs, tmp_path / "run", micro_batch=1)
    samples = prepare(request).samples
    ranks = [list(samples.order(request.options, rank=rank, world=2)) for rank in range(2)]
    differ = 0
    for one, other in zip(*ranks, strict=True):
        own = [any(samples.pair(i).images for i in place.samples) for place in (one, other)]
        assert one.has_images == other.has_images == any(own)
        differ += own[0] != own[1]
    assert differ


# Held-out pairs


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list of held-out losses, which replace those that are computed."""
    wanted: list[float] = []
    compute = evaluation.evaluate

    def evaluate(*arguments: Any, step: int, **options: Any) -> Evaluation:
        found = compute(*arguments, step=step, **options)
        loss = wanted[step // 2]
        return replace(found, tasks=dict.fromkeys(found.tasks, loss))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return wanted


def held_out(small: Path, pairs: Path, run: Path, **changes: Any) -> FinetuneRequest:
    return finetune_request(small, pairs, run, **{"eval_pairs": 5, "eval_every": 2, "save_every": 4, **changes})


def test_held_out_pairs_are_evaluated_and_never_read(
    small: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = held_out(small, pairs, tmp_path / "run", steps=10, eval_every=5)
    prepared = prepare(request)
    (part,) = prepared.held_out
    out = {part.sampler.pair(i)[1] for i in range(part.settings.samples_of(0))}
    assert len(out) == 5
    trained = {prepared.samples.sampler.pair(i)[1] for i in range(70)}
    assert trained == set(range(40)) - out
    outcome, _ = finetune_here(request)
    assert [each.step for each in outcome.evaluations] == [0, 5, 10]
    labels = sum(len(part.pair(i).target) for i in range(5))
    assert sum(outcome.evaluations[0].labels.values()) == labels


def test_pairs_of_their_own_are_evaluated(small: Path, pairs: Path, tmp_path: Path) -> None:
    outcome, _ = finetune_here(finetune_request(small, pairs, tmp_path / "run", eval=pairs, eval_samples=9))
    packed = Packed.open(pairs)
    assert 0 < sum(outcome.evaluations[0].labels.values()) < sum(len(pair.target) for pair in packed.pairs)
    assert outcome.evaluations[-1].loss < outcome.evaluations[0].loss


def test_corpora_have_their_own_held_out_pairs_and_losses(small: Path, pairs: Path, tmp_path: Path) -> None:
    pack(small / "model", tmp_path / "two", [PairRow(f"{n}", f"Say {n}", str(n)) for n in range(10)])
    listed = tmp_path / "corpora.yaml"
    listed.write_text(f"corpora: [{{data: {pairs}, weight: 3}}, {{data: two, weight: 1}}]\n")
    request = finetune_request(small, listed, tmp_path / "run", eval_pairs=8, steps=8)
    prepared = prepare(request)
    assert [part.settings.samples_of(0) for part in prepared.held_out] == [6, 2]
    drawn = [prepared.samples.sampler.pair(i) for i in range(56)]
    assert sum(corpus == 0 for corpus, _ in drawn) == 42
    for number, part in enumerate(prepared.held_out):
        out = {part.sampler.pair(i)[1] for i in range(part.settings.samples_of(0))}
        assert not out & {pair for corpus, pair in drawn if corpus == number}
    outcome, _ = finetune_here(request)
    assert outcome.evaluations[0].corpora.keys() == {str(pairs), "two"}


def test_the_best_checkpoint_is_kept_and_exported(
    small: Path, pairs: Path, tmp_path: Path, losses: list[float]
) -> None:
    losses += [0.1, 3.0, 2.0, 1.0, 2.0, 4.0, 4.0]
    request = held_out(small, pairs, tmp_path / "run", steps=12, keep=1, export=True)
    outcome, _ = finetune_here(request)
    # Step 6 is not one of --save-every; the loss before the first step does not count.
    assert (outcome.best, outcome.stopped, outcome.checkpoint.name) == (6, None, "step-00000006")
    assert list(complete_checkpoints(tmp_path / "run")) == [6, 12]
    manifest = read_manifest(tmp_path / "run/model")
    assert manifest.adaptation is not None
    assert (manifest.adaptation.steps, manifest.adaptation.checkpoints) == (6, [6])
    assert verify(tmp_path / "run/model", small / "model").passed
    assert outcome.to_json()["best"] == 6


def test_without_keep_best_the_last_checkpoint_is_exported(
    small: Path, pairs: Path, tmp_path: Path, losses: list[float]
) -> None:
    losses += [3.0, 1.0, 2.0]
    outcome, _ = finetune_here(held_out(small, pairs, tmp_path / "run", keep=1, keep_best=False))
    assert (outcome.best, outcome.checkpoint.name) == (None, "step-00000004")
    assert list(complete_checkpoints(tmp_path / "run")) == [4]


def test_patience_ends_a_run_and_resuming_trains_no_further(
    small: Path, pairs: Path, tmp_path: Path, losses: list[float]
) -> None:
    losses += [5.0, 3.0, 2.0, 2.0, 2.5, 1.0, 1.0]
    request = held_out(small, pairs, tmp_path / "run", steps=12, patience=2, export=True)
    outcome, steps = finetune_here(request)
    assert (outcome.stopped, outcome.best, len(steps)) == (8, 4, 8)
    assert list(complete_checkpoints(tmp_path / "run")) == [4, 8]
    again, more = finetune_here(changed(request, resume=True))
    assert (again.start, again.stopped, again.best, more) == (8, 8, 4, [])
    assert again.exported is not None
    assert again.exported.before
    # More patience continues, as if the run had never ended.
    longer, more = finetune_here(changed(request, resume=True, patience=3))
    assert (longer.start, longer.best, [step.step for step in more]) == (8, 10, [9, 10, 11, 12])
    whole, _ = finetune_here(replace(changed(request, patience=None, export=False), run=tmp_path / "whole"))
    assert whole.best == 10
    one, other = (tensors_of(tmp_path / name, 12) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_that_ends_a_run_is_made_if_none_is_due(
    small: Path, pairs: Path, tmp_path: Path, losses: list[float]
) -> None:
    losses += [5.0, 3.0, 3.5, 4.0]
    request = held_out(small, pairs, tmp_path / "run", steps=12, patience=2, save_every=100)
    outcome, _ = finetune_here(request)
    assert (outcome.stopped, outcome.best) == (6, 2)
    assert list(complete_checkpoints(tmp_path / "run")) == [2, 6]


def test_a_run_that_dies_before_its_best_checkpoint_is_saved_is_resumed_exactly(
    small: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = held_out(small, pairs, tmp_path / "run", steps=6)
    save = checkpoints.save

    def die(*arguments: Any, **options: Any) -> Path:
        if arguments[2] == 6:
            raise DataError("died")
        return save(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", die)
        with pytest.raises(DataError, match="died"):
            finetune_here(request)
    outcome, _ = finetune_here(changed(request, resume=True))
    whole, _ = finetune_here(replace(request, run=tmp_path / "whole"))
    assert (outcome.best, outcome.evaluations) == (whole.best, whole.evaluations)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    one, other = (tensors_of(tmp_path / name, 6) for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_is_chosen_among_checkpoints_that_are_there(
    small: Path, pairs: Path, tmp_path: Path, losses: list[float]
) -> None:
    losses += [5.0, 1.0, 3.0, 4.0]
    request = held_out(small, pairs, tmp_path / "run", keep=1, keep_best=False)
    finetune_here(request)
    notes: list[str] = []
    more = changed(request, resume=True, steps=6, keep_best=True, export=True)
    outcome = finetune(more, begun=lambda found, _: notes.extend(found), report=lambda _: None)
    # The checkpoint of step 2 was not kept; that of step 4 was.
    assert (outcome.best, outcome.checkpoint.name) == (4, "step-00000004")
    assert any("step 2 was the best so far, but its checkpoint is gone" in note for note in notes)
    manifest = read_manifest(tmp_path / "run/model")
    assert manifest.adaptation is not None
    assert manifest.adaptation.checkpoints == [4]


@pytest.mark.parametrize("other", [{"eval_samples": 7}, {"eval": None}])
def test_evaluations_of_other_pairs_are_never_compared(
    other: dict[str, Any], small: Path, pairs: Path, tmp_path: Path, losses: list[float]
) -> None:
    losses += [5.0, 3.0, 2.0, 1.0]
    request = held_out(small, pairs, tmp_path / "run", eval=pairs, eval_samples=6)
    finetune_here(request)
    with pytest.raises(UsageError, match="has evaluations of other held-out pairs"):
        finetune_here(changed(request, resume=True, steps=6, **other))
    # Without a decision they are only listed; the learning rate does not matter.
    how: dict[str, Any] = {"keep_best": False, "lr": 1e-3, "change": True}
    outcome, _ = finetune_here(changed(request, resume=True, steps=6, **other, **how))
    assert [found.step for found in outcome.evaluations] == [0, 2, 4, 6]
    assert len({found.data for found in outcome.evaluations}) == 2


def test_the_best_may_be_that_of_a_score_and_the_loss_decides_between_equal_ones() -> None:
    scores = [None, (0.0, 9.0, 0.2), (0.5, 1.0, 0.1), (0.5, 3.0, 0.3)]
    found = [
        Evaluation(step, {"pairs": 5.0 - step}, {"pairs": 0.0}, {"pairs": 1}, {}, score and Scores(1, *score))
        for step, score in enumerate(scores, 1)
    ]
    ways: list[Measure] = ["loss", "exact", "chrf", "rouge-l"]
    best = [best_of(found, by) for by in ways]
    assert [each and each.step for each in best] == [4, 4, 2, 4]
    first = best_of(found[:3], "exact")
    assert first is not None
    assert first.step == 3


def test_a_run_keeps_the_checkpoint_with_the_best_score(
    small: Path, pairs: Path, tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses += [5.0, 3.0, 2.0, 1.0]
    scores = iter([Scores(1, 0.0, 0.0, 0.0), Scores(1, 1.0, 1.0, 1.0), *[Scores(1, 0.5, 1.0, 1.0)] * 2])
    monkeypatch.setattr(finetune_module, "generate_and_score", lambda *_, **__: next(scores))
    request = held_out(small, pairs, tmp_path / "run", steps=6, generate_eval=True, best="exact", patience=1)
    outcome, _ = finetune_here(request)
    assert (outcome.best, outcome.stopped) == (2, 4)
    again, _ = finetune_here(changed(request, resume=True))
    assert (again.best, again.stopped) == (2, 4)


@pytest.mark.parametrize(
    ("changes", "missing"), [({"lora": 2}, "peft"), ({"generate_eval": True}, "sacrebleu, rouge_score")]
)
def test_a_missing_library_is_named_before_the_run_starts(
    changes: dict[str, Any], missing: str, small: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = distributed.find_spec
    absent = ("peft", "sacrebleu", "rouge_score")
    monkeypatch.setattr(distributed, "find_spec", lambda name: None if name in absent else there(name))
    with pytest.raises(UsageError, match=f"training needs {missing}: pip install"):
        finetune_here(held_out(small, pairs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_is_never_the_best() -> None:
    losses = [float("nan"), 2.0, float("nan"), 3.0]
    found = [Evaluation(step, {"pairs": loss}, {"pairs": loss}, {"pairs": 1}) for step, loss in enumerate(losses, 1)]
    best = best_of(found)
    assert best is not None
    assert best.step == 2


# Distillation


def test_a_teacher_predicts_targets_from_source_and_target_as_one_text(
    small: Path, pairs: Path, tmp_path: Path
) -> None:
    samples = prepare(finetune_request(small, pairs, tmp_path / "run", kd=small / "parent")).samples
    samples.settings = samples.settings.model_copy(update={"teacher": "0" * 64})
    number = next(i for i in range(40) if not samples.pair(i).images)
    pictured = next(i for i in range(40) if samples.pair(i).images)
    batch = samples[MicroBatch(0, (number, pictured), (True, True))]
    pair, bos = samples.pair(number), samples.tokens.bos
    source, target = pair.source.tolist(), pair.target.tolist()
    text = batch["raw_ids"][0][batch["raw_mask"][0].bool()].tolist()
    assert text == source + target
    assert text.count(bos) == 1
    # Each position is that of the token before the label; the final eos is learnt from the text.
    at = batch["teacher_positions"][0, : len(target)].tolist()
    assert [text[position + 1] for position in at[:-1]] == target[:-1]
    assert at[-1] == -1
    assert (batch["teacher_positions"][1] == -1).all()


def test_the_loss_of_a_taught_target_is_the_divergence_from_the_teachers_distribution(
    small: Path, pairs: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, T5Gemma2ForConditionalGeneration

    request = finetune_request(small, pairs, tmp_path / "run", kd=small / "parent", steps=1, batch_pairs=12)
    _, (step,) = finetune_here(request)
    samples = prepare(changed(request, resume=True)).samples
    student = T5Gemma2ForConditionalGeneration.from_pretrained(small / "model", dtype=torch.float32).eval()
    teacher = AutoModelForImageTextToText.from_pretrained(small / "parent", dtype=torch.float32).eval()
    total, count = 0.0, 0
    for number in range(12):
        pair = samples.pair(number)
        if pair.images:
            continue
        source, target = (torch.from_numpy(each.astype(np.int64))[None] for each in (pair.source, pair.target))
        with torch.no_grad():
            ours = student(input_ids=source, attention_mask=torch.ones_like(source), labels=target).logits
            theirs = teacher(input_ids=torch.cat([source, target], dim=1)).logits
        ours = ours[0].log_softmax(-1)
        theirs = theirs[0, source.shape[1] - 1 : -1, : ours.shape[-1]].log_softmax(-1)
        total += float((theirs.exp() * (theirs - ours))[:-1].sum() - ours[-1, target[0, -1]])
        count += target.shape[1]
    assert step.tasks["pairs"] == pytest.approx(total / count, rel=1e-4)


def test_distillation_trains_and_names_the_teacher(small: Path, pairs: Path, tmp_path: Path) -> None:
    request = finetune_request(small, pairs, tmp_path / "run", kd=small / "parent", export=True)
    outcome, steps = finetune_here(request)
    plain, other = finetune_here(replace(changed(request, kd=None), run=tmp_path / "plain"))
    assert steps[0].loss != other[0].loss
    assert outcome.settings.to_json()["teacher"] is not None
    assert plain.settings.to_json()["teacher"] is None
    record = read_manifest(tmp_path / "run/model").adaptation
    assert record is not None
    assert record.settings.teacher == outcome.settings.to_json()["teacher"]


# Records


def test_epochs_become_steps_and_run_json_names_the_objective(small: Path, pairs: Path, tmp_path: Path) -> None:
    request = finetune_request(small, pairs, tmp_path / "run", steps=0, epochs=0.5, eval_pairs=4)
    outcome, steps = finetune_here(request)
    assert len(steps) == outcome.settings.steps == 3
    document = json.loads((tmp_path / "run/run.json").read_text())
    assert (document["settings"]["objective"], document["settings"]["steps"]) == ("pairs", 3)
    assert read_history(tmp_path / "run").settings.to_json() == outcome.settings.to_json()
    assert finetune_here(changed(request, resume=True))[1] == []


@pytest.mark.parametrize(
    ("epochs", "pairs", "batch", "steps"), [(1.1, 100, 10, 11), (3, 40, 7, 18), (0.3, 10, 1, 3), (1e-9, 40, 7, 1)]
)
def test_epochs_are_taken_as_they_are_written(epochs: float, pairs: int, batch: int, steps: int) -> None:
    assert with_steps(FinetuneOptions(lr=1e-3, batch_pairs=batch), float(epochs), pairs).steps == steps


def test_a_run_of_one_objective_is_not_resumed_with_another(small: Path, pairs: Path, tmp_path: Path) -> None:
    finetune_here(finetune_request(small, pairs, tmp_path / "pairs"))
    with pytest.raises(UsageError, match="cannot be resumed with these options"):
        run(replace(request_of(small, tmp_path / "pairs", settings_of(), resume=True)))
    run(request_of(small, tmp_path / "ul2", settings_of()))
    with pytest.raises(UsageError, match="cannot be resumed with these options"):
        finetune_here(finetune_request(small, pairs, tmp_path / "ul2", resume=True))


def test_a_model_trained_with_ul2_before_keeps_its_record(small: Path, pairs: Path, tmp_path: Path) -> None:
    adapted, _ = run(request_of(small, tmp_path / "ul2", settings_of(), export=True))
    assert adapted.exported is not None
    request = finetune_request(small, pairs, tmp_path / "run", export=True)
    finetune_here(replace(request, model=adapted.exported.output))
    before = read_manifest(tmp_path / "ul2/model").adaptation
    record = read_manifest(tmp_path / "run/model").adaptation
    assert record is not None
    assert before is not None
    assert record.before is not None
    assert record.before.document() == before.document()
    assert record.ul2 is not None
    assert record.ul2.mixture.first_sentinel == before.settings.document()["mixture"]["first_sentinel"]
    assert verify(tmp_path / "run/model", tmp_path / "ul2/model").passed
    # Training with UL2 may go on, with the same sentinels.
    again = replace(request_of(small, tmp_path / "again", settings_of(steps=1)), model=tmp_path / "run/model")
    adapt(again, begun=lambda notes: None, report=lambda metrics: None)


def test_a_merged_model_that_is_trained_again_keeps_all_records(small: Path, pairs: Path, tmp_path: Path) -> None:
    finetune_here(finetune_request(small, pairs, tmp_path / "first", steps=1, export=True))
    first = tmp_path / "first/model"
    adapter = write_adapter(first, tmp_path / "adapter", target_modules=r".*decoder.*q_proj")
    merge(first, adapter, tmp_path / "merged")
    request = finetune_request(small, pairs, tmp_path / "second", steps=1, export=True)
    finetune_here(replace(request, model=tmp_path / "merged"))
    source, record = read_manifest(tmp_path / "merged"), read_manifest(tmp_path / "second/model").adaptation
    assert record is not None
    assert (record.before, record.merged) == (source.adaptation, source.merged)
    assert verify(tmp_path / "second/model", tmp_path / "merged").passed
    assert "| merged before | a LoRA adapter, into " in model_card(
        tmp_path / "second/model", repo="", source_card=None, existing=None, mode="replace"
    )
    # And so does a training with UL2.
    again = replace(request_of(small, tmp_path / "ul2", settings_of(steps=1), export=True), model=tmp_path / "merged")
    adapt(again, begun=lambda notes: None, report=lambda metrics: None)
    ul2 = read_manifest(tmp_path / "ul2/model").adaptation
    assert ul2 is not None
    assert (ul2.before, ul2.merged) == (source.adaptation, source.merged)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "expected either --steps or --epochs"),
        ({"epochs": 1.0}, "expected either --steps or --epochs"),
        ({"patience": 1}, "--patience needs held-out pairs"),
        ({"generate_eval": True}, "--generate-eval needs held-out pairs"),
        ({"best": "exact", "eval_pairs": 2}, "--best exact needs --generate-eval"),
        ({"eval_pairs": 40}, "--eval-pairs leaves none of the 40 pairs of data to train"),
        ({"from_step": 2}, "--from needs --resume"),
        ({"generate_eval": True, "eval_pairs": 2, "attention": "blocks"}, "--attention"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, small: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(finetune_request(small, pairs, tmp_path / "run", **changes))


def test_data_without_pairs_is_refused(small: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no pairs of an input and a target"):
        prepare(finetune_request(small, small / "data", tmp_path / "run"))
    with pytest.raises(DataError, match="has no pairs to evaluate"):
        prepare(finetune_request(small, pairs, tmp_path / "run", eval=small / "data"))


def test_pairs_beyond_the_models_positions_are_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "model", tmp_path / "longer")
    config = json.loads((small / "model/config.json").read_text())
    most = config["decoder"]["max_position_embeddings"]
    for stack in (config["encoder"]["text_config"], config["decoder"]):
        stack["max_position_embeddings"] = 2 * most
    (tmp_path / "longer/config.json").write_text(json.dumps(config))
    texts = [("short", "target"), ("x" * (most + 1), "target"), ("short", "y" * (most + 1))]
    documents = [PairRow(f"{n}", source, target) for n, (source, target) in enumerate(texts)]
    pack(tmp_path / "longer", tmp_path / "data", documents)
    with pytest.raises(DataError, match=r"[12] pair\(s\) exceed the model's .* first pair 1") as caught:
        prepare(finetune_request(small, tmp_path / "data", tmp_path / "run"))
    assert caught.value.details


def test_a_teacher_with_too_few_positions_or_of_another_kind_is_refused(
    small: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="cannot be distilled"):
        prepare(finetune_request(small, pairs, tmp_path / "run", kd=small / "model"))


def test_settings_that_may_not_change_are_refused_when_a_run_resumes(small: Path, pairs: Path, tmp_path: Path) -> None:
    request = finetune_request(small, pairs, tmp_path / "run", steps=2, eval_pairs=4)
    finetune_here(request)
    for changes, name in (({"eval_pairs": 5}, "eval_pairs"), ({"seed": 1}, "seed")):
        with pytest.raises(T5g2Error, match=name):
            finetune_here(changed(request, resume=True, change=True, **changes))
    outcome, _ = finetune_here(changed(request, resume=True, change=True, steps=4, lr_encoder=1e-3, batch_pairs=3))
    assert outcome.settings.steps == 4
    assert isinstance(request.options, FinetuneOptions)


@pytest.mark.parametrize("reduce", ["pass", "step"])
def test_pairs_of_both_kinds_train_in_bfloat16(reduce: str, small: Path, pairs: Path, tmp_path: Path) -> None:
    # The projector's gradient begins in the first pass of a step or not at all: FSDP sums gradients of one dtype.
    changes = {"precision": "bfloat16", "micro_batch": 1, "reduce": reduce, "eval_pairs": 6}
    _, steps = finetune_here(finetune_request(small, pairs, tmp_path / "run", steps=6, **changes))
    assert steps[-1].loss < steps[0].loss
