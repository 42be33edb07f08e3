"""Recognise folders of other formats by their file names, and suggest the step that makes a readable checkpoint.

The table below lists the formats: each pattern of a format must match a path. Nothing is unpickled, and only small JSON
files that name another model are opened.
"""

import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import ADAPTER_FILE, ADAPTER_RECORD, INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.file_store import REPO_ID, FileStore, HubOrigin
from t5g2convert.checkpoint.folder import found_in, some
from t5g2convert.errors import T5g2Error
from t5g2convert.printable import printable

"""The description of an adapter; transformers loads that adapter, whatever else is in the folder."""

ReadJson = Callable[[str], Mapping[str, Any] | None]
"""Reads a small JSON file of the folder; returns None if it is missing or not JSON."""

ORIGINAL: Final = "pass the original model in safetensors"
RELEASED: Final = "pass the same model in safetensors, such as google/gemma-3-270m from the Hub"


@dataclass(frozen=True, slots=True)
class Found:
    """A description of a folder, as the end of a sentence, and the step that makes a readable one."""

    what: str
    step: str


@dataclass(frozen=True, slots=True)
class Format:
    """A format that is not read, or a folder around it.

    Attributes:
        files: Patterns of paths in it; all must match, and folders end with a slash.
        what: The end of a sentence about the folder; `{file}` is the first path that matches the first pattern.
        step: The next step; `{folder}` is the folder.
    """

    files: tuple[str, ...]
    what: str
    step: str


THEN: Final = "then copy config.json and the tokenizer into OUT"
TORCH_SAVE: Final = "load it in PyTorch and save its tensors with safetensors.torch.save_file"
VERL: Final = "run: python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir OUT"
DEEPSPEED: Final = f"run: python {{folder}}/zero_to_fp32.py {{folder}} OUT --safe_serialization; {THEN}"
MERGE: Final = f"run: accelerate merge-weights {{folder}} OUT; {THEN}"
MERGE_INNER: Final = MERGE.replace("{folder}", "{folder}/{inner}")
MEGATRON: Final = "export it to the Hugging Face format (Megatron-Bridge: AutoBridge's export_ckpt)"
GGUF_STEP: Final = (
    "pass the original, unquantised model, or dequantise its text model with transformers: "
    "AutoModelForCausalLM.from_pretrained({folder_text!r}, gguf_file={file!r}).save_pretrained(OUT)"
)

