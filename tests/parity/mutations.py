"""Damage to a converted folder, with a manifest resealed to hide it, and the checks that must find it."""

import copy
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.checkpoint.header import read_header
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, encode_json, seal
from t5g2convert.cli.verify import print_report
from t5g2convert.parity.reports.html import html
from t5g2convert.parity.reports.report import Check, Report, junit
from t5g2convert.parity.verify import verify
from t5g2convert.reference.weights import DTYPES

PARITIES = ("vision_parity", "decoder_parity", "encoder_parity")
"""The checks that compare what both models compute."""

Tensors = dict[str, Tensor]
Document = dict[str, Any]

LAYER_ORDER = (
    "pre_self_attn_layernorm", "self_attn.q_proj", "self_attn.q_norm", "self_attn.k_proj", "self_attn.k_norm",
    "self_attn.v_proj", "self_attn.o_proj", "post_self_attn_layernorm", "pre_feedforward_layernorm", "mlp.gate_proj",
    "mlp.up_proj", "mlp.down_proj", "post_feedforward_layernorm",
)  # fmt: skip
"""The modules of a text layer in the order in which they are computed."""

VISION_ORDER = (
    "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
"""Those of a layer of the vision tower."""

TOWER = "model.encoder.vision_tower.vision_model."
PROJECTOR = "model.encoder.multi_modal_projector."
TABLE = "model.encoder.embed_tokens.weight"
EOI = "model.encoder.embed_tokens.eoi_embedding"


@dataclass
class Tally:
    """Count mutants and the checks that caught them; several checks may catch one mutant."""

    tried: int = 0
    caught: Counter[str] = field(default_factory=Counter)
    survivors: list[str] = field(default_factory=list)

    def add(self, label: str, report: Report) -> None:
        self.tried += 1
        names = {check.name for check in report.failed}
        self.caught.update(names | ({"parity"} if names & set(PARITIES) else set()))
        if report.passed:
            self.survivors.append(label)

    def close(self, family: str, at_least: int) -> None:
        """Keep the counts for the summary; require `at_least` mutants and no survivor."""
        CLOSED.append(self)
        assert self.survivors == []
        assert self.tried >= at_least, family


CLOSED: list[Tally] = []
"""The tallies that the test now running has closed."""


@dataclass
class Bench:
    """A conversion that is damaged, verified and restored repeatedly."""

    source: Path
    folder: Path
    sound: Mapping[str, bytes] = field(repr=False)
    shown: set[frozenset[tuple[str, bool, bool]]] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, source: Path, converted: Path, folder: Path) -> "Bench":
        shutil.copytree(converted, folder)
        return cls(source, folder, {path.name: path.read_bytes() for path in folder.iterdir()})

    def restore(self) -> None:
        """Undo everything."""
        for path in list(self.folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in self.sound or path.is_symlink() or not path.is_file():
                path.unlink()
        for name, contents in self.sound.items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != contents:
                path.write_bytes(contents)

    @contextmanager
    def tensors(self) -> Iterator[Tensors]:
        """Yield all tensors to change in place, and write them when the block ends."""
        buffers = {path: bytearray(path.read_bytes()) for path in sorted(self.folder.glob("*.safetensors"))}
        views: Tensors = {}
        for path, buffer in buffers.items():
            for entry in read_header(path).tensors.values():
                dtype = DTYPES[entry.dtype]
                flat = torch.frombuffer(buffer, dtype=dtype, count=entry.elements, offset=entry.start)
                views[entry.name] = flat.view(entry.shape)
        yield views
        for path, buffer in buffers.items():
            if buffer != path.read_bytes():
                path.write_bytes(buffer)

    def edit(self, name: str, change: Callable[[Document], object]) -> None:
        """Change a JSON file."""
        document = read_json_object(self.folder / name)
        change(document)
        (self.folder / name).write_bytes(encode_json(document))

    def reseal(self, change: Callable[[Document], object] | None = None) -> None:
        """Update the manifest to the files as they are now, apply `change`, and seal it."""
        manifest = read_json_object(self.folder / MANIFEST_FILE)
        manifest["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(self.folder.iterdir())
            if path.name != MANIFEST_FILE and path.is_file()
        }
        if change is not None:
            change(manifest)
        (self.folder / MANIFEST_FILE).write_bytes(seal(manifest))

    def judge(self, **options: Any) -> Report:
        """Verify, and render each new kind of report in every format: none may fail."""
        report = verify(self.folder, self.source, record=False, **options)
        shape = frozenset((check.name, check.passed, check.figures is None) for check in report.checks)
        if shape not in self.shown:
            self.shown.add(shape)
            json.dumps(report.to_json())
            print_report(report, Console(file=io.StringIO()))
            junit(report)
            html(report)
        return report

    def resealed(self, **options: Any) -> Report:
        """Reseal the manifest, verify, and restore the folder."""
        self.reseal()
        return self.judged(**options)

    def judged(self, **options: Any) -> Report:
        """Verify the folder as it is, and restore it."""
        try:
            return self.judge(**options)
        finally:
            self.restore()


def check_of(report: Report, name: str) -> Check:
    """Return the check of this name, the failed one first; `config` is checked twice."""
    found = [check for check in report.checks if check.name == name]
    assert found, f"{name} was not made"
    failed = [check for check in found if not check.passed]
    return failed[0] if failed else found[0]


def message_of(check: Check) -> str:
    """Return the detail and offenders of a check."""
    return "\n".join((check.detail, *check.offenders))


def departs(report: Report, name: str) -> str:
    """Return the first difference that a failed parity check reports."""
    check = check_of(report, name)
    assert not check.passed, f"{name} passed"
    assert check.figures is not None, check.detail
    assert check.figures.departs is not None
    assert check.figures.departs in check.detail
    return check.figures.departs


def place_of(name: str) -> tuple[str, str]:
    """Return the parity check of a tensor (not an embedding), and the expected start of `departs`."""
    if name.startswith(PROJECTOR):
        module = name.removeprefix(PROJECTOR).rpartition(".")[0]
        return "vision_parity", "multi_modal_projector" + (f", {module}" if module else "")
    if name.startswith(TOWER):
        rest = name.removeprefix(TOWER)
        if rest.startswith("encoder.layers."):
            _, _, number, module = rest.split(".", 3)
            return "vision_parity", f"encoder.layers.{number}, {module.rpartition('.')[0]}"
        if rest.startswith("post_layernorm"):
            return "vision_parity", "post_layernorm"
        return "vision_parity", "embeddings" + (", patch_embedding" if "patch" in rest else "")
    _, part, rest = name.split(".", 2)
    if rest == "norm.weight":
        return f"{part}_parity", f"{part} norm"
    _, number, module = rest.split(".", 2)
    return f"{part}_parity", f"{part} layers.{number} ({{kind}}), {module.removesuffix('.weight')}"


def earliest(names: list[str]) -> str:
    """Return the tensor that the forward pass uses first, among tensors of one part."""

    def rank(name: str) -> tuple[int, int]:
        number, module = name.partition("layers.")[2].split(".", 1)
        order = VISION_ORDER if name.startswith(TOWER) else LAYER_ORDER
        return int(number), order.index(module.rpartition(".")[0])

    return min(names, key=rank)


# Operators on one tensor


def flip_exponent(tensor: Tensor) -> None:
    """Flip one high exponent bit of the largest element."""
    _flip(tensor, {2: 0x0800, 4: 0x08000000}[tensor.element_size()])


def flip_sign(tensor: Tensor) -> None:
    """Flip the sign of the largest element."""
    _flip(tensor, {2: -0x8000, 4: -0x80000000}[tensor.element_size()])


def _flip(tensor: Tensor, bit: int) -> None:
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).view(-1)
    bits[int(tensor.float().abs().argmax())] ^= bit


