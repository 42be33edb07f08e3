"""A folder without a safetensors checkpoint: what it is, and the step to a readable one."""

import json
import os
import shutil
from pathlib import Path
from typing import Final

import pytest

from t5g2convert import plan
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.other_formats import FORMATS, spelling_hint
from t5g2convert.errors import CheckpointError

CONFIG: Final = '{"model_type": "gemma3_text"}'
PEFT: Final = json.dumps({"base_model_name_or_path": "google/gemma-3-270m", "peft_type": "LORA"})

FOLDERS: Final[dict[str, tuple[dict[str, str], str, str]]] = {
    "peft": (
        {"adapter_config.json": PEFT, "adapter_model.safetensors": ""},
        "is a LoRA adapter of google/gemma-3-270m, not a model",
        "merge_and_unload",
    ),
    "peft beside a config, as axolotl writes it": (
        {"config.json": CONFIG, "adapter_config.json": PEFT, "adapter_model.safetensors": ""},
        "is a LoRA adapter of google/gemma-3-270m",
        "merge_and_unload",
    ),
    "peft, pickled": (
        {"config.json": CONFIG, "adapter_config.json": PEFT, "adapter_model.bin": ""},
        "is a LoRA adapter of google/gemma-3-270m",
        "merge_and_unload",
    ),
    "an adapter of T5Gemma 2": (
        {
            "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "a/b", '
            '"auto_mapping": {"base_model_class": "T5Gemma2ForConditionalGeneration"}}',
            "adapter_model.safetensors": "",
        },
        "is a LoRA adapter of a/b, not a model",
        "t5g2 merge a/b",
    ),
    "an adapter of t5g2 finetune": (
        {"adapter_config.json": PEFT, "adapter_model.safetensors": "", "t5g2_adapter.json": "{}"},
        "is a LoRA adapter of google/gemma-3-270m, not a model",
        "t5g2 merge google/gemma-3-270m",
    ),
    "an adapter without its config": ({"adapter_model.safetensors": ""}, "is a LoRA adapter, not a model", "BASE"),
    "soft prompts": (
        {"adapter_config.json": '{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "a/b"}'},
        "is a peft adapter (PROMPT_TUNING) of a/b",
        "it cannot be merged into weights: pass its base model, a/b",
    ),
    "mlx adapter": (
        {"adapter_config.json": '{"model": "google/gemma-3-1b-it"}', "adapters.safetensors": ""},
        "is a LoRA adapter of MLX of google/gemma-3-1b-it",
        "mlx_lm.fuse --model google/gemma-3-1b-it",
    ),
    "adapters of several steps": ({"best/adapter_config.json": PEFT}, "holds an adapter but no model", "merge"),
    "accelerate's FSDP": (
        {"pytorch_model_fsdp_0/.metadata": "", "pytorch_model_fsdp_0/__0_0.distcp": ""},
        "is an FSDP checkpoint: pytorch_model_fsdp_0/",
        "accelerate merge-weights FOLDER/pytorch_model_fsdp_0 OUT",
    ),
    "DCP": (
        {"config.json": CONFIG, ".metadata": "", "__0_0.distcp": ""},
        "is a PyTorch distributed checkpoint (DCP)",
        "accelerate merge-weights FOLDER OUT",
    ),
    "DCP alone": ({".metadata": ""}, "(DCP)", "accelerate merge-weights"),
    "a part of DCP": ({"__0_0.distcp": ""}, "without its .metadata", "copy all of it"),
    "verl": (
        {"model_world_size_2_rank_0.pt": "", "huggingface/config.json": CONFIG},
        "verl FSDP checkpoint",
        "verl.model_merger",
    ),
    "DeepSpeed": (
        {"config.json": CONFIG, "latest": "", "zero_to_fp32.py": "", "global_step5/mp_rank_00_model_states.pt": ""},
        "is a DeepSpeed checkpoint",
        "zero_to_fp32.py FOLDER OUT --safe_serialization",
    ),
    "DeepSpeed without the script": (
        {"latest": "", "global_step5/mp_rank_00_model_states.pt": ""},
        "is a DeepSpeed checkpoint without its zero_to_fp32.py",
        "--safe_serialization",
    ),
    "a step of DeepSpeed": ({"mp_rank_00_model_states.pt": ""}, "one step of a DeepSpeed checkpoint", "parent folder"),
    "Megatron": ({"latest_checkpointed_iteration.txt": "5", "iter_0000005/x": ""}, "Megatron", "export_ckpt"),
    "NeMo": ({"weights/x": "", "context/y": ""}, "NeMo", "export_ckpt"),
    "GGUF": (
        {"gemma-3-4b-it-Q4_K_M.gguf": "", "mmproj-model-f16.gguf": ""},
        "holds llama.cpp weights (GGUF): gemma-3-4b-it-Q4_K_M.gguf",
        "gguf_file='gemma-3-4b-it-Q4_K_M.gguf'",
    ),
    "Orbax": ({"_METADATA": "", "manifest.ocdbt": "", "d/0": ""}, "is a JAX checkpoint (Orbax)", "safetensors"),
    "Orbax in a folder": ({"gemma3-4b-it/_METADATA": "", "tokenizer.model": ""}, "(Orbax): gemma3-4b-it/", ""),
    "Flax": ({"config.json": CONFIG, "flax_model.msgpack": ""}, "holds Flax weights", "from_flax"),
    "TensorFlow": ({"config.json": CONFIG, "tf_model.h5": ""}, "holds TensorFlow weights", "from_tf"),
    "Keras": (
        {"config.json": '{"class_name": "Gemma3Backbone"}', "model.weights.h5": "", "metadata.json": "{}"},
        "is a Keras model: model.weights.h5",
        "export_to_transformers",
    ),
    "Kaggle's PyTorch": ({"model.ckpt": "", "tokenizer.model": ""}, "holds model.ckpt", "safetensors"),
    "ONNX": ({"config.json": CONFIG, "onnx/model.onnx": "", "onnx/model.onnx_data": ""}, "an ONNX model", "original"),
    "OpenVINO": (
        {"config.json": CONFIG, "openvino_model.xml": "", "openvino_model.bin": ""},
        "is an OpenVINO model",
        "pass the original model",
    ),
    "CTranslate2": (
        {"config.json": '{"bos_token": "<bos>"}', "model.bin": "", "vocabulary.json": "[]"},
        "is a CTranslate2 model",
        "pass the original model",
    ),
    "TensorRT-LLM": ({"config.json": "{}", "rank0.engine": ""}, "is a TensorRT engine", "original"),
    "a TensorRT-LLM checkpoint": ({"config.json": "{}", "rank0.safetensors": ""}, "TensorRT-LLM", "original"),
    "MLX in NumPy": ({"config.json": CONFIG, "weights.npz": ""}, "holds MLX weights in NumPy's format", "mlx-lm"),
    "a maker's own names": (
        {"params.json": "{}", "consolidated.safetensors": ""},
        "named by their author's own code: consolidated.safetensors",
        "the transformers layout",
    ),
    "diffusers": (
        {"model_index.json": "{}", "text_encoder/config.json": CONFIG},
        "is a diffusers pipeline",
        "FOLDER/text_encoder",
    ),
    "a run of ours": ({"run.json": "{}", "checkpoints/step-1/x": ""}, "is a run of t5g2 adapt", "FOLDER/model"),
    "checkpoints": (
        {"checkpoint-500/config.json": CONFIG, "checkpoint-1000/config.json": CONFIG, "checkpoint-2000/x": ""},
        "holds training checkpoints",
        "pass the newest: FOLDER/checkpoint-1000",
    ),
    "a folder of one model": (
        {"gemma/config.json": CONFIG},
        "holds no model, only folders with models",
        "FOLDER/gemma",
    ),
    "an archive": ({"gemma.tar.gz": ""}, "holds an archive: gemma.tar.gz", "unpack it"),
    "half a download": ({"config.json": CONFIG, "model.safetensors.incomplete": ""}, "unfinished", "again"),
    "empty": ({".cache/x": ""}, "is empty", "config.json"),
    "another name": (
        {"config.json": CONFIG, "gemma.safetensors": ""},
        "found gemma.safetensors but neither model.safetensors nor",
        "rename it to model.safetensors",
    ),
    "no index": (
        {"config.json": CONFIG, "model-00001-of-00002.safetensors": ""},
        "but neither",
        "copy model.safetensors.index.json as well",
    ),
    "a pickle": ({"config.json": CONFIG, "pytorch_model.bin": ""}, "never unpickled", "save_pretrained"),
    "nothing known": ({"notes.txt": ""}, "has no config.json, and neither model.safetensors nor", "complete model"),
}


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_I20_a_folder_is_described(case: str, tmp_path: Path) -> None:
    files, what, step = FOLDERS[case]
    folder = make(tmp_path / "folder", files)
    for read in (open_checkpoint, plan):
        with pytest.raises(CheckpointError) as refused:
            read(folder)
        error = refused.value
        assert error.exit_code == 3
        assert error.where == str(folder)
        assert what in error.message
        assert step.replace("FOLDER", str(folder)) in (error.hint or "")
        assert "{" not in error.message + (error.hint or "")
        assert "\n" not in str(error)


