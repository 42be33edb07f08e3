import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, convert
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.manifest import Manifest, read_manifest
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.parity.checks import provenance_bytes
from t5g2convert.parity.checks.provenance import judge_provenance
from t5g2convert.parity.replay import Replay, replay_plan
from t5g2convert.parity.reports.report import Check
from t5g2convert.parity.source_models import Gemma3Source
from tests.conftest import TwinFolder
from tests.models.twins import IMAGE_SPELLINGS, TWINS, Tensors, respell

TABLE = "model.encoder.embed_tokens.weight"
EOI = "model.encoder.embed_tokens.eoi_embedding"


ROW = 96
"""Bytes of the longest row of a table here: a scaled row is computed as a whole, pieces are never smaller."""


def silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Conversion:
    """A source and its conversion; the test may change both."""

    source: Path
    output: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "t5g2.json").read_text()))

    def plan(self, mapping: str | None = None) -> Plan:
        return replay_plan(Sources.open(self.source), self.manifest["options"], mapping)

    def judge(self, plan: Plan | None = None, manifest: dict[str, Any] | None = None) -> Check:
        """Check against the folder's own manifest, the given one, or none (an empty one)."""
        source, target = Gemma3Source(Sources.open(self.source)), open_checkpoint(self.output)
        document = self.manifest if manifest is None else manifest
        parsed = Manifest.parse(document, self.output / "t5g2.json") if document else None
        return judge_provenance(Replay(plan or self.plan()), source, target, parsed, silent)

    def flip(self, tensor: str, at: int, *, folder: Path | None = None) -> None:
        """Flip one bit of a tensor in the output, or in the given folder."""
        folder = folder or self.output
        stored = open_checkpoint(folder).tensors[tensor]
        with (folder / stored.file).open("r+b") as file:
            position = stored.entry.start + at % stored.entry.nbytes
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))


Make = Callable[..., Conversion]


@pytest.fixture
def made(twin_folder: TwinFolder, tmp_path: Path) -> Make:
    def make(name: str = "images-8", **options: Any) -> Conversion:
        shutil.copytree(twin_folder(name), tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "out", flush=False, **options)
        return Conversion(tmp_path / "source", tmp_path / "out")

    return make


# Sound conversions


@pytest.mark.parametrize("piece", [ROW, 1000, provenance_bytes.PIECE_BYTES])
def test_pieces_of_any_size_find_the_same(piece: int, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance_bytes, "PIECE_BYTES", piece)
    check = made().judge()
    assert check.passed, check.offenders


