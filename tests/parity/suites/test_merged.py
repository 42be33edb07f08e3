"""Verification of a model with a merged adapter, and of damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, UsageError, convert, verify
from t5g2convert.adaptation.merge import merge
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.parity.checks import merged_values
from tests.adaptation.adapters import write_adapter
from tests.adaptation.test_merge import KINDS
from tests.conftest import TwinFolder
from tests.parity.mutations import OPERATORS, Bench, Document, Tally, check_of, close, exchange, message_of
from tests.publish.folders import write_adapted

TEXT = r".*(encoder\.text_model|decoder)\.layers\..*\.(q_proj|down_proj)"
Scene = dict[str, Path]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A Gemma 3 with images, its conversion, two adapters of the text stacks, and the conversion merged with one."""
    root = tmp_path_factory.mktemp("scene")
    found = {name: root / name for name in ("parent", "model", "adapter", "other", "merged")}
    build_demo_source(found["parent"])
    convert(found["parent"], found["model"], flush=False)
    write_adapter(found["model"], found["adapter"], target_modules=TEXT, alpha_pattern={"down_proj": 3})
    write_adapter(found["model"], found["other"], target_modules=TEXT, alpha_pattern={"down_proj": 3}, seed=1)
    merge(found["model"], found["adapter"], found["merged"])
    return found


@pytest.fixture
def bench(scene: Scene, tmp_path: Path) -> Bench:
    return Bench.of(scene["model"], scene["merged"], tmp_path / "damaged")


def changed(scene: Scene, name: str, folder: Path, change: Callable[[Path], object]) -> Path:
    """Copy a folder of the scene and change it."""
    shutil.copytree(scene[name], folder)
    change(folder)
    return folder


