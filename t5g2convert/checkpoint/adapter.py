"""A LoRA adapter as peft saves it: which tensors of a T5Gemma 2 it changes, and the matrices that change them.

peft names a matrix after its module in transformers: `base_model.model.MODULE.lora_A.weight`. Its module names differ
from the names of tensors on disk, and between versions; `t5gemma2_spellings` knows all of them.

A LoRA adapter changes a weight W [out, in] to W + s B A, with A [r, in] and B [out, r], where s is alpha / r, or
alpha / sqrt(r) with rsLoRA (arXiv 2106.09685, 2312.03732). What else a setting of peft may change is refused by name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import PositiveInt

from t5g2convert.checkpoint.families.config_section import ConfigSection, Number, parse_section
from t5g2convert.checkpoint.families.t5gemma2_spellings import COPIES, TABLE, published_name
from t5g2convert.checkpoint.file_names import ADAPTER_FILE, ADAPTER_WEIGHTS
from t5g2convert.checkpoint.file_store import is_there, regular_file
from t5g2convert.checkpoint.folder import check_folder, read_json_object
from t5g2convert.checkpoint.header import CONFIG_NAMES, TensorEntry, read_header
from t5g2convert.errors import CheckpointError

MERGE_ELSEWHERE: Final = (
    "merge it with peft (merge_and_unload, then save_pretrained); t5g2 verify OUTPUT --source MODEL judges the result"
)

WITHOUT_EFFECT: Final = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "target_modules", "task_type",
})  # fmt: skip
"""Settings that do not change W + s B A: which modules were chosen, how A and B began, and what training did."""

INITIALISATIONS: Final = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model alone; PiSSA, OLoRA, CorDA and others change its weights."""

SHARED: Final = "the embedding table, which encoder, decoder and softmax share"

_MATRIX: Final = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class LoraConfig(ConfigSection):
    """The settings of adapter_config.json that decide what is added to the weights."""

    peft_type: str
    r: PositiveInt
    lora_alpha: Number
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, Number] | None = None
    init_lora_weights: bool | str | None = True


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A tensor that an adapter changes.

    Attributes:
        name: Its published name.
        module: Its module, as the adapter spells it.
        down: The matrix A, [r, in], in the adapter's file.
        up: The matrix B, [out, r].
        rank: r.
        alpha: The numerator of the scale.
    """

    name: str
    module: str
    down: TensorEntry
    up: TensorEntry
    rank: int
    alpha: float

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of B A, which is that of the tensor."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An open LoRA adapter; its matrices are read from `weights` by their positions.

    Attributes:
        path: Its folder.
        base: The model it was trained on, as peft recorded it: a name on the Hub or a path; None if unknown.
        rslora: Whether the scale is alpha / sqrt(r) instead of alpha / r.
        targets: The tensors that it changes, by published name.
    """

    path: Path
    base: str | None
    rslora: bool
    targets: Mapping[str, LoraTarget]

    @property
    def weights(self) -> Path:
        """The file with the matrices."""
        return self.path / ADAPTER_WEIGHTS


def open_adapter(folder: Path) -> Adapter:
    """Open a LoRA adapter for a T5Gemma 2: read its settings and the header of its matrices.

    ```python
    adapter = open_adapter(Path("adapter"))
    adapter.targets["model.decoder.layers.0.self_attn.q_proj.weight"].rank
    ```

    Raises:
        CheckpointError: The folder is not an adapter; it is another kind than plain LoRA; or it changes something else
            than matrices of linear layers. The details list all offending tensors.
    """
    check_folder(folder)
    _check_files(folder)
    where = folder / ADAPTER_FILE
    document = read_json_object(where)
    _check_settings(document, where)
    config = parse_section(LoraConfig, document, where)
    matrices: dict[str, dict[str, TensorEntry]] = {}
    faults: list[str] = []
    for entry in read_header(folder / ADAPTER_WEIGHTS).tensors.values():
        found = _MATRIX.fullmatch(entry.name)
        if found is None:
            faults.append(_refused(entry.name))
        else:
            matrices.setdefault(found[1], {})[found[2]] = entry
    targets: dict[str, LoraTarget] = {}
    for module, pair in matrices.items():
        target = _target(module, pair, config, where, faults)
        if target is not None and target.name in targets:
            faults.append(f"{module} and {targets[target.name].module} are the same module")
        elif target is not None:
            targets[target.name] = target
    if faults:
        message = f"{len(faults)} tensor(s) cannot be merged, first {faults[0]}"
        # peft would merge a shared table into one of its copies alone.
        hint = (
            "train an adapter of linear layers alone" if any(SHARED in fault for fault in faults) else MERGE_ELSEWHERE
        )
        raise CheckpointError(message, where=folder / ADAPTER_WEIGHTS, details=faults, hint=hint)
    if not targets:
        raise CheckpointError("holds no LoRA matrices", where=folder / ADAPTER_WEIGHTS)
    base = document.get("base_model_name_or_path")
    return Adapter(folder, base if isinstance(base, str) and base else None, config.use_rslora, targets)


