"""The export of a run's last checkpoint, and exports that are refused; the run was made without training."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from t5g2convert import UsageError, convert
from t5g2convert.adaptation import export as finishing
from t5g2convert.adaptation.export import Exported, export, export_checkpoint
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.conversion.convert import execute
from t5g2convert.conversion.options import WriteOptions
from t5g2convert.conversion.trained_model import named_by, patterns_of, plan_adapted
from t5g2convert.conversion.write.resources import peak_memory
from t5g2convert.errors import CheckpointError, OutputError, T5g2Error, VerificationError
from t5g2convert.mapping.inspection import Inspection, inspect
from tests.adaptation.runs import FACTS, SHARD, text_only, trained_from, write_by_two, write_checkpoint, write_run
from tests.conftest import TwinFolder
from tests.folders import contents


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small / "model", tmp_path / "model"))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run of `model` with one checkpoint, of step 20, and the export of step 10."""
    write_run(tmp_path / "run", model, 20)
    earlier = write_checkpoint(tmp_path / "earlier", trained_from(model, text_only, seed=1), 10)
    facts = {**FACTS, "steps": 10, "checkpoints": [10]}
    export(model, CheckpointReader(earlier), tmp_path / "run/model", facts=facts, flush=False)
    write_checkpoint(tmp_path / "run/checkpoints/step-00000020", trained_from(model, text_only), 20)
    return tmp_path / "run"


def step_of(folder: Path) -> int:
    """Return the step of an export."""
    return int(read_manifest(folder).document()["adaptation"]["steps"])


def finished(run: Path, model: Path) -> Exported:
    return export_checkpoint(run, run / "checkpoints/step-00000020", model)


