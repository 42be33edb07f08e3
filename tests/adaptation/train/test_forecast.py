"""What a run is said to do is what it does."""

import json
from collections import Counter
from pathlib import Path

from t5g2convert.adaptation.train.metrics import read_metrics
from tests.adaptation.trainings import RUN_OPTIONS, adapt


def test_a_dry_run_tells_what_the_run_then_does(small: Path, trained: Path, tmp_path: Path) -> None:
    done = adapt(small, tmp_path / "run", *RUN_OPTIONS, "--micro-batch", "8", "--devices", "4", "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert not (tmp_path / "run").exists()
    metrics = read_metrics(trained / "run/metrics.jsonl")
    text = [step for step in metrics if step.kind == "text"]
    assert (told["steps"], told["image_steps"]) == (len(metrics), len(metrics) - len(text))
    block = sum(task["weight"] for task in told["tasks"])
    blocks, rest = divmod(len(text) * told["samples"], block)
    assert blocks
    assert rest == 0
    labels: Counter[str] = Counter()
    for step in text:
        labels.update(step.labels)
    assert labels == {task["name"]: blocks * task["weight"] * task["labels"] for task in told["tasks"]}
    read = sum(blocks * task["weight"] * (task["encoder"] + task["labels"]) for task in told["tasks"])
    assert sum(step.tokens for step in text) == read
    taken = sum(blocks * task["weight"] * task["raw"] for task in told["tasks"])
    index = json.loads((small / "data/index.json").read_text())
    assert told["corpus"] == index["text"]["tokens"]
    assert told["epochs"] * told["corpus"] >= taken > told["epochs"] * told["corpus"] / 2
    most = max(task["sentinels"] for task in told["tasks"])
    assert told["sentinels"][0] - told["sentinels"][1] + 1 == most
    assert told["memory"]["total"] == sum(told["memory"][part] for part in ("states", "gathered", "inputs", "softmax"))
    assert told["operations"] > 0


def test_a_dry_run_is_a_table_for_people(small: Path, tmp_path: Path) -> None:
    done = adapt(small, tmp_path / "run", *RUN_OPTIONS, "--dry-run")
    for line in ("spans-3-15", "prefix", "steps      60 of 8 samples, 15 of them", "tokens, read", "(estimate)"):
        assert line in done.stdout
    assert not (tmp_path / "run").exists()