def zero(tensor: Tensor) -> None:
    tensor.zero_()


def transpose(tensor: Tensor) -> None:
    """Store the transpose's bytes under the old shape; reverse a vector."""
    turned = tensor.flip(0) if tensor.ndim == 1 else tensor.transpose(0, -1).reshape(tensor.shape)
    tensor.copy_(turned.clone())


def put_nan(tensor: Tensor) -> None:
    tensor.view(-1)[tensor.numel() // 2] = torch.nan


def put_inf(tensor: Tensor) -> None:
    tensor.view(-1)[tensor.numel() // 3] = -torch.inf


def shift_rows(tensor: Tensor) -> None:
    """Move every row up by one."""
    tensor.copy_(tensor.roll(1, 0))


def double(tensor: Tensor) -> None:
    tensor.mul_(2)


OPERATORS = (flip_exponent, flip_sign, transpose, zero, put_nan, put_inf, shift_rows, double)


def exchange(tensors: Tensors, one: str, other: str) -> None:
    """Swap two tensors."""
    kept = tensors[one].clone()
    tensors[one].copy_(tensors[other].view(kept.shape))
    tensors[other].copy_(kept.view(tensors[other].shape))


def layer_names(tensors: Tensors, prefix: str, number: int) -> list[str]:
    """Return the names of a layer's tensors after `prefix`layers.N."""
    start = f"{prefix}layers.{number}."
    return [name.removeprefix(start) for name in tensors if name.startswith(start)]


# Settings


def leaves(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Return every scalar of a JSON document by its path."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def parent_of(document: Document, path: tuple[str | int, ...]) -> Any:
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    return node


def put(document: Document, path: tuple[str | int, ...], value: Any) -> None:
    parent_of(document, path)[path[-1]] = value


def setting_name(path: tuple[str | int, ...]) -> str:
    """Return the name that checks use, such as `decoder.layer_types`; a list is one setting."""
    return ".".join(str(key) for key in path if isinstance(key, str))


def plausible(path: tuple[str | int, ...], value: Any) -> Any:
    """Return a plausible other value."""
    named = {
        "sliding_attention": "full_attention", "full_attention": "sliding_attention", "linear": "default",
        "default": "linear", "gelu_pytorch_tanh": "gelu", "bfloat16": "float32", "float32": "bfloat16",
    }  # fmt: skip
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 if value else 0.1
    if value is None:
        return 5.0 if "softcap" in str(path[-1]) else 3
    return named.get(value, f"{value}x")


def dotted(document: Document, path: tuple[str, ...], value: Any) -> None:
    """Change a nested setting, and keep its old value under a dotted name, as checks spell it."""
    good = copy.deepcopy(parent_of(document, path)[path[-1]])
    put(document, path, value)
    document[".".join(path)] = good


MINIMA = {
    "one byte, images-8": 55,
    "one byte, text-float32": 55,
    "one byte, sealed": 60,
    "text layers, images-13": 80,
    "text layers, text-float32": 60,
    "vision, images-8": 70,
    "embedding": 25,
    "exchanged": 45,
    "fill": 5,
    "shards": 15,
    "structure": 20,
    "first generation, tensors": 250,
    "first generation, exchanged": 20,
    "first generation, settings": 70,
    "first generation, settings missing": 55,
    "first generation, structure": 8,
    "settings": 110,
    "settings that are computed with": 35,
    "settings missing": 100,
    "settings of a text-only target": 90,
    "a setting beside the weights": 400,
    "encoder taken out, text-float32": 80,
    "encoder taken out, images-8": 100,
    "decoder taken out, text-float32": 80,
    "decoder taken out, images-8": 100,
    "encoder taken out, exchanged": 20,
    "decoder taken out, exchanged": 20,
    "settings of a part, text-8": 30,
    "settings of a part, images-8": 50,
    "manifest": 25,
    "merged, keep": 80,
    "merged, float32": 80,
    "merged, lies": 13,
    "merged, other inputs": 9,
    "pairings, layers": 30,
    "pairings, settings": 14,
    "pairings, lies": 12,
}
"""Families of mutants, and how many of each must be tried at least; each family is a test of its own."""

MakeBench = Callable[..., Bench]
"""Makes a bench of a twin by its name; further arguments are those of `convert`."""


def close(tally: Tally, family: str) -> None:
    """Close a family with its minimum count."""
    tally.close(family, MINIMA[family])