def _check_files(folder: Path) -> None:
    if not is_there(folder / ADAPTER_FILE):
        below = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_FILE}"))
        hint = f"pass one of its folders: {', '.join(below[:5])}" if below else "pass the folder that peft saved"
        raise CheckpointError(f"is not a peft adapter: it has no {ADAPTER_FILE}", where=folder, hint=hint)
    if is_there(folder / ADAPTER_WEIGHTS):
        regular_file(folder / ADAPTER_WEIGHTS)
    elif is_there(folder / "adapter_model.bin"):
        raise CheckpointError(
            "has its weights in adapter_model.bin, which is never unpickled",
            where=folder,
            hint="load it with peft and call save_pretrained",
        )
    else:
        raise CheckpointError(f"has no {ADAPTER_WEIGHTS}", where=folder)


def _check_settings(document: Mapping[str, Any], where: Path) -> None:
    """Refuse an adapter that adds something else than s B A to the weights, or may do so.

    Raises:
        CheckpointError: A setting is not known to have no effect.
    """
    kind = document.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"peft_type is {kind!r}: only LORA can be merged", where=where, hint=MERGE_ELSEWHERE)
    start = document.get("init_lora_weights", True)
    if start is not None and start not in INITIALISATIONS:
        raise CheckpointError(
            f"init_lora_weights is {start!r}, which also changes the weights of the base model",
            where=where,
            hint="save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )
    known = WITHOUT_EFFECT | LoraConfig.model_fields.keys()
    # What is absent, empty or off has no effect, whatever it is.
    others = {key: value for key, value in document.items() if key not in known and value not in (None, False, "")}
    others = {key: value for key, value in others.items() if value not in ([], {}) and (key, value) != ("bias", "none")}
    if others:
        key = sorted(others)[0]
        raise CheckpointError(
            f"{key} is {str(others[key])[:80]}: only plain LoRA can be merged, without {', '.join(sorted(others))}",
            where=where,
            hint=MERGE_ELSEWHERE,
        )


def _target(
    module: str, pair: Mapping[str, TensorEntry], config: LoraConfig, where: Path, faults: list[str]
) -> LoraTarget | None:
    """Return the target of two matrices; None, and lines in `faults`, if they do not fit each other."""
    name = published_name(f"{module}.weight")
    found = list(_pair_faults(module, name, pair))
    if found:
        faults += found
        return None
    down, up = pair["A"], pair["B"]
    rank = (config.rank_pattern or {}).get(_pattern_for(module, config.rank_pattern or {}, where), config.r)
    alpha = (config.alpha_pattern or {}).get(_pattern_for(module, config.alpha_pattern or {}, where), config.lora_alpha)
    if down.shape[0] != rank:
        faults.append(f"{module} has matrices of rank {down.shape[0]}, but {ADAPTER_FILE} says {rank}")
        return None
    return LoraTarget(name, module, down, up, rank, alpha)


def _pair_faults(module: str, name: str, pair: Mapping[str, TensorEntry]) -> Iterator[str]:
    if name == TABLE or name in COPIES:
        yield f"{module} is {SHARED}: peft changes one of them alone"
        return
    if pair.keys() != {"A", "B"}:
        yield f"{module} has no lora_{'B' if 'A' in pair else 'A'}"
        return
    down, up = pair["A"], pair["B"]
    for entry in (down, up):
        if entry.dtype not in CONFIG_NAMES:
            yield f"{entry.name} has dtype {entry.dtype}, expected one of {', '.join(CONFIG_NAMES)}"
    if len(down.shape) != 2 or len(up.shape) != 2:
        yield f"{module} is not a linear layer: its matrices have shapes {list(down.shape)} and {list(up.shape)}"
    elif down.shape[0] != up.shape[1]:
        yield f"{module} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, which cannot be multiplied"


def _refused(name: str) -> str:
    """Say why a tensor of an adapter cannot be merged."""
    reasons = {
        "lora_embedding_": f"changes {SHARED}: peft changes one of them alone",
        "lora_magnitude_vector": "belongs to DoRA",
        "lora_B.bias": "is a bias of LoRA",
        "base_model.model.": "is a whole tensor that was trained too",
    }
    return f"{name} {next((reason for part, reason in reasons.items() if part in name), 'is not a LoRA matrix')}"


def _pattern_for(module: str, patterns: Mapping[str, object], where: Path) -> str:
    """Return the first of peft's patterns that matches a module to its end, on whole names; else the module.

    Raises:
        CheckpointError: A pattern is not a regular expression.
    """
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error as error:
            raise CheckpointError(f"{pattern!r} is not a valid pattern: {error}", where=where) from None
    return module
