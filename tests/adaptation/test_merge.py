"""Merging compared with peft's own merge_and_unload, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, OutputError, verify
from t5g2convert.adaptation import merge as merging
from t5g2convert.adaptation.merge import merge
from t5g2convert.checkpoint.adapter import open_adapter
from t5g2convert.checkpoint.families.t5gemma2_spellings import published_name
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest, seal
from tests.adaptation.adapters import load, wrapped, write_adapter
from tests.conftest import TwinFolder
from tests.publish.folders import write_adapted

Adapter = dict[str, Any]
TEXT = r".*(encoder\.text_model|decoder)\.layers\..*\.(q_proj|o_proj|down_proj)"

KINDS: dict[str, tuple[str, Adapter]] = {
    "text stacks": ("text-8", {"target_modules": TEXT}),
    "float32": ("text-float32", {"target_modules": ["v_proj", "gate_proj"]}),
    "float16": ("text-float16", {"target_modules": ["k_proj"], "size": 0.01}),
    "shards": ("images-sharded", {"target_modules": TEXT, "r": 3}),
    "the vision tower too": ("images-8", {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    "rsLoRA": ("text-8", {"target_modules": ["up_proj"], "use_rslora": True, "r": 3, "lora_alpha": 5}),
    "patterns": (
        "images-8",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {r"decoder\.layers\..*\.q_proj": 2, "layers.1.self_attn.k_proj": 7},
            "alpha_pattern": {r"^model\.encoder\.text_model\.layers\.[01]\..*": 3},
        },
    ),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_in_float32_equals_peft_s_to_the_rounding(
    kind: str, converted_twin: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, config = KINDS[kind]
    model = converted_twin(name)
    adapter = write_adapter(model, tmp_path / "adapter", **config)
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 100)
    done = merge(model, adapter, tmp_path / "merged", dtype="float32")
    theirs = {
        published_name(key): value for key, value in wrapped(model, **config).merge_and_unload().state_dict().items()
    }
    before, after = stored(model), stored(tmp_path / "merged")
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key].float())}
    assert len(changed) == done.targets == len(load_file(adapter / "adapter_model.safetensors")) // 2
    for key, value in after.items():
        # peft rounds the product, the scaled product and the sum to float32; the merge rounds once.
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-8)
        assert key in changed or torch.equal(value, theirs[key]), key
    assert ("vision" in " ".join(changed)) == (kind in ("the vision tower too", "patterns"))
    assert any("vision tower" in note for note in done.conversion.notes) == ("vision" in " ".join(changed))


@pytest.mark.parametrize("name", ["text-8", "text-float16", "images-sharded"])
def test_a_merge_is_rounded_once_and_all_other_bytes_are_the_model_s(
    name: str, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    model = converted_twin(name)
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=TEXT, size=0.02)
    done = merge(model, adapter, tmp_path / "merged")
    before, after, matrices = (
        stored(model),
        stored(tmp_path / "merged"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    products = {
        published_name(key.removeprefix("base_model.model.").replace("lora_A.", "")): 2
        * (matrices[key.replace("lora_A", "lora_B")].double() @ matrices[key].double())
        for key in matrices
        if "lora_A" in key
    }
    assert len(products) == done.targets > 30
    assert [file.name for file in sorted(tmp_path.glob("merged/*.safetensors"))] == [
        file.name for file in sorted(model.glob("*.safetensors"))
    ]
    for key, value in after.items():
        assert value.dtype == before[key].dtype
        if key not in products:
            assert torch.equal(value, before[key]), key
            continue
        exact = before[key].double() + products[key]
        words = torch.int16
        steps = [(value.view(words) + step).view(value.dtype).double() for step in (-1, 0, 1)]
        errors = torch.stack([(step - exact).abs() for step in steps])
        assert bool((errors[1] <= errors.amin(dim=0)).all()), key


def test_logits_of_base_and_adapter_equal_those_of_the_merged_model(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("text-float32")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=TEXT, size=0.2)
    merge(model, adapter, tmp_path / "merged")
    batch = {"input_ids": torch.arange(3, 43).view(2, 20), "decoder_input_ids": torch.arange(5, 27).view(2, 11)}
    with torch.no_grad():
        from peft import PeftModel

        base = load(model)
        alone = base(**batch).logits
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()(**batch).logits
        ours = load(tmp_path / "merged")(**batch).logits
    assert float((theirs - alone).abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_same_merge_gives_the_same_bytes_and_names_no_path(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("text-8")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("one", "two"):
        merge(model, adapter, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "one" / MANIFEST_FILE).read_text()
    merged = read_manifest(tmp_path / "one").merged
    assert merged is not None
    assert merged.tensors == 16
    assert [(group.rank, group.scale) for group in merged.targets] == [(4, 2.0)]
    assert merged.targets[0].names == [
        "model.encoder.layers.{layer}.self_attn.q_proj.weight",
        "model.decoder.layers.{layer}.self_attn.q_proj.weight",
    ]


def test_the_training_of_the_model_stays_in_the_manifest(converted_twin: TwinFolder, tmp_path: Path) -> None:
    write_adapted(converted_twin("text-8"), tmp_path / "trained")
    adapter = write_adapter(converted_twin("text-8"), tmp_path / "adapter", target_modules=["q_proj"])
    merge(tmp_path / "trained", adapter, tmp_path / "merged")
    before, after = (read_manifest(tmp_path / name).document() for name in ("trained", "merged"))
    assert after["adaptation"] == before["adaptation"]


def test_an_adapter_merged_before_stays_in_the_manifest_and_is_verified(
    converted_twin: TwinFolder, tmp_path: Path
) -> None:
    model = converted_twin("text-8")
    for number, folder in enumerate((model, tmp_path / "merged-0")):
        adapter = write_adapter(model, tmp_path / f"adapter-{number}", target_modules=["q_proj"], seed=number)
        merge(folder, adapter, tmp_path / f"merged-{number}")
    first, second = (read_manifest(tmp_path / f"merged-{number}").merged for number in range(2))
    assert first is not None
    assert second is not None
    assert second.before == first
    how: dict[str, Any] = {"adapter": tmp_path / "adapter-1"}
    assert verify(tmp_path / "merged-1", tmp_path / "merged-0", **how).passed
    document = read_manifest(tmp_path / "merged-1").document()
    del document["merged"]["before"]
    (tmp_path / "merged-1" / MANIFEST_FILE).write_bytes(seal(document))
    checks = {check.name: check for check in verify(tmp_path / "merged-1", tmp_path / "merged-0", **how).checks}
    assert "another merge before this one" in checks["provenance"].detail


def test_notes_name_another_base_an_update_of_zero_and_what_rounding_lost(
    converted_twin: TwinFolder, tmp_path: Path
) -> None:
    model = converted_twin("text-8")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], size=1e-3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    # Another folder of the same name may have other weights.
    same = merge(model, adapter, tmp_path / "same")
    assert any("not checked: that text-8 has the same weights" in note for note in same.conversion.notes)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "google/other"}))
    done = merge(model, adapter, tmp_path / "merged")
    assert (
        "the adapter was trained on google/other; not checked: that text-8 has the same weights"
        in done.conversion.notes
    )
    assert done.lost is not None
    assert done.lost > 0.5
    assert any("lost" in note and "of the update; --dtype float32 keeps it" in note for note in done.conversion.notes)
    kept = merge(model, adapter, tmp_path / "float32", dtype="float32")
    assert kept.lost is not None
    assert kept.lost < 1e-2
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: value * ("lora_A" in key) for key, value in tensors.items()}, adapter / "adapter_model.safetensors")
    zero = merge(model, adapter, tmp_path / "zero")
    assert zero.lost is None
    assert "16 of 16 targets have a product of zero, and did not change" in zero.conversion.notes
    assert (tmp_path / "zero/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_an_adapter_of_another_model_is_refused_with_every_target(converted_twin: TwinFolder, tmp_path: Path) -> None:
    adapter = write_adapter(converted_twin("text-13"), tmp_path / "adapter", target_modules=["v_proj", "q_proj"])
    with pytest.raises(CheckpointError, match=r"36 of 52 targets do not fit text-8, first model\.") as refused:
        merge(converted_twin("text-8"), adapter, tmp_path / "merged")
    assert len(refused.value.details) == 36
    assert any(line.endswith("is not a linear layer of this model") for line in refused.value.details)
    assert any("v_proj needs a weight [20, 24], the model's is [10, 24]" in line for line in refused.value.details)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_matrix_with_nan_or_infinity_is_refused(value: float, converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("text-8")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[5] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        merge(model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_sum_too_large_for_the_dtype_is_refused(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("text-float16")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], size=300.0)
    with pytest.raises(CheckpointError, match="has a value too large for F16"):
        merge(model, adapter, tmp_path / "merged")


def test_only_a_block_of_rows_is_in_memory(
    converted_twin: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted_twin("text-8")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=TEXT)
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 100)
    opened, start = open_adapter(adapter), open_checkpoint(model)
    dtypes = {name: tensor.entry.dtype for name, tensor in start.tensors.items()}
    values = merging.MergedValues(start, opened, dtypes)
    for name, target in opened.targets.items():
        sizes = [piece.size for piece in values.pieces(name)]
        assert max(sizes) <= max(100, target.shape[1])
        assert sum(sizes) == target.shape[0] * target.shape[1]


def test_inputs_are_never_the_output(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("text-8")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    for output in (adapter, adapter / "merged", model):
        with pytest.raises(OutputError):
            merge(model, adapter, output, overwrite=True)
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_bfloat16_matrices_are_merged_too(converted_twin: TwinFolder, tmp_path: Path) -> None:
    model = converted_twin("text-8")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = {key: value.bfloat16() for key, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge(model, adapter, tmp_path / "merged", dtype="float32")
    name = "model.decoder.layers.2.self_attn.q_proj"
    down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = stored(model)[f"{name}.weight"].double() + 2.0 * (up @ down)
    assert np.array_equal(stored(tmp_path / "merged")[f"{name}.weight"].numpy(), exact.float().numpy())