FORMATS: Final = (
    Format(("adapters.safetensors",), "is a LoRA adapter of MLX{base}, not a model", "{fuse}"),
    Format(("adapters.npz",), "is a LoRA adapter of MLX{base}, not a model", "{fuse}"),
    Format(("run.json", "checkpoints/"), "is a run of t5g2 adapt", "pass the model that it exported: {folder}/model"),
    Format((ADAPTER_FILE,), "is {adapter}{base}, not a model", "{merge}"),
    Format(("adapter_model.*",), "is {adapter}{base}, not a model", "{merge}"),
    Format(("model_index.json",), "is a diffusers pipeline", "pass its text encoder: {folder}/text_encoder"),
    Format(("snapshots/", "refs/"), "is a model in the Hub's cache", "give {snapshot}"),
    Format(("snapshots/", "blobs/"), "is a model in the Hub's cache", "give {snapshot}"),
    Format(("models--*/",), "is the Hub's cache", "pass a model in it by name, as {cached}"),
    Format(("zero_to_fp32.py",), "is a DeepSpeed checkpoint", DEEPSPEED),
    Format(
        ("global_step*/",),
        "is a DeepSpeed checkpoint without its zero_to_fp32.py",
        f"copy that file from DeepSpeed (deepspeed/utils); {DEEPSPEED}",
    ),
    Format(("*_model_states.pt",), "is one step of a DeepSpeed checkpoint: {file}", "pass its parent folder"),
    Format(("pytorch_model_fsdp*/",), "is an FSDP checkpoint: {file}", MERGE_INNER),
    Format((".metadata",), "is a PyTorch distributed checkpoint (DCP)", MERGE),
    Format(("*.distcp",), "is part of a PyTorch distributed checkpoint (DCP), without its .metadata", "copy all of it"),
    Format(("*/.metadata",), "is a PyTorch distributed checkpoint (DCP): {file}", MERGE_INNER),
    Format(("model_world_size_*_rank_*.pt",), "is a verl FSDP checkpoint", VERL),
    Format(("latest_checkpointed_iteration.txt",), "is a Megatron checkpoint", MEGATRON),
    Format(("mp_rank_*/",), "is a Megatron checkpoint", MEGATRON),
    Format(("*.nemo",), "is a NeMo checkpoint: {file}", MEGATRON),
    Format(("model_config.yaml", "model_weights*"), "is a NeMo checkpoint", MEGATRON),
    Format(("weights/", "context/"), "is a NeMo checkpoint", MEGATRON),
    Format(("*.gguf",), "holds llama.cpp weights (GGUF): {file}", GGUF_STEP),
    Format(("_CHECKPOINT_METADATA",), "is a JAX checkpoint (Orbax)", RELEASED),
    Format(("manifest.ocdbt",), "is a JAX checkpoint (Orbax)", RELEASED),
    Format(("_METADATA",), "is a JAX checkpoint (Orbax)", RELEASED),
    Format(
        ("flax_model*.msgpack*",),
        "holds Flax weights: {file}",
        "save it with transformers 4: from_pretrained(..., from_flax=True)",
    ),
    Format(
        ("tf_model*.h5",),
        "holds TensorFlow weights: {file}",
        "save it with transformers 4: from_pretrained(..., from_tf=True)",
    ),
    Format(("saved_model.pb",), "is a TensorFlow SavedModel", RELEASED),
    Format(
        ("model*.weights.h5",),
        "is a Keras model: {file}",
        "keras_hub.models.Gemma3CausalLM.from_preset({folder_text!r}).export_to_transformers(OUT)",
    ),
    Format(("*.keras",), "is a Keras model: {file}", "load it in Keras and call export_to_transformers(OUT)"),
    Format(
        ("*.ckpt",),
        "holds {file}, a pickled checkpoint of gemma_pytorch or Lightning, which is never unpickled",
        f"{RELEASED}, or {TORCH_SAVE}",
    ),
    Format(("openvino*.xml",), "is an OpenVINO model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("model.bin", "*vocabulary.*"), "is a CTranslate2 model", f"it is an export: {ORIGINAL}"),
    Format(("*.onnx",), "is an ONNX model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("onnx/*.onnx",), "is an ONNX model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("*.engine",), "is a TensorRT engine: {file}", f"it is an export: {ORIGINAL}"),
    Format(("rank[0-9]*.safetensors",), "is a TensorRT-LLM checkpoint: {file}", f"it is an export: {ORIGINAL}"),
    Format(("*.tflite",), "is a LiteRT model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("*.task",), "is a MediaPipe model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("*.litertlm",), "is a LiteRT-LM model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("*.pte",), "is an ExecuTorch model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("*.mlpackage/",), "is a Core ML model: {file}", f"it is an export: {ORIGINAL}"),
    Format(("mlc-chat-config.json",), "is an MLC model", f"it is an export: {ORIGINAL}"),
    Format(
        ("weights*.npz",),
        "holds MLX weights in NumPy's format: {file}",
        "convert it again (newer mlx-lm writes safetensors), or better, pass the original model",
    ),
    Format(("*.npz",), "holds arrays in NumPy's format: {file}", ORIGINAL),
    Format(
        ("consolidated*.safetensors",),
        "holds weights named by their author's own code: {file}",
        "pass the same model in the transformers layout: config.json and model.safetensors",
    ),
    Format(("*.incomplete",), "holds an unfinished download: {file}", "download it again"),
    Format(("*.crdownload",), "holds an unfinished download: {file}", "download it again"),
    Format(("*.aria2",), "holds an unfinished download: {file}", "download it again"),
    Format(("checkpoint-*/",), "holds training checkpoints", "pass the newest: {folder}/{newest}"),
    Format(("*/config.json",), "holds no model, only folders with models", "pass one of them: {models}"),
    Format(
        ("*/adapter_config.json",),
        "holds an adapter but no model: {file}",
        "merge it into its base model first (peft: merge_and_unload)",
    ),
    Format(("*/*.gguf",), "holds llama.cpp weights (GGUF): {file}", GGUF_STEP),
    Format(("*/_METADATA",), "is a JAX checkpoint (Orbax): {file}", RELEASED),
    Format(("*.zip",), "holds an archive: {file}", "unpack it, and pass the folder with config.json"),
    Format(("*.tar",), "holds an archive: {file}", "unpack it, and pass the folder with config.json"),
    Format(("*.tar.*",), "holds an archive: {file}", "unpack it, and pass the folder with config.json"),
    Format(("*.tgz",), "holds an archive: {file}", "unpack it, and pass the folder with config.json"),
)
"""The first format that matches counts: unmistakable names come before names that are only hints."""

NOT_MERGED: Final = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"})
"""Kinds of peft adapters that consist of extra tokens and cannot be merged into the weights."""

FILES: Final[Mapping[str, tuple[str, str]]] = {
    ".safetensors": ("is a single weights file", "pass the folder with it and config.json"),
    ".gguf": ("is a llama.cpp file (GGUF)", "pass the folder of the original, unquantised model"),
    ".ckpt": ("is a pickle, which is never unpickled", "pass a folder with safetensors and config.json"),
    ".bin": ("is a pickle, which is never unpickled", "pass a folder with safetensors and config.json"),
    ".pt": ("is a pickle, which is never unpickled", "pass a folder with safetensors and config.json"),
    ".pth": ("is a pickle, which is never unpickled", "pass a folder with safetensors and config.json"),
    ".npz": ("is a file with NumPy arrays", "pass a folder with safetensors and config.json"),
    ".zip": ("is an archive", "unpack it, and pass the folder with config.json"),
    ".tar": ("is an archive", "unpack it, and pass the folder with config.json"),
    ".gz": ("is an archive", "unpack it, and pass the folder with config.json"),
    ".tgz": ("is an archive", "unpack it, and pass the folder with config.json"),
    ".nemo": ("is a NeMo checkpoint", MEGATRON + ", and pass the folder with config.json"),
    ".keras": ("is a Keras model", "export_to_transformers(OUT) writes a folder with config.json"),
    ".onnx": ("is an ONNX model, an export", "pass the folder of the original model, with config.json"),
    ".json": ("is a JSON file", "pass the folder with config.json"),
    ".yaml": ("is a YAML file", "pass the folder with config.json"),
}
"""Descriptions of single files and what to pass instead, by suffix."""


def recognise(paths: Collection[str], folder: str, read: ReadJson) -> Found | None:
    """Recognise the format of a folder that has neither model.safetensors nor its index.

    Args:
        paths: The paths of its first two levels; folders end with a slash.
        folder: Its name in commands.
        read: Reads one of its JSON files.

    Returns:
        The format; None if it is not in the table.
    """
    ordered = sorted(paths)
    if not any(not path.startswith(".") for path in ordered) and ".metadata" not in paths:
        return Found("is empty", "pass the folder with config.json")
    for form in FORMATS:
        matched = [_matching(pattern, ordered) for pattern in form.files]
        if all(matched):
            file = matched[0][0]
            words = {"file": file, "inner": file.partition("/")[0], "folder_text": folder}
            words |= _words(ordered, shlex.quote(folder), folder, read)
            return Found(_filled(form.what, words), _filled(form.step, words))
    return None


def adapter_beside(read: ReadJson) -> Found:
    """Describe a folder with an adapter next to the weights: transformers loads both."""
    config = read(ADAPTER_FILE) or {}
    return Found(
        f"holds {_adapter(config)} next to the weights ({ADAPTER_FILE}): transformers loads both",
        f"move {ADAPTER_FILE} and adapter_model.* into a folder A; then convert the model without them, or merge it "
        "first with peft: PeftModel.from_pretrained(model, A).merge_and_unload().save_pretrained(OUT)",
    )


def recognise_file(path: Path) -> Found:
    """Describe a single file that was passed instead of a folder."""
    what, step = FILES.get(path.suffix.lower(), ("", "pass the folder with config.json"))
    if path.suffix.lower() in (".safetensors", ".json") and (path.parent / "config.json").is_file():
        step = f"pass its folder, which has config.json: {path.parent}"
    return Found(f"{what or 'is a file'}, expected a checkpoint folder", step)


def spelling_hint(text: str) -> str:
    """Return a hint for an argument that is not a folder, for example a misspelt model name."""
    hint = "pass the folder with config.json"
    if found := re.fullmatch(rf"({REPO_ID}):([\w./-]+)", text, re.ASCII):
        return f"{hint}; pass a model on the Hub and its revision as {found[1]}@{found[2]}"
    if found := re.fullmatch(rf"({REPO_ID})/(?:tree|resolve|blob)/([\w.-]+)/?", text, re.ASCII):
        return f"{hint}; pass a model on the Hub and its revision as {found[1]}@{found[2]}"
    if found := re.fullmatch(rf"({REPO_ID})/(\w[\w./-]*?)/?", text, re.ASCII):
        return (
            f"{hint}; download a folder inside a Hub model first: "
            f"hf download {found[1]} --include '{found[2]}/*' --local-dir DIR, then pass DIR/{found[2]}"
        )
    if re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        return f"{hint}; pass a model on the Hub with its owner, as org/{text}"
    return hint


def _matching(pattern: str, ordered: list[str]) -> list[str]:
    """Return the paths that match a pattern; a star does not match a slash."""
    depth = pattern.rstrip("/").count("/")
    return [
        path
        for path in ordered
        if path.rstrip("/").count("/") == depth
        and path.endswith("/") == pattern.endswith("/")
        and fnmatchcase(path, pattern)
    ]


def _filled(template: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)(!r)?\}", lambda found: repr(words[found[1]]) if found[2] else words[found[1]], template)


def _words(ordered: list[str], folder: str, plain: str, read: ReadJson) -> dict[str, str]:
    """Return the values of a format's placeholders: the models and folders that a folder names.

    `folder` is quoted for a shell, `plain` is not.
    """
    config = read(ADAPTER_FILE) or {}
    base = _text(config.get("base_model_name_or_path")) or _text(config.get("model"))
    where = base or "BASE"
    merge = (
        f"merge it first with peft: PeftModel.from_pretrained(base, {plain!r}).merge_and_unload().save_pretrained(OUT)"
    )
    merge += f", where base is {where} loaded in transformers; save the tokenizer there too"
    if ADAPTER_RECORD in ordered or "T5Gemma2" in str(config.get("auto_mapping")):
        merge = f"t5g2 merge {where} {folder} OUTPUT makes a model of it"
    if config.get("peft_type") in NOT_MERGED:
        merge = f"it cannot be merged into weights: pass its base model{f', {base}' if base else ''}"
    models = [path.removesuffix("/config.json") for path in _matching("*/config.json", ordered)]
    return {
        "base": f" of {base}" if base else "",
        "adapter": _adapter(config),
        "merge": merge,
        "fuse": f"merge it first: mlx_lm.fuse --model {where} --adapter-path {folder} --save-path OUT",
        "models": ", ".join(f"{folder}/{printable(name)}" for name in models[:3]) + (", ..." if models[3:] else ""),
        "newest": _newest(ordered, models),
        "folder": folder,
        "snapshot": _snapshot(ordered, plain),
        "cached": next((_repo(path.rstrip("/")) for path in ordered if path.startswith("models--")), "org/name"),
    }


def _adapter(config: Mapping[str, Any]) -> str:
    """Name the kind of an adapter; the default is LoRA."""
    kind = _text(config.get("peft_type")) or "LORA"
    return {"LORA": "a LoRA adapter", "IA3": "an IA3 adapter"}.get(kind, f"a peft adapter ({kind})")


def _text(value: object) -> str | None:
    return printable(value[:200]) if isinstance(value, str) and value else None


def _newest(ordered: list[str], models: list[str]) -> str:
    """Return the folder of the last step, preferring folders with a config.json."""
    names = [path.rstrip("/") for path in _matching("checkpoint-*/", ordered)]
    whole = [name for name in names if name in models] or names or ["checkpoint-N"]
    numbered = {name: re.fullmatch(r"checkpoint-(\d{1,18})", name) for name in whole}
    return max(whole, key=lambda name: (int(found[1]) if (found := numbered[name]) else -1, name))


def _snapshot(ordered: list[str], folder: str) -> str:
    """Suggest how to pass a model in the Hub's cache: by its name, or as the folder of a commit."""
    names = [path.rstrip("/") for path in _matching("snapshots/*/", ordered)]
    repo = _repo(Path(folder).name)
    commits = ", ".join(f"{folder}/{name}" for name in names[:2])
    return f"{commits or 'a folder in snapshots/'}{f', or the name of the model, {repo}' if repo != 'org/name' else ''}"


def _repo(name: str) -> str:
    """Return the model that a folder of the cache is named after."""
    kind, *parts = name.split("--")
    return printable("/".join(parts)) if kind == "models" and len(parts) == 2 else "org/name"


def no_weights(store: FileStore, hub: HubOrigin | None) -> T5g2Error:
    """Return the error for a folder or model without a safetensors checkpoint."""
    if found := found_in(store.paths(), store.path, hub):
        return store.incomplete(found.what, found.step)
    names = list(store.names())
    shards = [name for name in names if Path(name).suffix == ".safetensors"]
    if len(shards) == 1 and re.search(r"-\d+-of-\d+", shards[0]) is None:
        return store.incomplete(
            f"found {shards[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}",
            f"if it is the complete model, rename it to {SINGLE_FILE}",
        )
    if shards:
        return store.incomplete(
            f"found {some(shards)} but neither {SINGLE_FILE} nor {INDEX_FILE}",
            f"copy {INDEX_FILE} as well",
        )
    others = [name for name in names if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl"}]
    if others:
        return store.incomplete(
            f"has no safetensors weights, only {some(others)}, which are never unpickled",
            "load it in transformers and call save_pretrained",
        )
    more = "" if "config.json" in names else "no config.json, and "
    return store.incomplete(f"has {more}neither {SINGLE_FILE} nor {INDEX_FILE}", "pass the folder of a complete model")
