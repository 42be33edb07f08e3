"""Held-out losses: with the encoder hidden those of the parent, and lower with every checkpoint of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForConditionalGeneration

from t5g2convert.adaptation.train.evaluation import Evaluation, evaluate, hide_encoder
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.dataset import Place, task_names
from t5g2convert.errors import CheckpointError, UsageError
from tests.adaptation.trainings import TASKS

SAMPLES = 16


@pytest.fixture(scope="module")
def settings(trained: Path) -> Settings:
    """Those of the run that tests share."""
    told = json.loads((trained / "run/run.json").read_text())["settings"]
    return Settings.model_validate(told)


@pytest.fixture(scope="module")
def before(small: Path, settings: Settings) -> Evaluation:
    """The converted model, which was not trained."""
    return evaluate(small / "model", small / "data", settings, samples=SAMPLES)


def checkpoint(trained: Path, step: int) -> Path:
    return trained / f"run/checkpoints/step-{step:08d}"


@torch.no_grad()
def test_with_the_encoder_hidden_the_losses_are_the_parents(
    small: Path, settings: Settings, before: Evaluation
) -> None:
    parent = Gemma3ForConditionalGeneration.from_pretrained(small / "parent", dtype=torch.float32).eval()
    batch = prepare(small / "model", small / "data", settings).samples[
        Place(0, tuple(range(SAMPLES)), (True,) * SAMPLES)
    ]
    logits = parent(input_ids=batch["decoder_input_ids"], attention_mask=batch["decoder_attention_mask"]).logits
    logits = logits[..., : rows_of_model(small)]
    for number, name in enumerate(task_names(settings)[:-1]):
        of_task = batch["tasks"] == number
        labels = batch["labels"][of_task]
        loss = torch.nn.functional.cross_entropy(logits[of_task].flatten(0, 1), labels.flatten(), ignore_index=-100)
        assert before.hidden[name] == pytest.approx(float(loss), rel=1e-4)
        assert before.tasks[name] != pytest.approx(float(loss), rel=1e-4)
        assert before.labels[name] == int((labels != -100).sum())


def rows_of_model(small: Path) -> int:
    """Rows of the converted table, which the parent's may be longer than."""
    return int(json.loads((small / "model/config.json").read_text())["vocab_size"])


def test_the_means_are_over_labels() -> None:
    found = Evaluation({"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 8.0}, {"a": 3, "b": 1})
    assert (found.loss, found.hidden_loss, found.gain) == (1.75, 3.5, 1.75)


def test_the_size_of_a_pass_does_not_matter(small: Path, settings: Settings, before: Evaluation) -> None:
    again = evaluate(small / "model", small / "data", settings, samples=SAMPLES, micro=3)
    assert again.labels == before.labels
    assert again.labels.keys() == TASKS
    assert again.tasks == pytest.approx(before.tasks, rel=1e-5)
    assert again.hidden == pytest.approx(before.hidden, rel=1e-5)


def test_a_checkpoint_is_judged_in_place_of_its_model(
    small: Path, trained: Path, settings: Settings, before: Evaluation
) -> None:
    losses = [before.loss]
    for step in (20, 60):
        found = evaluate(
            small / "model", small / "data", settings, samples=SAMPLES, checkpoint=checkpoint(trained, step)
        )
        losses.append(found.loss)
    assert losses == sorted(losses, reverse=True)
    exported = evaluate(trained / "run/model", small / "data", settings, samples=SAMPLES)
    # The export is bfloat16, as its source.
    assert exported.loss == pytest.approx(losses[-1], rel=1e-2)
    assert exported.loss != before.loss


def test_hiding_leaves_the_samples_as_they_are(small: Path, settings: Settings) -> None:
    batch = prepare(small / "model", small / "data", settings).samples[Place(0, (0, 1), (True, True))]
    hidden = hide_encoder(batch)
    assert int(batch["attention_mask"].sum()) > int(hidden["attention_mask"].sum()) == 0
    assert all(torch.equal(hidden[name], batch[name]) for name in batch if name != "attention_mask")


def test_settings_without_text_are_refused(small: Path, settings: Settings) -> None:
    with pytest.raises(UsageError, match="has no samples of text"):
        evaluate(small / "model", small / "data", settings.model_copy(update={"image_every": 1}), samples=8)


@pytest.mark.parametrize("samples", [0, 4, -8, 8_000_000])
def test_samples_are_whole_blocks_and_never_repeated(samples: int, small: Path, settings: Settings) -> None:
    with pytest.raises(UsageError, match=rf"expected a multiple of 8 up to \d+ held-out samples, found {samples}"):
        evaluate(small / "model", small / "data", settings, samples=samples)


def test_a_checkpoint_of_another_model_is_refused(
    small: Path, trained: Path, settings: Settings, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small / "model", other)
    tensors = load_file(other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    config["decoder"]["num_hidden_layers"] = 1
    config["decoder"]["layer_types"] = config["decoder"]["layer_types"][:1]
    (other / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.decoder.layers.1.")}
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has 'model.decoder.layers.1.\S+' of shape .* not a tensor of"):
        evaluate(other, small / "data", settings, samples=SAMPLES, checkpoint=checkpoint(trained, 60))