@pytest.mark.parametrize("name", [twin.name for twin in TWINS])
def test_every_tensor_of_a_twin_is_accounted_for(
    name: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    sound = Conversion(twin_folder(name), converted_twin(name))
    check = sound.judge()
    assert check.passed, check.offenders
    counted = sum(int(part.split()[0]) for part in check.detail.partition(";")[0].split(", ") if part[0].isdigit())
    assert counted == len(open_checkpoint(sound.output).tensors)
    assert ("cut" in check.detail) == name.endswith("with-fill")
    assert ("dropped" in check.detail) == (name == "images-with-head")


@pytest.mark.parametrize("piece", [ROW, 1 << 24])
@pytest.mark.parametrize(
    ("name", "dtype", "rounded"),
    [
        ("text-float16", "float32", False),
        ("images-8", "float32", False),
        ("images-float32", "bfloat16", True),
        ("text-float16", "bfloat16", True),
    ],
)
def test_casts_are_recomputed(
    name: str, dtype: str, rounded: bool, piece: int, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = made(name, dtype=dtype)
    monkeypatch.setattr(provenance_bytes, "PIECE_BYTES", piece)
    check = cast.judge()
    assert check.passed, check.offenders
    assert ("of the source were rounded" in check.detail) == rounded
    assert ("can be reconstructed" in check.detail) == (not rounded)
    cast.flip("model.decoder.norm.weight", 5)
    assert any("model.decoder.norm.weight" in fault for fault in cast.judge().offenders)


def test_the_source_layout_is_read_again(made: Make, tmp_path: Path) -> None:
    sound = made()
    respell(sound.source, tmp_path / "respelled", IMAGE_SPELLINGS["transformers-5.4"])
    check = replace(sound, source=tmp_path / "respelled").judge()
    assert not any(" is not " in fault and "model.encoder.layers" in fault for fault in check.offenders)


# Faults


@pytest.mark.sampled
@pytest.mark.parametrize("piece", [ROW, 1 << 24])
@pytest.mark.parametrize(
    "name", [TABLE, EOI, "model.decoder.layers.7.mlp.down_proj.weight", "model.encoder.norm.weight"]
)
def test_V1_one_flipped_bit_names_its_element(
    name: str, piece: int, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance_bytes, "PIECE_BYTES", piece)
    sound = made()
    shape = open_checkpoint(sound.output).tensors[name].entry.shape
    count = int(torch.tensor(shape).prod())
    for element in (0, count // 3, count - 1):
        sound.flip(name, 2 * element + 1)
        (fault,) = sound.judge().offenders
        place = [int(axis) for axis in torch.unravel_index(torch.tensor(element), shape)]
        assert fault.startswith(f"{name}{place} is not")
        sound.flip(name, 2 * element + 1)
    assert sound.judge().passed


def test_nonzero_values_in_a_zero_tensor_are_found(made: Make) -> None:
    sound = made("text-8")
    for name in (EOI, "model.encoder.multi_modal_projector.mm_input_projection_weight"):
        sound.flip(name, 9)
        (fault,) = sound.judge().offenders
        assert name in fault
        assert "not zero" in fault
        sound.flip(name, 9)
    assert sound.judge().passed


def test_every_faulty_tensor_is_listed_once(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance_bytes, "PIECE_BYTES", ROW)
    faulty = made()
    names = [f"model.{part}.layers.{layer}.mlp.up_proj.weight" for part in ("encoder", "decoder") for layer in (1, 4)]
    for name in names:
        faulty.flip(name, 3)
        faulty.flip(name, 900)
    assert sorted(fault.partition("[")[0] for fault in faulty.judge().offenders) == sorted(names)


def test_a_changed_source_byte_fails_every_tensor_derived_from_it(made: Make) -> None:
    sound = made()
    sound.flip("language_model.model.layers.2.mlp.up_proj.weight", 0, folder=sound.source)
    *faults, another = sound.judge().offenders
    assert [fault.partition("[")[0] for fault in faults] == [
        "model.encoder.layers.2.mlp.up_proj.weight",
        "model.decoder.layers.2.mlp.up_proj.weight",
    ]
    assert re.match(r"t5g2.json records sha256 \w+ for model.safetensors of the source, but it has ", another)


def test_names_dtypes_and_shapes_are_checked_first(made: Make) -> None:
    faulty = made()
    tensors = load_file(faulty.output / "model.safetensors")
    tensors["model.decoder.norm.bias"] = tensors.pop("model.decoder.norm.weight")
    tensors["model.encoder.norm.weight"] = tensors["model.encoder.norm.weight"].float()
    tensors[TABLE] = tensors[TABLE][:-1].clone()
    save_file(tensors, faulty.output / "model.safetensors", {"format": "pt"})
    assert set(faulty.judge().offenders) == {
        "model.decoder.norm.weight is missing",
        "model.decoder.norm.bias does not come from the source",
        "model.encoder.norm.weight is F32 [24], expected BF16 [24]",
        f"{TABLE} is BF16 [299, 24], expected BF16 [300, 24]",
    }


def test_a_copied_file_that_differs_from_the_source_is_named(made: Make, demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "out")
    carried = Conversion(demo_source, tmp_path / "out")
    assert carried.judge().passed
    with (tmp_path / "out/tokenizer.json").open("a") as file:
        file.write(" ")
    (tmp_path / "out/tokenizer_config.json").unlink()
    faults = carried.judge().offenders
    assert len(faults) == 2
    assert faults[0].startswith("tokenizer.json")
    assert faults[1].startswith("tokenizer_config.json cannot be read")


def test_an_undeclared_dropped_tensor_is_reported_as_lost(made: Make) -> None:
    sound = made("images-with-head")
    plan = sound.plan()
    assert plan.dropped
    check = sound.judge(replace(plan, dropped=()), manifest={})
    assert not check.passed
    assert len(check.offenders) == len(plan.dropped)
    assert all("cannot be reconstructed" in fault for fault in check.offenders)


def test_a_head_that_was_dropped_as_a_copy_must_be_one(made: Make, tmp_path: Path) -> None:
    sound = made()
    respell(sound.source, tmp_path / "respelled", IMAGE_SPELLINGS["raw-state-dict-4.50"])
    convert(tmp_path / "respelled", tmp_path / "with-head")
    headed = Conversion(tmp_path / "respelled", tmp_path / "with-head")
    assert headed.judge().passed
    headed.flip("language_model.lm_head.weight", 1234, folder=headed.source)
    fault, another = headed.judge().offenders
    assert fault.startswith("language_model.lm_head.weight")
    assert re.match("t5g2.json records sha256", another)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_head_of_another_dtype_must_be_a_copy_too(dtype: torch.dtype, made: Make, tmp_path: Path) -> None:
    sound = made("text-8")
    name, table = "lm_head.weight", "model.embed_tokens.weight"

    def rounded(tensors: Tensors) -> Tensors:
        values = tensors[table].to(torch.float16).to(torch.bfloat16)  # values that both dtypes represent
        return {**tensors, table: values, name: values.to(dtype)}

    respell(sound.source, tmp_path / "respelled", rounded)
    convert(tmp_path / "respelled", tmp_path / "with-head")
    headed = Conversion(tmp_path / "respelled", tmp_path / "with-head")
    assert headed.judge().passed
    size = torch.finfo(dtype).bits // 8
    headed.flip(name, (150 * 24 + 12) * size + size - 1, folder=headed.source)
    fault, another = headed.judge().offenders
    assert fault == f"{name} of the source was dropped as a copy, but is not one"
    assert re.match("t5g2.json records sha256", another)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "other"),
        ("parameters", {"total": 1}),
        ("changes", [{"field": "decoder.sliding_window", "source": 1, "target": 2}]),
    ],
)
def test_a_wrong_manifest_record_is_found(key: str, value: object, made: Make) -> None:
    sound = made()
    (fault,) = sound.judge(manifest=sound.manifest | {key: value}, plan=sound.plan()).offenders
    assert f"t5g2.json says {key} {value!r}" in fault