def assert_refused(run: Path, model: Path, error: type[T5g2Error], message: str) -> None:
    """Check that the export fails and leaves the folder unchanged."""
    with pytest.raises(error, match=message):
        finished(run, model)
    assert step_of(run / "model") == 10
    assert {item.name for item in run.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints", "model"}


def test_an_export_replaces_an_earlier_one(run: Path, model: Path) -> None:
    found = finished(run, model)
    assert found.output == found.inspection.path == run / "model"
    assert step_of(run / "model") == 20


def test_O9_an_exported_checkpoint_is_not_exported_again(run: Path, model: Path) -> None:
    assert not finished(run, model).before
    (run / "model/README.md").write_text("my card")
    (run / "model/eval").mkdir()
    (run / "model/eval/results.csv").write_text("0.73")
    before = contents(run / "model")
    found = finished(run, model)
    assert found.before
    assert found.to_json()["exported_before"]
    assert contents(run / "model") == before
    moved = run.with_name("elsewhere")
    (run / "model").rename(moved)
    (run / "model").symlink_to(moved)
    assert finished(run, model).before, "an export on another disk is one too, and only read"
    assert contents(moved) == before


def test_O9_files_of_the_user_are_not_replaced_by_another_export(run: Path, model: Path) -> None:
    (run / "model/eval").mkdir()
    (run / "model/eval/results.csv").write_text("0.73")
    before = contents(run / "model")
    with pytest.raises(OutputError, match=r"eval/.*t5g2 average .* --last 1"):
        finished(run, model)
    assert contents(run / "model") == before


def test_O9_a_link_in_place_of_the_export_is_not_followed(run: Path, model: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "model")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/backup.tar").write_text("all")
    (run / "model").symlink_to(tmp_path / "disk")
    with pytest.raises(OutputError, match="is a link, and --overwrite does not follow links"):
        finished(run, model)
    assert contents(tmp_path / "disk") == {"backup.tar": b"all"}


def test_O9_the_mean_of_checkpoints_is_not_replaced_by_an_export(run: Path, model: Path) -> None:
    shutil.rmtree(run / "model")
    values = CheckpointReader(run / "checkpoints/step-00000020")
    export(model, values, run / "model", facts={**FACTS, "checkpoints": [50, 100]}, flush=False)
    before = contents(run / "model")
    with pytest.raises(OutputError, match="is not an export of this run"):
        finished(run, model)
    assert contents(run / "model") == before


def test_O9_a_damaged_export_does_not_count_as_an_export(run: Path, model: Path) -> None:
    finished(run, model)
    (run / "model/generation_config.json").unlink()
    assert not finished(run, model).before
    assert (run / "model/generation_config.json").is_file()


def test_a_model_that_was_changed_since_is_refused(run: Path, model: Path) -> None:
    path = model / "t5g2.json"
    path.unlink()
    assert_refused(run, model, CheckpointError, "is not the model that was trained")


def test_weights_that_were_damaged_since_are_refused(run: Path, model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_refused(run, model, CheckpointError, r"model\.safetensors differs from its sha256 in t5g2\.json")


def test_a_damaged_checkpoint_is_refused(run: Path, model: Path) -> None:
    path = run / "checkpoints/step-00000020" / SHARD
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(run, model, CheckpointError, f"is damaged: {SHARD} was modified")


def test_missing_tensors_are_found_before_anything_appears(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(folder: Path) -> Inspection:
        return replace(inspect(folder), missing=("model.decoder.norm.weight",))

    monkeypatch.setattr(finishing, "inspect", short)
    assert_refused(run, model, VerificationError, "with missing or unexpected tensors")


Tensors = Mapping[str, torch.Tensor]


class InMemory:
    """The interface of CheckpointReader for tensors in memory."""

    def __init__(self, tensors: Tensors, *, at_once: int = 100) -> None:
        self.tensors, self.at_once = tensors, at_once

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        flat = self.tensors[name].reshape(-1).numpy()
        for at in range(0, len(flat), self.at_once):
            yield flat[at : at + self.at_once]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def raw_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    stored = checkpoint.tensors[name]
    with (checkpoint.path / stored.file).open("rb") as file:
        return os.pread(file.fileno(), stored.entry.nbytes, stored.entry.start)


@pytest.mark.parametrize("name", ["images-8", "images-sharded", "text-float32", "text-float16", "text-sharded"])
def test_trained_values_are_rounded_once_and_all_else_is_copied(
    name: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    convert(twin_folder(name), model, **({"max_shard_bytes": 50_000} if "sharded" in name else {}))
    trained = trained_from(model, text_only)
    done = export(model, InMemory(trained), output, facts=FACTS)
    before, after = open_checkpoint(model), open_checkpoint(output)
    assert (len(after.files) > 1) == ("sharded" in name)
    assert list(after.files) == list(before.files)
    for file, header in before.files.items():
        found = after.files[file].tensors
        assert list(found) == list(header.tensors), "the order of the header"
        assert [(entry.dtype, entry.shape, entry.start - header.data_start) for entry in header.tensors.values()] == [
            (entry.dtype, entry.shape, entry.start - after.files[file].data_start) for entry in found.values()
        ]
    found = tensors_of(output)
    for tensor, values in trained.items():
        assert torch.equal(found[tensor], values.to(found[tensor].dtype)), tensor
    frozen = [tensor for tensor in before.tensors if tensor not in trained]
    assert any("vision_tower" in tensor for tensor in frozen)
    assert all(raw_bytes(before, tensor) == raw_bytes(after, tensor) for tensor in frozen)
    for file in (model / "config.json", *model.glob("generation*"), *model.glob("tokenizer*")):
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert (
        done.parameters
        == read_manifest(model).document()["parameters"]
        == read_manifest(output).document()["parameters"]
    )
    assert done.shards == {file: read_manifest(output).document()["files"][file]["sha256"] for file in after.files}


def test_the_manifest_describes_the_training_and_the_model(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("images-8")
    export(model, InMemory(trained_from(model, text_only)), tmp_path / "out", facts=FACTS)
    manifest = read_manifest(tmp_path / "out").document()
    recorded = manifest["adaptation"]
    assert {key: recorded[key] for key in FACTS} == FACTS
    assert recorded["frozen"] == ["projector", "vision"]
    assert "model.decoder.layers.{layer}.mlp.up_proj.weight" in recorded["trained"]
    assert len(recorded["trained"]) == 2 * 14 + 2
    assert "mapping" not in manifest
    assert manifest["source"]["family"] == "t5gemma2"
    assert (
        manifest["source"]["files"]["model.safetensors"]
        == read_manifest(model).document()["files"]["model.safetensors"]
    )
    assert str(tmp_path) not in (tmp_path / "out" / "t5g2.json").read_text()


@pytest.mark.slow
def test_the_same_values_give_the_same_bytes_from_one_process_and_from_two(
    converted_twin: TwinFolder, tmp_path: Path
) -> None:
    model = converted_twin("text-8")
    trained = trained_from(model, text_only)
    folders = [
        write_checkpoint(tmp_path / "one" / "step-00000100", trained, 100),
        write_by_two(tmp_path / "two" / "step-00000100", trained, 100),
    ]
    for folder in folders:
        export(model, CheckpointReader(folder), folder.parent / "out", facts=FACTS)
    export(model, InMemory(trained), tmp_path / "out", facts=FACTS)
    for file in (tmp_path / "out").iterdir():
        for folder in folders:
            assert (folder.parent / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_cast_changes_the_dtype_of_everything_and_nothing_else(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("images-8")
    trained = trained_from(model, text_only)
    export(model, InMemory(trained), tmp_path / "out", facts=FACTS, dtype="float32")
    found, before = tensors_of(tmp_path / "out"), tensors_of(model)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, tensor in before.items():
        assert torch.equal(found[name], trained.get(name, tensor.float()))
    config, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", model))
    assert (given["dtype"], config["dtype"]) == ("bfloat16", "float32")
    assert {**config, "dtype": "bfloat16"} == given
    assert read_manifest(tmp_path / "out").document()["changes"] == [
        {"field": "dtype", "source": "bfloat16", "target": "float32"}
    ]


def test_ties_are_rounded_to_even(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("text-8")
    # Bits of float32 values: lower halves exactly at the midpoint, and one next to it.
    bits = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F81_7FFF, 0xBF80_8000, 0x0000_8000] * 4, np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    export(model, InMemory({"model.decoder.norm.weight": values}), tmp_path / "out", facts=FACTS)
    stored = tensors_of(tmp_path / "out")["model.decoder.norm.weight"].view(torch.uint16).tolist()
    assert stored == [0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF80, 0x0000] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_leave_no_output(value: float, converted_twin: TwinFolder, tmp_path: Path) -> None:
    trained = trained_from(converted_twin("text-8"), text_only)
    trained["model.decoder.norm.weight"][3] = value
    trained["model.encoder.layers.2.mlp.up_proj.weight"][1, 2] = value
    with pytest.raises(CheckpointError, match=r"2 trained tensor\(s\) hold NaN or infinity") as caught:
        export(converted_twin("text-8"), InMemory(trained), tmp_path / "out", facts=FACTS)
    what = "NaN" if np.isnan(value) else "infinity"
    assert sorted(caught.value.details) == [
        f"model.decoder.norm.weight[3] is {what}",
        f"model.encoder.layers.2.mlp.up_proj.weight[1, 2] is {what}",
    ]
    assert list(tmp_path.iterdir()) == []


def test_values_too_large_for_the_dtype_are_refused(converted_twin: TwinFolder, tmp_path: Path) -> None:
    values = torch.full((24,), 1e6)
    with pytest.raises(CheckpointError, match="too large for F16"):
        export(
            converted_twin("text-float16"),
            InMemory({"model.decoder.norm.weight": values}),
            tmp_path / "out",
            facts=FACTS,
        )


def test_all_tensors_that_do_not_fit_the_model_are_listed(converted_twin: TwinFolder, tmp_path: Path) -> None:
    trained = {
        "model.decoder.norm.weight": torch.ones(24),
        "model.decoder.norm.bias": torch.ones(24),
        "model.encoder.norm.weight": torch.ones(25),
        "lm_head.out_proj.weight": torch.ones(300, 24),
        "model.encoder.vision_tower.vision_model.post_layernorm.weight": torch.ones(20),
    }
    with pytest.raises(CheckpointError, match=r"4 trained tensor\(s\) do not belong to this model") as caught:
        export(converted_twin("images-8"), InMemory(trained), tmp_path / "out", facts=FACTS)
    assert caught.value.details == (
        "model.decoder.norm.bias is not a tensor of this model",
        "model.encoder.norm.weight has shape [25], expected [24]",
        "lm_head.out_proj.weight is another name of model.encoder.embed_tokens.weight; use "
        "model.encoder.embed_tokens.weight",
        "model.encoder.vision_tower.vision_model.post_layernorm.weight belongs to the vision tower, which stays frozen",
    )
    with pytest.raises(CheckpointError, match="nothing was trained"):
        export(converted_twin("images-8"), InMemory({}), tmp_path / "out", facts=FACTS)


@pytest.mark.parametrize(("count", "message"), [(23, "23 of its 24"), (25, "more than its 24")])
def test_a_wrong_number_of_values_is_refused(
    count: int, message: str, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    values = InMemory({"model.decoder.norm.weight": torch.ones(24)})
    values.pieces = lambda name: iter([np.ones(count, np.float32)])  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=message):
        export(converted_twin("text-8"), values, tmp_path / "out", facts=FACTS)


@pytest.mark.parametrize(
    "facts",
    [
        {**FACTS, "steps": 0},
        {**FACTS, "path": "/home"},
        {key: value for key, value in FACTS.items() if key != "tokens"},
        {**FACTS, "data_sha256": "no digest"},
        {**FACTS, "checkpoints": []},
    ],
)
def test_facts_that_a_manifest_cannot_record_are_refused(
    facts: dict[str, Any], converted_twin: TwinFolder, tmp_path: Path
) -> None:
    values = InMemory({"model.decoder.norm.weight": torch.ones(24)})
    with pytest.raises(CheckpointError, match="adaptation"):
        export(converted_twin("text-8"), values, tmp_path / "out", facts=facts)


def test_a_model_in_another_layout_is_refused(
    converted_twin: TwinFolder, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(converted_twin("text-8"), raw)
    tensors = load_file(raw / "model.safetensors")
    tensors["lm_head.out_proj.weight"] = tensors["model.encoder.embed_tokens.weight"].clone()
    del tensors["model.encoder.norm.weight"]
    save_file(tensors, raw / "model.safetensors", {"format": "pt"})
    values = InMemory({"model.decoder.norm.weight": torch.ones(24)})
    with pytest.raises(CheckpointError, match="do not match the published layout") as caught:
        export(raw, values, tmp_path / "out", facts=FACTS)
    assert caught.value.details == (
        "missing: model.encoder.norm.weight",
        "not in the published layout: lm_head.out_proj.weight",
    )
    with pytest.raises(CheckpointError, match="cannot be adapted, expected t5gemma2"):
        export(twin_folder("text-8"), values, tmp_path / "out", facts=FACTS)


def test_the_output_is_guarded_like_that_of_a_conversion(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model, values = converted_twin("text-8"), InMemory({"model.decoder.norm.weight": torch.ones(24)})
    with pytest.raises(OutputError, match="is the source folder"):
        export(model, values, model, facts=FACTS)
    export(model, values, tmp_path / "out", facts=FACTS)
    with pytest.raises(OutputError, match="exists and is not empty"):
        export(model, values, tmp_path / "out", facts=FACTS)
    export(model, values, tmp_path / "out", facts=FACTS, overwrite=True)
    plan = plan_adapted(open_checkpoint(model), values.names, FACTS)
    with pytest.raises(UsageError, match="cannot be resumed"):
        execute(plan, Folders(model), tmp_path / "again", WriteOptions(resume=True), values=values)


def test_a_model_of_one_shard_with_an_index_becomes_one_file(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model, name = tmp_path / "model", "model-00001-of-00001.safetensors"
    shutil.copytree(converted_twin("text-8"), model)
    (model / "model.safetensors").rename(model / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors_of(model), name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    export(model, InMemory({"model.decoder.norm.weight": torch.ones(24)}), tmp_path / "out", facts=FACTS)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]


def test_an_adapted_folder_is_a_model_like_any_other(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("images-8")
    trained = trained_from(model, text_only)
    export(model, InMemory(trained), tmp_path / "out", facts=FACTS)
    found = inspect(tmp_path / "out")
    assert (found.layout, found.missing, found.unexpected) == ({"names": "published"}, (), ())
    convert(tmp_path / "out", tmp_path / "encoder", part="encoder")
    taken = tensors_of(tmp_path / "encoder")["layers.3.mlp.up_proj.weight"]
    assert torch.equal(taken, trained["model.encoder.layers.3.mlp.up_proj.weight"].to(torch.bfloat16))


def test_the_peak_of_memory_is_reported(converted_twin: TwinFolder) -> None:
    model = open_checkpoint(converted_twin("text-real-vocabulary"))
    names = {"model.encoder.embed_tokens.weight": (262_144, 8)}
    assert peak_memory(plan_adapted(model, names, FACTS)) < 100_000_000


def test_patterns_match_the_names_they_were_made_from() -> None:
    every = [f"m.layers.{layer}.{name}" for layer in range(3) for name in ("a", "b")] + ["m.norm"]
    names = {"m.norm", "m.layers.1.b", *(f"m.layers.{layer}.a" for layer in range(3))}
    assert patterns_of(names, every) == ["m.layers.{layer}.a", "m.layers.1.b", "m.norm"]
    assert set(named_by(patterns_of(names, every), every)) == names
    assert named_by(["m.layers.{layer}.c", "m.layers.7.a"], every) == ["m.layers.{layer}.c", "m.layers.7.a"]
