"""One mutant of every class, each with the checks that must find it; tests/parity/test_damaged_*.py try thousands."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import convert
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from tests.conftest import TwinFolder
from tests.parity.mutations import (
    EOI,
    MINIMA,
    PROJECTOR,
    TABLE,
    TOWER,
    Bench,
    Tensors,
    exchange,
    flip_exponent,
    put,
    put_nan,
    shift_rows,
    transpose,
    zero,
)

pytestmark = pytest.mark.usefixtures("same_source")

ENCODER: Final = "model.encoder.layers.4."
DECODER: Final = "model.decoder.layers.4."

Damage = Callable[[Bench], object]


def tensor(name: str, change: Callable[[torch.Tensor], object]) -> Damage:
    """Change one tensor in place."""

    def damage(made: Bench) -> None:
        with made.tensors() as tensors:
            change(tensors[name])

    return damage


def exchanged(one: str, other: str) -> Damage:
    def damage(made: Bench) -> None:
        with made.tensors() as tensors:
            exchange(tensors, one, other)

    return damage


def rewritten(change: Callable[[Tensors], object]) -> Damage:
    """Save the file again with other names, dtypes or shapes."""

    def damage(made: Bench) -> None:
        path = made.folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def setting(path: str, value: object, file: str = "config.json") -> Damage:
    return lambda made: made.edit(file, partial(put, path=tuple(path.split(".")), value=value))


def byte(name: str, at: int) -> Damage:
    """Change one byte of a file."""

    def damage(made: Bench) -> None:
        data = bytearray((made.folder / name).read_bytes())
        data[at] ^= 1
        (made.folder / name).write_bytes(data)

    return damage


CONVERSIONS: Final[dict[str, tuple[str, Damage, set[str]]]] = {
    "attention, encoder": (
        "images-8", tensor(f"{ENCODER}self_attn.q_proj.weight", transpose), {"provenance", "encoder_parity"}
    ),
    "MLP, decoder": (
        "images-8", tensor(f"{DECODER}mlp.up_proj.weight", flip_exponent), {"provenance", "decoder_parity"}
    ),
    "norm, decoder": ("text-float32", tensor("model.decoder.norm.weight", zero), {"provenance", "decoder_parity"}),
    "tower": (
        "images-8",
        tensor(f"{TOWER}encoder.layers.0.mlp.fc1.bias", put_nan),
        {"provenance", "vision_parity"},
    ),
    "projector": (
        "images-8", tensor(f"{PROJECTOR}mm_input_projection_weight", shift_rows), {"provenance", "vision_parity"}
    ),
    "embedding": ("images-8", tensor(TABLE, shift_rows), {"provenance", "decoder_parity", "encoder_parity"}),
    "end of image": ("images-8", tensor(EOI, zero), {"provenance", "decoder_parity"}),
    "two layers": (
        "images-8", exchanged(f"{DECODER}mlp.gate_proj.weight", "model.decoder.layers.5.mlp.gate_proj.weight"),
        {"provenance", "decoder_parity"},
    ),
    "two modules": (
        "images-8", exchanged(f"{ENCODER}mlp.gate_proj.weight", f"{ENCODER}mlp.up_proj.weight"),
        {"provenance", "encoder_parity"},
    ),
    "missing tensor": (
        "images-8", rewritten(lambda tensors: tensors.pop(f"{DECODER}mlp.up_proj.weight")), {"provenance", "config"}
    ),
    "other dtype": (
        "images-8", rewritten(lambda tensors: tensors.update({EOI: tensors[EOI].half()})), {"provenance"}
    ),
    "window": ("images-8", setting("decoder.sliding_window", 9), {"config"}),
    "epsilon": ("images-8", setting("decoder.rms_norm_eps", 0.1), {"config", "decoder_parity"}),
    "setting missing": (
        "images-8", lambda made: made.edit("config.json", lambda it: it["decoder"].pop("head_dim")), {"config"}
    ),
    "first generation, cross-attention": (
        "gemma2-5", tensor(f"{DECODER}cross_attn.k_proj.weight", transpose), {"provenance", "cross_parity"}
    ),
    "first generation, setting": ("gemma2-5", setting("decoder.query_pre_attn_scalar", 5), {"config"}),
}  # fmt: skip
"""By class: the twin, the damage, and checks that must fail once the manifest lists the damaged files."""

UNSEALED: Final[dict[str, Damage]] = {
    "byte of a shard": byte("model.safetensors", -3),
    "byte of config.json": byte("config.json", 40),
    "byte of the manifest": byte(MANIFEST_FILE, 60),
    "file more": lambda made: (made.folder / "pytorch_model.bin").write_bytes(b"x"),
    "file less": lambda made: (
        (made.folder / "generation_config.json").unlink(missing_ok=True) or (made.folder / "config.json").unlink()
    ),
}
"""Damage that integrity finds, as the manifest is left as it was."""

FALSE_FIELDS: Final[dict[str, Callable[[dict[str, object]], object]]] = {
    "parameters": lambda it: it.update(parameters={"total": 1}),
    "map": lambda it: it.update(mapping={"name": "mine", "sha256": "d" * 64}),
    "declared change": lambda it: it.update(changes=[{"field": "sliding_window", "source": 5, "target": 6}]),
}


@pytest.mark.parametrize("label", CONVERSIONS)
def test_a_conversion(label: str, bench: Callable[..., Bench]) -> None:
    twin, damage, expected = CONVERSIONS[label]
    made = bench(twin)
    damage(made)
    assert {check.name for check in made.resealed().failed} >= expected


@pytest.mark.parametrize("label", UNSEALED)
def test_a_file(label: str, bench: Callable[..., Bench], without_use: None) -> None:
    made = bench("images-8")
    UNSEALED[label](made)
    assert "integrity" in {check.name for check in made.judged().failed}


@pytest.mark.parametrize("label", FALSE_FIELDS)
def test_a_manifest(label: str, bench: Callable[..., Bench], without_use: None) -> None:
    made = bench("images-8")
    made.reseal(FALSE_FIELDS[label])
    assert {check.name for check in made.judged().failed} & {"integrity", "provenance"}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_extract(part: str, converted_twin: TwinFolder, tmp_path: Path) -> None:
    convert(converted_twin("text-float32"), tmp_path / part, part=part)
    made = Bench.of(converted_twin("text-float32"), tmp_path / part, tmp_path / "damaged")
    with made.tensors() as tensors:
        name = next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight"))
        zero(tensors[name])
    assert {check.name for check in made.resealed().failed} >= {"provenance", f"{part}_parity"}


def test_every_family_of_mutants_has_a_minimum() -> None:
    assert sum(MINIMA.values()) > 2000
