"""Adapters of peft: what is read from them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from t5g2convert import CheckpointError
from t5g2convert.checkpoint.adapter import open_adapter

Q = "base_model.model.model.encoder.text_model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": False, "bias": "none", "init_lora_weights": True,
    "base_model_name_or_path": "google/t5gemma-2-270m-270m", "target_modules": ["q_proj"], "lora_dropout": 0.1,
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "peft_version": "0.21.2",
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]
PAIR: Shapes = {f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (4, 2)}


def write(folder: Path, changes: dict[str, Any] | None = None, shapes: Shapes = PAIR) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(changes or {})}))
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_names_its_targets_as_they_are_on_disk(tmp_path: Path) -> None:
    tower = "base_model.model.model.encoder.vision_tower.encoder.layers.1.self_attn.q_proj"
    deeper = "base_model.model.decoder.layers.3.mlp.up_proj"
    shapes = {**PAIR, f"{tower}.lora_A.weight": (5, 6), f"{tower}.lora_B.weight": (4, 5)}
    shapes |= {f"{deeper}.lora_A.weight": (2, 6), f"{deeper}.lora_B.weight": (4, 2)}
    found = open_adapter(
        write(
            tmp_path / "a",
            {"rank_pattern": {"vision_tower.*": 5}, "alpha_pattern": {"layers.3.mlp.up_proj": 0.5}},
            shapes,
        )
    )
    assert found.base == "google/t5gemma-2-270m-270m"
    assert {name: (target.rank, target.alpha, target.shape) for name, target in found.targets.items()} == {
        "model.encoder.layers.0.self_attn.q_proj.weight": (2, 3, (4, 6)),
        "model.encoder.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight": (5, 3, (4, 6)),
        "model.decoder.layers.3.mlp.up_proj.weight": (2, 0.5, (4, 6)),
    }


NEUTRAL: list[dict[str, Any]] = [
    {"loftq_config": {}, "layer_replication": None, "use_qalora": False, "trainable_token_indices": []},
    {"init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}},
    {"lora_of_tomorrow": None, "another": {}},
    {"bias": None, "rank_pattern": None},
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=str)
def test_settings_without_effect_are_accepted(changes: dict[str, Any], tmp_path: Path) -> None:
    assert len(open_adapter(write(tmp_path / "a", changes)).targets) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "LOHA"}, "peft_type is 'LOHA': only LORA can be merged"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "DoRA": ({"use_dora": True}, "use_dora is True: only plain LoRA can be merged, without use_dora"),
    "biases": ({"bias": "all"}, "bias is all"),
    "bias of LoRA": ({"lora_bias": True}, "lora_bias is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "a transposed layer": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "replicated layers": ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["mm_input_projection_weight"]}, "target_parameters"),
    "a setting of tomorrow": ({"use_nova": 1}, "use_nova is 1: only plain LoRA can be merged"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which also changes"),
    "a list as initialisation": ({"init_lora_weights": ["a"]}, "init_lora_weights is"),
    "a rank of 0": ({"r": 0}, "r: "),
    "a rank as text": ({"r": "2"}, "r: "),
    "another rank": ({"r": 3}, "has matrices of rank 2, but adapter_config.json says 3"),
    "a rank pattern": ({"rank_pattern": {"q_proj": 4}}, "has matrices of rank 2, but adapter_config.json says 4"),
    "a broken pattern": ({"rank_pattern": {"(": 4}}, r"'\(' is not a valid pattern"),
    "an infinite alpha": ({"lora_alpha": 1e999}, "is not valid JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_merge_cannot_express_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        open_adapter(write(tmp_path / "a", changes))


TENSORS: dict[str, tuple[Shapes, str]] = {
    "no B": ({f"{Q}.lora_A.weight": (2, 6)}, "q_proj has no lora_B"),
    "matrices that do not fit": (
        {f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (4, 3)},
        r"has lora_A \[2, 6\] and lora_B \[4, 3\], which cannot be multiplied",
    ),
    "a convolution": (
        {f"{Q}.lora_A.weight": (2, 6, 3, 3), f"{Q}.lora_B.weight": (4, 2, 1, 1)},
        "is not a linear layer",
    ),
    "DoRA": ({**PAIR, f"{Q}.lora_magnitude_vector.weight": (4,)}, "belongs to DoRA"),
    "a bias": ({**PAIR, f"{Q}.lora_B.bias": (4,)}, "is a bias of LoRA"),
    "a whole tensor": ({**PAIR, "base_model.model.lm_head.out_proj.weight": (4, 4)}, "is a whole tensor"),
    "another name": ({**PAIR, "q_proj.lora_A.weight": (2, 6)}, "q_proj.lora_A.weight is not a LoRA matrix"),
    "the table": (
        {"base_model.model.model.encoder.text_model.embed_tokens.lora_embedding_A": (2, 6)},
        "changes the embedding table, which encoder, decoder and softmax share",
    ),
    "the softmax": (
        {
            "base_model.model.lm_head.out_proj.lora_A.weight": (2, 6),
            "base_model.model.lm_head.out_proj.lora_B.weight": (9, 2),
        },
        "lm_head.out_proj is the embedding table",
    ),
    "one module twice": (
        {**PAIR, **{name.replace("text_model.", ""): shape for name, shape in PAIR.items()}},
        "are the same module",
    ),
    "no tensors": ({}, "holds no LoRA matrices"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_other_tensors_than_pairs_of_matrices_are_refused(case: str, tmp_path: Path) -> None:
    shapes, message = TENSORS[case]
    with pytest.raises(CheckpointError, match=message):
        open_adapter(write(tmp_path / "a", None, shapes))


def test_a_folder_without_an_adapter_says_what_to_pass(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-20")
    with pytest.raises(CheckpointError, match="is not a peft adapter") as refused:
        open_adapter(tmp_path)
    assert refused.value.hint == "pass one of its folders: checkpoint-20"
    (tmp_path / "checkpoint-20/adapter_model.safetensors").rename(tmp_path / "checkpoint-20/adapter_model.bin")
    with pytest.raises(CheckpointError, match="never unpickled"):
        open_adapter(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20/adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        open_adapter(tmp_path / "checkpoint-20")