def settings(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def test_a_merge_is_judged_with_its_source_and_its_adapter(scene: Scene, bench: Bench) -> None:
    report = bench.judge(adapter=scene["adapter"])
    assert report.passed, report.failed
    assert report.complete
    assert [check.name for check in report.checks] == [
        "integrity",
        "provenance",
        "config",
        "tokenizer",
        "vision_parity",
        "runs",
    ]
    detail = check_of(report, "provenance").detail
    assert "219 tensors are the source's byte for byte" in detail
    assert "32 are the source's plus the adapter's product, rounded once" in detail
    assert "difference 0" in check_of(report, "vision_parity").detail
    verify(bench.folder, bench.source, adapter=scene["adapter"])
    assert read_manifest(bench.folder).document()["verification"]["passed"] is True


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "float16"}], ids=str)
def test_a_merge_in_another_dtype_is_judged_too(options: dict[str, Any], scene: Scene, tmp_path: Path) -> None:
    merge(scene["model"], scene["adapter"], tmp_path / "merged", **options)
    report = verify(tmp_path / "merged", scene["model"], adapter=scene["adapter"], record=False)
    assert report.passed, report.failed


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_every_kind_of_adapter_is_judged(kind: str, converted_twin: TwinFolder, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    model = converted_twin(name)
    adapter = write_adapter(model, tmp_path / "adapter", **config)
    merge(model, adapter, tmp_path / "merged")
    report = verify(tmp_path / "merged", model, adapter=adapter, record=False)
    assert report.passed, report.failed


def test_a_merge_of_the_vision_tower_is_judged_by_its_bytes(scene: Scene, tmp_path: Path) -> None:
    write_adapter(scene["model"], tmp_path / "adapter", target_modules=["v_proj"])
    merge(scene["model"], tmp_path / "adapter", tmp_path / "merged")
    report = verify(tmp_path / "merged", scene["model"], adapter=tmp_path / "adapter", record=False)
    assert report.passed, report.failed
    assert report.skipped == {"vision_parity": "the adapter changes the vision tower; provenance judges its tensors"}
    bench = Bench.of(scene["model"], tmp_path / "merged", tmp_path / "damaged")
    name = "model.encoder.vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.weight"
    with bench.tensors() as tensors:
        tensors[name].view(torch.int16).view(-1)[7] += 1
    failed = check_of(bench.resealed(adapter=tmp_path / "adapter"), "provenance")
    assert f"{name}[" in message_of(failed)


def test_a_merge_into_a_trained_model_keeps_the_training(scene: Scene, tmp_path: Path) -> None:
    write_adapted(scene["model"], tmp_path / "trained")
    merge(tmp_path / "trained", scene["adapter"], tmp_path / "merged")
    options: dict[str, Any] = {"adapter": scene["adapter"]}
    assert verify(tmp_path / "merged", tmp_path / "trained", record=False, **options).passed
    bench = Bench.of(tmp_path / "trained", tmp_path / "merged", tmp_path / "damaged")
    bench.reseal(lambda manifest: manifest["adaptation"].update(tokens=5))
    assert "another training of the source" in message_of(check_of(bench.judged(**options), "provenance"))
    bench.reseal(lambda manifest: manifest.pop("adaptation"))
    assert "another training of the source" in message_of(check_of(bench.judged(**options), "provenance"))
    (tmp_path / "trained/t5g2.json").unlink()
    assert bench.judged(**options).passed, "without the source's manifest, the recorded training is not judged"


def test_what_is_missing_is_asked_for(scene: Scene) -> None:
    with pytest.raises(UsageError, match="is a model with a merged adapter") as refused:
        verify(scene["merged"], scene["model"], record=False)
    assert refused.value.hint == "pass the adapter with --adapter"
    with pytest.raises(UsageError, match="--adapter needs --source"):
        verify(scene["merged"], adapter=scene["adapter"], record=False)
    with pytest.raises(UsageError, match="pass that as --source, not parent"):
        verify(scene["merged"], scene["parent"], adapter=scene["adapter"], record=False)
    with pytest.raises(UsageError, match="pass that as --source, not parent"):
        verify(scene["merged"], scene["parent"], record=False)
    assert not verify(scene["merged"], record=False).complete


def test_a_model_without_an_adapter_is_not_a_merge(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an adapter is merged into a T5Gemma 2"):
        verify(scene["model"], scene["parent"], adapter=scene["adapter"], record=False)
    write_adapted(scene["model"], tmp_path / "trained")
    report = verify(tmp_path / "trained", scene["model"], adapter=scene["adapter"], record=False)
    assert message_of(check_of(report, "provenance")).startswith("t5g2.json records no merged adapter")
    (tmp_path / "trained/t5g2.json").unlink()
    with pytest.raises(UsageError, match="--adapter cannot be used for a folder that was trained elsewhere"):
        verify(tmp_path / "trained", scene["model"], adapter=scene["adapter"], record=False)


@pytest.mark.parametrize("dtype", ["keep", pytest.param("float32", marks=pytest.mark.slow)])
def test_every_changed_tensor_is_found(dtype: Any, scene: Scene, tmp_path: Path) -> None:
    """Change targets and other tensors by every operator, by one bit, back to the source's, and by exchange."""
    merge(scene["model"], scene["adapter"], tmp_path / "merged", dtype=dtype)
    bench, tally = Bench.of(scene["model"], tmp_path / "merged", tmp_path / "damaged"), Tally()
    source = load_file(scene["model"] / "model.safetensors")
    targets = [
        f"model.{stack}.layers.{layer}.{module}.weight"
        for stack, layer in (("encoder", 0), ("encoder", 7), ("decoder", 3))
        for module in ("self_attn.q_proj", "mlp.down_proj")
    ]
    others = ["model.decoder.layers.3.self_attn.k_proj.weight", "model.encoder.norm.weight"]

    def tried(label: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        with bench.tensors() as tensors:
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            change(tensors)
            different = any(not torch.equal(before[name], tensors[name]) for name in tensors)
        if different or "nan" in label:
            tally.add(label, bench.resealed(adapter=scene["adapter"]))
        else:
            bench.restore()

    for name in [*targets, *others]:
        for operator in OPERATORS:
            tried(f"{operator.__name__} {name}", lambda tensors, name=name, operator=operator: operator(tensors[name]))
        for element in (0, 5, -1):
            tried(f"one bit of {name}[{element}]", lambda tensors, name=name, at=element: _one_step(tensors[name], at))
    for name in targets:
        tried(f"{name} is the source's", lambda tensors, name=name: tensors[name].copy_(source[name]))
        tried(
            f"{name} has its product twice",
            lambda tensors, name=name: tensors[name].add_(tensors[name].clone() - source[name]),
        )
    tried("two targets exchanged", lambda tensors: exchange(tensors, targets[0], targets[2]))
    close(tally, f"merged, {dtype}")


def _one_step(tensor: torch.Tensor, element: int) -> None:
    """Move one value to its neighbour."""
    tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).view(-1)[element] += 1


def test_every_lie_about_the_merge_is_found(scene: Scene, bench: Bench) -> None:
    """Change the record of the merge in a sound folder."""
    lies: dict[str, Callable[[Document], object]] = {
        "no record": lambda manifest: manifest.pop("merged"),
        "another file": lambda manifest: manifest["merged"]["adapter"].update({"adapter_config.json": "0" * 64}),
        "another weight": lambda manifest: manifest["merged"]["adapter"].update(
            {"adapter_model.safetensors": "1" * 64}
        ),
        "a file more": lambda manifest: manifest["merged"]["adapter"].update({"adapter.bin": "1" * 64}),
        "a file less": lambda manifest: manifest["merged"]["adapter"].pop("adapter_config.json"),
        "a rank": lambda manifest: manifest["merged"]["targets"][0].update(rank=5),
        "a scale": lambda manifest: manifest["merged"]["targets"][0].update(scale=2.5),
        "a name": lambda manifest: manifest["merged"]["targets"][0]["names"].pop(),
        "a group": lambda manifest: manifest["merged"]["targets"].pop(),
        "a count": lambda manifest: manifest["merged"].update(tensors=31),
        "a method": lambda manifest: manifest["merged"].update(method="dora"),
        "a key": lambda manifest: manifest["merged"].update(seed=1),
        "a training": lambda manifest: manifest.update(mapping={"name": "gemma3", "sha256": "0" * 64}),
    }
    tally = Tally()
    for label, lie in lies.items():
        bench.reseal(lie)
        tally.add(label, bench.judged(adapter=scene["adapter"]))
    close(tally, "merged, lies")


def test_every_other_adapter_or_source_is_found(scene: Scene, tmp_path: Path) -> None:
    """Judge a sound folder with another adapter or source than it was made from."""

    def matrices(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            tensors = load_file(folder / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, folder / "adapter_model.safetensors")

        return write

    def without_one(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "encoder.text_model.layers.3.mlp" in name]:
            del tensors[name]

    first = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"
    adapters: dict[str, Callable[[Path], object]] = {
        "alpha": settings(lora_alpha=9),
        "an alpha pattern": settings(alpha_pattern={}),
        "rsLoRA": settings(use_rslora=True),
        "one element": matrices(lambda tensors: tensors[first].view(-1)[3].mul_(1.01)),
        "a target less": matrices(without_one),
        "a name": settings(base_model_name_or_path="google/other"),
    }
    tally = Tally()
    for label, change in adapters.items():
        adapter = changed(scene, "adapter", tmp_path / label, change)
        tally.add(label, verify(scene["merged"], scene["model"], adapter=adapter, record=False))
    tally.add("other values", verify(scene["merged"], scene["model"], adapter=scene["other"], record=False))

    def last_byte(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))

    source = changed(scene, "model", tmp_path / "source", last_byte)
    tally.add("a source", verify(scene["merged"], source, adapter=scene["adapter"], record=False))
    tally.add("the result", verify(scene["merged"], scene["merged"], adapter=scene["adapter"], record=False))
    close(tally, "merged, other inputs")


def test_the_values_are_judged_even_if_all_records_agree(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer with another scale, or that drops a target, is found by the values alone."""
    from t5g2convert.adaptation import merge as merging

    monkeypatch.setattr(merging, "scale_of", lambda target, rslora: 1.001 * target.alpha / target.rank)
    merging.merge(scene["model"], scene["adapter"], tmp_path / "scaled")
    failed = check_of(verify(tmp_path / "scaled", scene["model"], adapter=scene["adapter"], record=False), "provenance")
    assert "32 fault(s)" in failed.detail
    assert "but the source plus 2 times the adapter's product is" in message_of(failed)


def test_a_damaged_adapter_is_an_error_not_a_verdict(scene: Scene, tmp_path: Path) -> None:
    cut = changed(scene, "adapter", tmp_path / "cut", lambda folder: (folder / "adapter_config.json").unlink())
    with pytest.raises(CheckpointError, match="is not a peft adapter"):
        verify(scene["merged"], scene["model"], adapter=cut, record=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_middles_between_all_numbers_of_a_dtype_are_exact(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    ordered = torch.unique(every[torch.isfinite(every)].double())
    middles = (ordered[1:] + ordered[:-1]) / 2
    numbers = ordered.to(dtype)
    assert torch.equal(merged_values._middle(numbers[:-1], 1), middles)
    assert torch.equal(merged_values._middle(numbers[1:], -1), middles)
    negative_zero = torch.tensor([-0.0], dtype=dtype)
    for towards in (-1, 1):
        zeros = merged_values._middle(negative_zero, towards), merged_values._middle(-negative_zero, towards)
        assert torch.equal(*zeros)


def test_the_middles_between_float32_numbers_are_numpy_s() -> None:
    values = np.array([1.0, -1.5, 3e38, 1e-45, -0.1], np.float32)
    for towards in (-1, 1):
        neighbours = np.nextafter(values, np.float32(towards * np.inf)).astype(np.float64)
        found = merged_values._middle(torch.from_numpy(values), towards)
        assert np.array_equal(found.numpy(), (values.astype(np.float64) + neighbours) / 2)


def test_the_targets_are_compared_in_blocks(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_values, "BLOCK_ELEMENTS", 100)
    report = verify(scene["merged"], scene["model"], adapter=scene["adapter"], record=False)
    assert report.passed, report.failed
