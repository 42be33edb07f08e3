import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t5g2convert import convert
from tests.adaptation.runs import write_checkpoint, write_run
from tests.cli.commandline import CommandLine


@pytest.fixture
def model(demo_source: Path, tmp_path: Path) -> Path:
    """Write a conversion, and next to it `run` with two checkpoints of one tensor."""
    model = tmp_path / "model"
    convert(demo_source, model, flush=False)
    write_run(tmp_path / "run", model, 2)
    for step in (1, 2):
        values = {"model.decoder.norm.weight": torch.full((48,), float(step))}
        write_checkpoint(tmp_path / f"run/checkpoints/step-{step:08d}", values, step)
    return model


def test_the_mean_is_written_and_reported(model: Path, t5g2: CommandLine, tmp_path: Path) -> None:
    arguments = ("average", tmp_path / "run", tmp_path / "out", "--model", model, "--last", "2")
    shown = t5g2(*arguments)
    assert shown.code == 0
    assert "wrote the mean of 2 checkpoint(s)" in shown.out
    refused = t5g2(*arguments, "--json")
    assert (refused.code, refused.error["message"]) == (5, "exists and is not empty")
    done = json.loads(t5g2(*arguments, "--json", "--overwrite", "--dtype", "float32").out)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert (done["checkpoints"], done["tensors"]) == (2, len(stored))
    assert stored["model.decoder.norm.weight"].tolist() == [1.5] * 48
    assert t5g2("verify", tmp_path / "out", "--source", model).code == 0
    assert t5g2("verify", tmp_path / "out", "--source", model).code == 0, "and again, with its record"


def test_the_model_is_read_from_the_run_and_the_mean_written_there(
    model: Path, t5g2: CommandLine, tmp_path: Path
) -> None:
    few = t5g2("average", tmp_path / "run")
    assert few.code == 3
    assert "has 2 checkpoints, but --last is 5" in few.err
    assert t5g2("average", tmp_path / "run", "--last", "2").code == 0
    assert (tmp_path / "run/average/t5g2.json").is_file()
    moved = model.rename(tmp_path / "moved")
    gone = t5g2("average", tmp_path / "run", tmp_path / "out", "--last", "2")
    assert (gone.code, "model no longer exists (pass the trained model with --model" in gone.err) == (2, True)
    assert t5g2("average", tmp_path / "run", tmp_path / "out", "--last", "2", "--model", moved).code == 0
