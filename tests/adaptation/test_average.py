import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from t5g2convert import CheckpointError, Conversion, OutputError, UsageError, verify
from t5g2convert.adaptation.average import average
from t5g2convert.adaptation.export import export
from t5g2convert.adaptation.train import checkpoint_reader as reader
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.checkpoint.manifest import read_manifest
from tests.adaptation.runs import (
    FACTS,
    SETTINGS,
    SHARD,
    Tensors,
    text_only,
    trained_from,
    write_by_two,
    write_checkpoint,
    write_run,
)
from tests.conftest import TwinFolder
from tests.parity.elsewhere import change, copied, train, write_start


@dataclass(frozen=True)
class Run:
    """A run and its model."""

    folder: Path
    model: Path

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def average(self, last: int, output: Path, **options: Any) -> Conversion:
        return average(self.folder, output, last=last, **{"model": self.model, **options})


Runs = Callable[..., Run]


def first_layers(name: str) -> bool:
    """Return whether a tensor is in the first layers, or in no layer."""
    return text_only(name) and (".layers." not in name or ".layers.0." in name)


@pytest.fixture
def run_of(converted_twin: TwinFolder, tmp_path: Path) -> Runs:
    """Return a function that makes a run of a converted twin; by default each checkpoint has different values."""

    def make(name: str, count: int = 5, values: Tensors | None = None) -> Run:
        model = converted_twin(name)
        write_run(tmp_path / "run", model, 20 * count)
        for number in range(1, count + 1):
            tensors = trained_from(model, first_layers, seed=number) if values is None else values
            write_checkpoint(tmp_path / f"run/checkpoints/step-{number * 20:08d}", tensors, number * 20)
        return Run(tmp_path / "run", model)

    return make


