"""The forecast of a run, compared with the run."""

import json
from collections import Counter
from pathlib import Path

import pytest

from t5g2convert.adaptation.train.metrics import read_metrics
from tests.adaptation.trainings import RUN_OPTIONS, adapt


def test_a_dry_run_agrees_with_the_run(small: Path, trained: Path, tmp_path: Path) -> None:
    done = adapt(small, tmp_path / "run", *RUN_OPTIONS, "--micro-batch", "8", "--devices", "4", "--dry-run", "--json")
    forecast = json.loads(done.stdout)
    assert not (tmp_path / "run").exists()
    metrics = read_metrics(trained / "run/metrics.jsonl")
    text = [step for step in metrics if step.kind == "text"]
    assert (forecast["steps"], forecast["image_steps"]) == (len(metrics), len(metrics) - len(text))
    block = sum(task["weight"] for task in forecast["tasks"])
    blocks, rest = divmod(len(text) * forecast["samples"], block)
    assert blocks
    assert rest == 0
    labels: Counter[str] = Counter()
    for step in text:
        labels.update(step.labels)
    assert labels == {task["name"]: blocks * task["weight"] * task["labels"] for task in forecast["tasks"]}
    read = sum(blocks * task["weight"] * (task["encoder"] + task["labels"]) for task in forecast["tasks"])
    assert sum(step.tokens for step in text) == read
    taken = sum(blocks * task["weight"] * task["raw"] for task in forecast["tasks"])
    index = json.loads((small / "data/index.json").read_text())
    assert forecast["corpus"] == index["text"]["tokens"]
    assert forecast["epochs"] * forecast["corpus"] >= taken > forecast["epochs"] * forecast["corpus"] / 2
    most = max(task["sentinels"] for task in forecast["tasks"])
    assert forecast["sentinels"][0] - forecast["sentinels"][1] + 1 == most
    assert forecast["memory"]["total"] == sum(
        forecast["memory"][part] for part in ("states", "gathered", "inputs", "softmax", "gradient", "images")
    )
    assert forecast["operations"] > 0
    speed = forecast["throughput"]
    assert (speed["devices"], speed["machine"]["name"], speed["fits"]) == (4, "H100 SXM", True)
    assert speed["step"] == pytest.approx(sum(speed["seconds"].values()))
    tokens = sum(task["weight"] * (task["encoder"] + task["labels"]) for task in forecast["tasks"]) / block
    assert speed["tokens_per_second"] * speed["step"] == pytest.approx(tokens * forecast["samples"])


def test_a_dry_run_without_images_prints_its_steps(small: Path, tmp_path: Path) -> None:
    options = ("--lr", "1e-3", "--steps", "5", "--encoder-length", "64", "--decoder-length", "64")
    done = adapt(small, tmp_path / "run", *options, "--batch-tokens", "512", "--dry-run")
    assert "steps      5 of 8 samples\n" in done.stdout


def test_a_dry_run_prints_a_table(small: Path, tmp_path: Path) -> None:
    done = adapt(small, tmp_path / "run", *RUN_OPTIONS, "--dry-run")
    for line in (
        "spans-3-15",
        "prefix",
        "steps      60 of 8 samples, 15 of them",
        "tokens, read",
        "(estimate)",
        "tokens/s",
        "guesses",
    ):
        assert line in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_on_images_alone_has_no_expected_speed(small: Path, tmp_path: Path) -> None:
    options = (*RUN_OPTIONS, "--image-every", "1", "--dry-run")
    assert json.loads(adapt(small, tmp_path / "run", *options, "--json").stdout)["throughput"] is None
    assert "tokens/s" not in adapt(small, tmp_path / "run", *options).stdout
