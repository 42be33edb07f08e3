"""The treatment of each file in a source folder: read, carried, rewritten, left behind, or named in a note."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.file_store import listed
from t5g2convert.checkpoint.folder import Checkpoint, some
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER
from t5g2convert.conversion.assets.aux_files import PlannedFile
from t5g2convert.errors import CheckpointError

Fate = Literal["read", "carried", "rewritten", "left behind", "unknown"]

READ: Final[Mapping[str, str]] = {
    "config.json": "model settings",
    "generation_config.json": "generation settings",
    INDEX_FILE: "index of the tensors' files",
}
"""Files that every conversion reads if they exist, with a description."""

LEFT_BEHIND: Final[Mapping[str, tuple[str, ...]]] = {
    "hidden file, not read by loaders": (".*", ".*/", "Thumbs.db", "desktop.ini", "__pycache__/", "lost+found/"),
    "documentation": (
        "README*", "*.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.png", "*.jpg", "*.gif", "*.svg",
        "*.pdf", "mergekit_config.yml", "Modelfile", "model_card*",
    ),
    "tokenizer file; tokenizer.json is used instead": (
        "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "vocab.json",
        "merges.txt",
    ),
    "image processor settings; this output has no image processor": (
        "preprocessor_config.json", "processor_config.json",
    ),
    "chat template; not used by this output": (
        "chat_template.jinja", "chat_template.json", TEMPLATES_FOLDER,
    ),
    "weights in another format; the safetensors are used instead": (
        "pytorch_model*", "tf_model*", "flax_model*", "*.gguf", "consolidated*", "params.json", "original/", "onnx/",
        "*.onnx", "*.onnx_data", "openvino*", "openvino*/", "coreml/",
    ),
    "training state or log": (
        "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states_*", "sampler*.bin", "trainer_state.json",
        "trainer_log.jsonl", "training_args.*", "*_results.json", "runs/", "wandb/", "logs/", "*.tfevents.*",
        "checkpoint-*/", "global_step*/", "zero_to_fp32.py", "latest", "latest_checkpointed_iteration.txt",
        "pytorch_model_fsdp*/",
    ),
    "the source's manifest; the output has its own": (MANIFEST_FILE,),
}  # fmt: skip
"""Known files that are left behind: the reason, and the patterns of their names. Folders end with a slash."""


@dataclass(frozen=True, slots=True)
class SourceItem:
    """A file or folder of the source, what happens to it, and why or how."""

    name: str
    fate: Fate
    because: str


def account_for(source: Checkpoint, planned: Sequence[PlannedFile]) -> tuple[SourceItem, ...]:
    """Return what happens to everything in a source folder, ordered by name.

    Args:
        source: The source.
        planned: The files that the output gets in addition to the weights.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    fates = {name: SourceItem(name, "read", because) for name, because in READ.items()}
    fates |= {name: SourceItem(name, "read", "the weights") for name in source.files}
    for file in planned:
        for name in file.reads:
            fates.setdefault(name, SourceItem(name, "read", f"for {file.name}"))
    for file in planned:
        if file.name in file.reads and file.how == "copied":
            fates[file.name] = SourceItem(file.name, "carried", "byte for byte")
        elif file.name in file.reads:
            fates[file.name] = SourceItem(file.name, "rewritten", "from the source's, modified")
    return tuple(fates.get(name) or _left(name) for name in sorted(_names(source, fates)))


def left_notes(items: Sequence[SourceItem]) -> Iterator[str]:
    """Yield one note that names the unknown files, if there are any."""
    unknown = [item.name for item in items if item.fate == "unknown"]
    if unknown:
        yield f"not carried: {some(unknown)}"


def _left(name: str) -> SourceItem:
    for because, patterns in LEFT_BEHIND.items():
        if any(name.endswith("/") == pattern.endswith("/") and fnmatchcase(name, pattern) for pattern in patterns):
            return SourceItem(name, "left behind", because)
    return SourceItem(name, "unknown", "unknown to the conversion; not carried")


def _names(source: Checkpoint, fates: Mapping[str, SourceItem]) -> Iterator[str]:
    """Yield everything at the top of the folder, and the files in its folder of chat templates if they are carried."""
    paths = source.hub.paths if source.hub is not None and source.hub.paths else _listed(source)
    carried = {name for name in fates if name.startswith(TEMPLATES_FOLDER)}
    for path in paths:
        inner = path.removeprefix(TEMPLATES_FOLDER)
        if path == TEMPLATES_FOLDER and carried:
            continue
        if "/" not in path.rstrip("/") or (
            path.startswith(TEMPLATES_FOLDER) and carried and "/" not in inner.rstrip("/")
        ):
            yield path


def _listed(source: Checkpoint) -> set[str]:
    """Return the names in the folder and in its folder of chat templates."""
    try:
        found = listed(source.path)
        if TEMPLATES_FOLDER in found:
            found |= {f"{TEMPLATES_FOLDER}{name}" for name in listed(source.path / TEMPLATES_FOLDER)}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=source.path) from None
    return found