@pytest.mark.parametrize("name", ["text-8", "text-float16", "text-float32"])
def test_the_mean_equals_numpys_rounded_once(
    name: str, run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(name, count=6)
    monkeypatch.setattr(reader, "BLOCK_ELEMENTS", 100)
    run.average(5, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    read = [CheckpointReader(run.checkpoint(step)) for step in (40, 60, 80, 100, 120)]
    assert len(read[0].names) > 20
    for tensor in read[0].names:
        mean = np.stack([each.read(tensor).numpy().astype(np.float64) for each in read]).mean(axis=0)
        stored = found[tensor]
        if stored.dtype == torch.bfloat16:
            # Exactly the nearer neighbour, by float64 arithmetic on both.
            near = mean.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int32)
            around = (near[..., None] + [-1, 0, 1]).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
            chosen = np.abs(around - mean[..., None]).argmin(axis=-1)
            expected = np.take_along_axis(around, chosen[..., None], axis=-1)[..., 0]
            assert np.array_equal(stored.double().numpy(), expected), tensor
        else:
            assert np.array_equal(stored.numpy(), mean.astype(stored.numpy().dtype)), tensor


def test_a_mean_just_above_the_midpoint_is_not_rounded_twice(run_of: Runs, tmp_path: Path) -> None:
    """The mean of two float32 neighbours around a bfloat16 midpoint is not a float32 value."""
    name = "model.decoder.norm.weight"
    run = run_of("text-8", count=2)
    for step, bits in ((20, 0x3F80_8000), (40, 0x3F80_8001)):
        shutil.rmtree(run.checkpoint(step))
        write_checkpoint(
            run.checkpoint(step), {name: torch.from_numpy(np.full(24, bits, np.uint32).view(np.float32))}, step
        )
    run.average(2, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")[name].view(torch.uint16)
    assert stored.tolist() == [0x3F81] * 24, "the middle itself would go to 0x3F80"


def test_the_mean_of_one_checkpoint_five_times_is_that_checkpoint(
    run_of: Runs, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    model = converted_twin("images-8")
    values = trained_from(model, first_layers)
    run = run_of("images-8", values=values)
    for dtype in ("keep", "float32"):
        run.average(5, tmp_path / dtype, dtype=dtype)
        export(model, CheckpointReader(run.checkpoint(100)), tmp_path / f"{dtype}-one", facts=FACTS, dtype=dtype)
        files = [tmp_path / folder / "model.safetensors" for folder in (dtype, f"{dtype}-one")]
        assert files[0].read_bytes() == files[1].read_bytes()
    found = load_file(tmp_path / "float32" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in values.items())


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes_by_one_process_or_two(
    run_of: Runs, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    run = run_of("text-8", count=2)
    run.average(2, tmp_path / "one")
    run.average(2, tmp_path / "again")
    shutil.rmtree(run.checkpoint(40))
    write_by_two(run.checkpoint(40), trained_from(converted_twin("text-8"), first_layers, seed=2), 40)
    run.average(2, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        for other in ("again", "two"):
            assert (tmp_path / other / path.name).read_bytes() == path.read_bytes()


def test_the_manifest_records_what_was_averaged_and_verify_passes(
    run_of: Runs, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    done = run_of("images-8").average(3, tmp_path / "out")
    recorded = read_manifest(tmp_path / "out").document()["adaptation"]
    assert (recorded["steps"], recorded["checkpoints"], recorded["tokens"]) == (100, [60, 80, 100], 100 * 512)
    assert recorded["settings"] == SETTINGS.to_json()
    assert done.output == tmp_path / "out"
    report = verify(tmp_path / "out", converted_twin("images-8"), record=False)
    assert report.passed
    assert any("the mean of 3 checkpoints" in remark for remark in report.remarks)


def _with_entries(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "checkpoint.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        trained = CheckpointReader(folder)
        tensors = {name: trained.read(name) for name in trained.names}
        change(tensors)
        shutil.rmtree(folder)
        write_checkpoint(folder, tensors, trained.manifest.step)

    return save


def _flip_byte(folder: Path) -> None:
    path = folder / SHARD
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


NORM = "model.decoder.norm.weight"

STRANGERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "other settings": (_with_entries(settings_sha256="d" * 64), "has settings_sha256 dddd"),
    "another objective": (_with_entries(objective_sha256="d" * 64), "has objective_sha256 dddd"),
    "another step": (_with_entries(step=41), "is the checkpoint of step 41, renamed"),
    "a tensor less": (
        _with_tensors(lambda tensors: tensors.pop(NORM)),
        f"differs from .* in its tensors or shapes: {NORM}",
    ),
    "a tensor more": (_with_tensors(lambda tensors: tensors.update(more=torch.ones(2))), "differs from .*: more"),
    "another shape": (
        _with_tensors(lambda tensors: tensors.update({NORM: torch.ones(23)})),
        f"differs from .*: {NORM}",
    ),
    "one bit": (_flip_byte, f"is damaged: {SHARD} was modified: its sha256 differs"),
    "no checkpoint": (
        lambda folder: (folder / SHARD).unlink(),
        f"{SHARD}: cannot be read: No such file",
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_checkpoints_of_different_runs_are_refused(stranger: str, run_of: Runs, tmp_path: Path) -> None:
    change, message = STRANGERS[stranger]
    run = run_of("text-8", count=3)
    change(run.checkpoint(40))
    with pytest.raises(CheckpointError, match=message):
        run.average(3, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run.average(1, tmp_path / "out")


def test_too_few_checkpoints_are_refused(run_of: Runs, tmp_path: Path) -> None:
    run = run_of("text-8", count=2)
    (run.folder / "checkpoints" / ".step-00000060.partial").mkdir()
    with pytest.raises(CheckpointError, match="has 2 checkpoints, but --last is 3"):
        run.average(3, tmp_path / "out")
    with pytest.raises(UsageError, match=r"last: .* greater than or equal to 1"):
        run.average(0, tmp_path / "out")


def test_a_model_other_than_the_trained_one_is_refused(run_of: Runs, tmp_path: Path) -> None:
    run, model = run_of("text-8", count=1), tmp_path / "model"
    shutil.copytree(run.model, model)
    run.average(1, tmp_path / "moved", model=model)
    with pytest.raises(CheckpointError, match="is not the model that was trained"):
        run.average(1, tmp_path / "out", model=tmp_path / "moved")
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors differs from its sha256 in t5g2\.json"):
        run.average(1, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_a_verification_does_not_change_the_identity(run_of: Runs, twin_folder: TwinFolder, tmp_path: Path) -> None:
    run, model = run_of("text-8", count=1), tmp_path / "model"
    shutil.copytree(run.model, model)
    before = read_manifest(model).document()["sha256"]
    assert verify(model, twin_folder("text-8")).passed
    assert read_manifest(model).document()["sha256"] != before
    run.average(1, tmp_path / "out", model=model)


def test_a_model_without_a_manifest_is_identified_by_its_files(run_of: Runs, tmp_path: Path) -> None:
    run, model = run_of("text-8", count=1), tmp_path / "model"
    shutil.copytree(run.model, model)
    (model / "t5g2.json").unlink()
    files = {
        name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    document = json.loads((run.folder / "run.json").read_text())
    document["model"] = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (run.folder / "run.json").write_text(json.dumps(document))
    run.average(1, tmp_path / "out", model=model)
    with pytest.raises(CheckpointError, match="is not the model that was trained"):
        run.average(1, tmp_path / "again", model=run.model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"step": 7,', '"step": 8,'), "has no line for step 7"),
        (lambda text: text[:-10], "is not a valid log line"),
        (lambda text: text.replace("tokens", "words", 1), "is not a valid log line"),
    ],
)
def test_a_log_without_every_step_is_refused(
    damage: Callable[[str], str], message: str, run_of: Runs, tmp_path: Path
) -> None:
    run = run_of("text-8", count=1)
    path = run.folder / "metrics.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=message):
        run.average(1, tmp_path / "out")


@pytest.mark.parametrize("damage", ["{}", "[]", '{"format": 2}'])
def test_a_folder_that_is_not_a_run_is_refused(damage: str, run_of: Runs, tmp_path: Path) -> None:
    run = run_of("text-8", count=1)
    (run.folder / "run.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"run\.json: "):
        run.average(1, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no run\.json, expected the folder of a training run"):
        average(tmp_path / "nowhere", tmp_path / "out", last=1, model=run.model)


@pytest.mark.slow
def test_memory_holds_rows_instead_of_whole_tensors(tmp_path: Path) -> None:
    """Average five checkpoints with a tensor of 16 MB each, in a separate process."""
    folders = [
        write_checkpoint(tmp_path / f"step-{step:08d}", {"t": torch.full((4096, 1024), float(step))}, step)
        for step in range(1, 6)
    ]
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from t5g2convert.adaptation.average import Mean\n"
        "from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader\n"
        "mean = Mean([CheckpointReader(Path(each)) for each in sys.argv[1:]])\n"
        "first = next(mean.pieces('t'))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert all((piece == 3).all() for piece in mean.pieces('t'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 16 << 20, "a second pass takes no more than the first block"


def fill(number: int, tensors: Tensors) -> None:
    tensors["model.decoder.norm.weight"].fill_(number)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start`, a conversion, and `run`, as transformers' Trainer writes it with three checkpoints."""
    root = tmp_path_factory.mktemp("trainer")
    start = write_start(root)
    for number, dtype in ((9, torch.float32), (10, torch.float32), (100, torch.bfloat16)):
        folder = train(start, root / f"run/checkpoint-{number}", dtype=dtype)
        change(folder, partial(fill, number))
        (folder / "optimizer.pt").write_bytes(b"never opened")
    return root


def test_the_mean_of_checkpoints_of_transformers_has_no_manifest(trainer: Path, tmp_path: Path) -> None:
    average(trainer / "run", tmp_path / "out", last=2, model=trainer / "start", dtype="float32")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found["model.decoder.norm.weight"].tolist() == [55.0] * 48, "steps 10 and 100, by number"
    name = "model.encoder.layers.3.mlp.up_proj.weight"
    two = [load_file(trainer / f"run/checkpoint-{n}/model.safetensors")[name].double() for n in (10, 100)]
    assert torch.equal(found[name], ((two[0] + two[1]) / 2).float())
    assert not (tmp_path / "out/t5g2.json").exists()
    assert (tmp_path / "out/tokenizer.json").is_file()
    report = verify(tmp_path / "out", trainer / "start")
    assert report.passed, report.failed
    assert report.remarks[0].startswith("trained elsewhere")


def test_checkpoints_of_transformers_that_cannot_be_averaged_are_refused(trainer: Path, tmp_path: Path) -> None:
    run = copied(trainer / "run", tmp_path / "run")
    with pytest.raises(UsageError, match="do not record what was trained"):
        average(run, tmp_path / "out", last=2)
    with pytest.raises(CheckpointError, match="has 3 checkpoints, but --last is 4"):
        average(run, tmp_path / "out", last=4, model=trainer / "start")
    tower = "model.encoder.vision_tower.vision_model.post_layernorm.weight"
    change(run / "checkpoint-10", lambda tensors: tensors.update({tower: tensors[tower] + 1}))
    with pytest.raises(CheckpointError, match="vision tower was trained too"):
        average(run, tmp_path / "out", last=2, model=trainer / "start")
    change(run / "checkpoint-100", lambda tensors: tensors.update({"score.out_proj.weight": tensors.pop(tower)}))
    with pytest.raises(CheckpointError, match="2 tensor") as error:
        average(run, tmp_path / "out", last=1, model=trainer / "start")
    assert set(error.value.details) == {f"{tower} is missing", "score.out_proj.weight is not a tensor of the model"}
    with pytest.raises(OutputError, match="lies inside"):
        average(run, run / "checkpoint-9/out", last=1, model=trainer / "start")
    assert not (tmp_path / "out").exists()
