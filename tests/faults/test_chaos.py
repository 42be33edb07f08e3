"""Training that is killed two hundred times."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t5g2convert.errors import CheckpointError
from tests.adaptation.runs import SHARD, write_checkpoint
from tests.faults.chaos import EVERY, check_killed

KILLS = 200


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of its steps 2 and 4, killed in step 6."""
    for step in (EVERY, 2 * EVERY):
        write_checkpoint(tmp_path / f"checkpoints/step-{step:08d}", {"model.decoder.norm.weight": torch.ones(4)}, step)
    (tmp_path / "metrics.jsonl").write_text("{}\n" * (2 * EVERY + 1) + "{")
    return tmp_path


def test_a_lost_or_damaged_checkpoint_is_found(run: Path) -> None:
    assert check_killed(run, before=EVERY) == 2 * EVERY
    with pytest.raises(AssertionError, match="the newest checkpoint was 6, and is 4"):
        check_killed(run, before=3 * EVERY)
    (run / "metrics.jsonl").write_text("{}\n" * (3 * EVERY))
    assert check_killed(run, before=0) == 2 * EVERY
    (run / "metrics.jsonl").write_text("{}\n" * (4 * EVERY + 1))
    with pytest.raises(AssertionError, match="9 steps are logged, but the newest checkpoint is 4"):
        check_killed(run, before=0)
    (run / "metrics.jsonl").unlink()
    shard = run / f"checkpoints/step-{EVERY:08d}" / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="its sha256 differs"):
        check_killed(run, before=0)


@pytest.mark.slow
def test_training_that_is_killed_loses_nothing_but_unfinished_steps() -> None:
    # In a process of its own, which forks: this one may have threads.
    command = [sys.executable, "-m", "tests.faults.chaos", "--kills", str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        rf"chaos: {KILLS} kills, (\d+) in a save, 0 checkpoints lost; (\d+) runs ended as if never killed\n",
        done.stdout,
    )
    assert found is not None, done.stdout
    assert int(found[1]) > 0
    assert int(found[2]) > 2