def test_a_false_dropped_tensor_in_the_manifest_is_found(made: Make) -> None:
    sound = made()
    false_record = [{"name": "model.norm.weight", "because": "nobody wants it"}]
    (fault,) = sound.judge(manifest=sound.manifest | {"dropped": false_record}, plan=sound.plan()).offenders
    assert "t5g2.json says dropped ['model.norm.weight'], expected []" in fault


def test_a_manifest_of_another_source_is_found(made: Make) -> None:
    sound = made()
    files = sound.manifest["source"]["files"]
    wrong: list[dict[str, Any]] = [
        {},
        files | {"other.safetensors": {"bytes": 1, "sha256": None}},
        files | {"model.safetensors": {"bytes": 1, "sha256": None}},
        files | {"config.json": {**files["config.json"], "sha256": "0" * 64}},
    ]
    for changed in wrong:
        source = sound.manifest["source"] | {"files": changed}
        check = sound.judge(manifest=sound.manifest | {"source": source})
        assert not check.passed
        assert "t5g2.json records" in check.offenders[0]


def test_a_manifest_of_another_map_asks_for_that_map(made: Make) -> None:
    sound = made()
    mapping = {**sound.manifest["mapping"], "name": "mine"}
    (fault,) = sound.judge(manifest=sound.manifest | {"mapping": mapping}).offenders
    assert "'mine'" in fault
    assert "--mapping" in fault


def test_without_a_manifest_the_bytes_are_still_checked(made: Make) -> None:
    sound = made()
    assert sound.judge(plan=replay_plan(Sources.open(sound.source), {}, None), manifest={}).passed
    sound.flip(TABLE, 77)
    assert not sound.judge(plan=replay_plan(Sources.open(sound.source), {}, None), manifest={}).passed


# replay


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
def test_the_plan_uses_the_dtype_in_the_manifest(dtype: str, made: Make) -> None:
    sound = made("images-float32", dtype=dtype)
    assert sound.plan().dtype == sound.manifest["dtype"] == ("bfloat16" if dtype == "bfloat16" else "float32")


def test_a_source_that_cannot_be_planned_is_an_error_of_the_source(made: Make) -> None:
    sound = made()
    (sound.source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        sound.plan()


def test_a_file_that_cannot_be_opened_is_reported(made: Make) -> None:
    sound = made()
    plan = sound.plan()
    source, target = Gemma3Source(Sources.open(sound.source)), open_checkpoint(sound.output)
    (sound.output / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        judge_provenance(Replay(plan), source, target, read_manifest(sound.output), silent)


def test_a_truncated_file_is_reported(made: Make) -> None:
    sound = made()
    plan = sound.plan()
    source, target = Gemma3Source(Sources.open(sound.source)), open_checkpoint(sound.output)
    os.truncate(sound.output / "model.safetensors", 200_000)
    check = judge_provenance(Replay(plan), source, target, read_manifest(sound.output), silent)
    assert not check.passed
    assert any("ends too early" in fault for fault in check.offenders)


def test_no_file_stays_open(made: Make) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("this system does not tell which files are open")
    sound = made()
    before = len(list(descriptors.iterdir()))
    sound.judge()
    assert len(list(descriptors.iterdir())) == before