def test_every_kind_of_the_table_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    """A folder with the files of a row is always recognized, and its message is filled in."""
    for number, kind in enumerate(FORMATS):
        files = {
            f"{pattern.replace('*', '7').replace('[0-9]', '0')}{'x' * pattern.endswith('/')}" for pattern in kind.files
        }
        folder = make(tmp_path / str(number), dict.fromkeys(files, "{}"))
        with pytest.raises(CheckpointError) as refused:
            open_checkpoint(folder)
        message = f"{refused.value.message} {refused.value.hint}"
        assert "{" not in message, kind
        assert "neither model.safetensors" not in message, kind


@pytest.mark.parametrize("other_files", [[], ["blobs/x"], ["refs/main"]])
def test_a_model_in_the_cache_is_given_by_its_name_or_its_commit(other_files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "models--google--gemma-3-270m"
    make(folder, dict.fromkeys(["snapshots/abc/config.json", *(other_files or ["refs/main"])], CONFIG))
    with pytest.raises(CheckpointError, match="is a model in the Hub's cache") as refused:
        open_checkpoint(folder)
    assert refused.value.hint == f"give {folder}/snapshots/abc, or the name of the model, google/gemma-3-270m"


def test_terminal_escapes_in_an_adapter_name_are_escaped(tmp_path: Path) -> None:
    make(tmp_path, {"adapter_config.json": json.dumps({"base_model_name_or_path": "a\n\x1b[31mb"})})
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    assert "\n" not in refused.value.message
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("config", [PEFT, "{}", "not JSON", '{"base_model_name_or_path": 3, "peft_type": null}'])
def test_I17_an_adapter_next_to_weights_is_refused(config: str, demo_source: Path) -> None:
    (demo_source / "adapter_config.json").write_text(config)
    for read in (open_checkpoint, plan):
        with pytest.raises(CheckpointError, match="transformers loads both") as refused:
            read(demo_source)
        assert "merge_and_unload" in (refused.value.hint or "")
    # The solution in the hint.
    (demo_source / "A").mkdir()
    (demo_source / "adapter_config.json").rename(demo_source / "A/adapter_config.json")
    plan(demo_source)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transformers_weights": "other.safetensors"}, "transformers_weights names 'other.safetensors'"),
        ({"configuration_files": ["config.json", "config.5.0.0.json"]}, "configuration_files names config.5.0.0.json"),
    ],
)
def test_I17_files_that_transformers_prefers_are_refused(
    changes: dict[str, object], says: str, demo_source: Path
) -> None:
    path = demo_source / "config.json"
    config = json.loads(path.read_text())
    for harmless in ({"transformers_weights": None}, {"configuration_files": ["config.json"]}):
        path.write_text(json.dumps(config | harmless))
        open_checkpoint(demo_source)
    path.write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=says) as refused:
        open_checkpoint(demo_source)
    assert "remove the key" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("name", "what", "step"),
    [
        ("gemma.gguf", "is a llama.cpp file (GGUF), expected a checkpoint folder", "the original, unquantised model"),
        ("model.ckpt", "never unpickled", "safetensors"),
        ("gemma.zip", "is an archive", "unpack it"),
        ("gemma.tar.gz", "is an archive", "unpack it"),
        ("notes", "is a file, expected a checkpoint folder", "config.json"),
    ],
)
def test_a_single_file_is_described(name: str, what: str, step: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path / name)
    assert what in refused.value.message
    assert step in (refused.value.hint or "")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_whole_folder_leads_to_it(name: str, demo_source: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(demo_source / name)
    hint = refused.value.hint or ""
    assert hint == f"pass its folder, which has config.json: {demo_source}"
    open_checkpoint(Path(hint.rpartition(": ")[2]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Lightricks/LTX-2/text_encoder", "hf download Lightricks/LTX-2 --include 'text_encoder/*' --local-dir DIR"),
        ("google/gemma-3-270m:main", "google/gemma-3-270m@main"),
        ("google/gemma-3-270m/tree/main", "google/gemma-3-270m@main"),
        ("gemma-3-270m", "org/gemma-3-270m"),
    ],
)
def test_another_spelling_of_a_hub_model_is_recognized(text: str, says: str) -> None:
    assert says in spelling_hint(text)
    assert "config.json" in spelling_hint(text)


@pytest.mark.parametrize("text", ["/models/gemma", "./gemma", "~/gemma", "a b/c", "../x/y/z", ""])
def test_a_path_is_not_taken_for_a_model_of_the_hub(text: str) -> None:
    assert spelling_hint(text) == "pass the folder with config.json"


def test_a_folder_with_many_odd_names_is_checked_in_bounded_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "up").symlink_to("..")
    for number in range(12_000):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "up", ignore_errors=True)
