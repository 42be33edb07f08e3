"""Encoder and decoder with other parents and layers: transformers loads them, and each computes as its parent."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from t5g2convert import convert, verify
from tests.conftest import TwinFolder
from tests.interop.judge import WRITTEN, Pairing, judge, parents, tower_difference, written
from tests.models.twins import BY_NAME, rewrite_config

PAIRINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "first layers": ("text-float16", {"encoder_layers": "first:5", "decoder_layers": "first:2"}),
    "ranges": ("text-float32", {"encoder_layers": "1:7", "decoder_layers": "0:7:3"}),
    "a list": ("text-8", {"decoder_layers": "0,3,5:8"}),
    "numbers": ("text-13", {"encoder_layers": range(0, 13, 2), "decoder_layers": [5, 11]}),
    "the encoder alone": ("images-8", {"encoder_layers": "0:8:2"}),
    "both alike": ("images-13", {"encoder_layers": "3:12", "decoder_layers": "3:12"}),
    "one sliding layer": ("images-8", {"decoder_layers": "2:3"}),
    "one full layer": ("text-8", {"decoder_layers": "5:6"}),
    "another parent of this shape": ("text-8", {"decoder_from": "text-sharded"}),
    "another parent with its table": ("text-8", {"decoder_from": "text-sharded", "embedding_from": "decoder-from"}),
    "another parent unlike this": ("text-8", {"decoder_from": "text-unlike-7"}),
    "an unlike one with its table": ("text-13", {"decoder_from": "text-unlike-7", "embedding_from": "decoder-from"}),
    "an unlike source": ("text-unlike-7", {"decoder_from": "text-13", "decoder_layers": "1,3,5:12"}),
    "a parent with images": ("text-8", {"decoder_from": "images-13", "encoder_layers": "first:6"}),
    "a source with images": (
        "images-8",
        {"decoder_from": "text-unlike-7", "encoder_layers": "2:8", "decoder_layers": "0,6"},
    ),
    "everything": (
        "images-13",
        {
            "decoder_from": "images-8",
            "embedding_from": "decoder-from",
            "encoder_layers": "0:13:4",
            "decoder_layers": "4:7",
        },
    ),
    "shards": (
        "images-sharded",
        {"decoder_from": "text-sharded", "decoder_layers": "first:3", "max_shard_bytes": 20_000},
    ),
}
"""By name, a source and the options of its conversion."""


def made(name: str, twin_folder: TwinFolder, output: Path, **more: Any) -> tuple[Path, dict[str, Any], Pairing]:
    """Convert; return the source, the other checkpoints, and the judge's pairing."""
    source, options = PAIRINGS[name]
    options = {**options, **more}
    others = {role: twin_folder(options[role]) for role in ("decoder_from", "vision_from") if role in options}
    convert(twin_folder(source), output, flush=False, **{**options, **others})
    recorded = json.loads((output / "t5g2.json").read_text())["options"]
    return twin_folder(source), others, pairing_of(recorded, others.get("decoder_from"))


def pairing_of(recorded: dict[str, Any], decoder_from: Path | None) -> Pairing:
    """Return the pairing that a manifest records."""
    names = ("embedding_from", "encoder_layers", "decoder_layers")
    options = {name: recorded[name] for name in names if name in recorded}
    return Pairing(decoder_from=None if decoder_from is None else str(decoder_from), **options)


@pytest.mark.sampled
@pytest.mark.parametrize("name", PAIRINGS)
def test_each_stack_computes_exactly_as_its_own_parent_and_layers(
    name: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source, others, pairing = made(name, twin_folder, tmp_path / "out")
    for dtype in (torch.float32, torch.bfloat16):
        judgement = judge(source, tmp_path / "out", dtype, pairing)
        assert judgement.complaints == []
        assert (judgement.decoder, judgement.encoder) == (0.0, 0.0)
        assert judgement.vision == (None if BY_NAME[source.name].vision is None else 0.0)
        assert judgement.finite
    report = verify(tmp_path / "out", source, record=False, **others)
    assert report.passed, report.failed
    figures = {check.name: check.figures for check in report.checks if check.figures is not None}
    assert all(figure.max_abs == 0 for figure in figures.values())
    assert {"decoder_parity", "encoder_parity"} <= figures.keys()


@pytest.mark.parametrize("name", ["ranges", "one sliding layer", "another parent unlike this", "everything"])
def test_generation_is_the_same_with_and_without_cache(name: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    made(name, twin_folder, tmp_path / "out")
    tokens = written(tmp_path / "out", torch.float32, use_cache=True)
    assert len(tokens) == WRITTEN + 1
    assert tokens == written(tmp_path / "out", torch.float32, use_cache=False)


def test_another_layer_or_parent_would_be_seen(twin_folder: TwinFolder, tmp_path: Path) -> None:
    """The judge itself depends on its pairing: a false one gives a difference."""
    source, _, pairing = made("an unlike source", twin_folder, tmp_path / "out")
    fields = asdict(pairing)
    for false_pairing in ({"decoder_layers": [1, 3, *range(6, 13)]}, {"embedding_from": "decoder-from"}):
        assert judge(source, tmp_path / "out", torch.float32, Pairing(**fields | false_pairing)).decoder > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cast_pair_equals_its_parents_loaded_in_that_dtype(
    dtype: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source, others, pairing = made("a source with images", twin_folder, tmp_path / "out", dtype=dtype)
    judgement = judge(source, tmp_path / "out", getattr(torch, dtype), pairing)
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)
    assert verify(tmp_path / "out", source, record=False, **others).passed


@pytest.mark.parametrize("donor", ["images-13", "donor-wide"])
def test_a_pair_is_given_a_tower_too(donor: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, others, pairing = made("another parent unlike this", twin_folder, tmp_path / "out", vision_from=donor)
    judgement = judge(source, tmp_path / "out", torch.bfloat16, pairing)
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)
    assert tower_difference(twin_folder(donor), tmp_path / "out", torch.bfloat16) == 0.0
    report = verify(tmp_path / "out", source, record=False, **others)
    assert report.passed, report.failed
    assert "vision_parity" in {check.name for check in report.checks}


def test_a_tower_is_aligned_to_the_chosen_table(twin_folder: TwinFolder, tmp_path: Path) -> None:
    options = {"vision_from": "donor-wide", "projector": "aligned", "ridge": 0.1}
    source, others, _ = made("another parent with its table", twin_folder, tmp_path / "out", **options)
    assert verify(tmp_path / "out", source, record=False, **others).passed
    made("another parent of this shape", twin_folder, tmp_path / "source's", **options)
    from safetensors.torch import load_file

    name = "model.encoder.multi_modal_projector.mm_input_projection_weight"
    one, other = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("out", "source's"))
    assert not torch.equal(one, other)


def test_another_factor_and_window_equal_parents_with_them(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, others, pairing = made(
        "an unlike source", twin_folder, tmp_path / "out", rope_scaling="linear:3", sliding_window=5
    )

    def change(text: dict[str, Any]) -> None:
        text["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 3.0}
        text["sliding_window"] = 5

    for folder, name in ((source, "source"), (others["decoder_from"], "other")):
        rewrite_config(folder, tmp_path / name, change)
    changed = Pairing(**asdict(pairing) | {"decoder_from": str(tmp_path / "other")})
    judgement = judge(tmp_path / "source", tmp_path / "out", torch.float32, changed)
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)
    assert judge(source, tmp_path / "out", torch.float32, pairing).decoder > 0
    report = verify(tmp_path / "out", source, record=False, **others)
    assert report.passed, report.failed


def test_the_judge_cuts_the_parents(twin_folder: TwinFolder) -> None:
    pairing = Pairing(encoder_layers=[0, 5], decoder_layers=[6])
    reader, writer = parents(twin_folder("text-8"), pairing, torch.float32)
    assert [layer.self_attn.layer_idx for layer in (*reader.model.layers, *writer.model.layers)] == [0, 5, 6]
    assert reader.model.config.layer_types == ["sliding_attention", "full_attention"]


OLDER = os.environ.get("T5G2_OLDER_PYTHON", "")


@pytest.mark.skipif(not OLDER, reason="T5G2_OLDER_PYTHON names no Python with transformers 5.0.0 (make test-oldest)")
@pytest.mark.parametrize("name", ["ranges", "an unlike source"])
def test_the_oldest_transformers_judges_an_unbalanced_pair_the_same(
    name: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source, _, pairing = made(name, twin_folder, tmp_path / "out")
    script = str(Path(__file__).with_name("judge.py"))
    command = [OLDER, script, str(source), str(tmp_path / "out"), "float32", json.dumps(asdict(pairing))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    judgement = json.loads(run.stdout.splitlines()[-1])
    assert (judgement["complaints"], judgement["decoder"], judgement["encoder"]) == ([], 0.0, 0.0)
    cached, uncached = judgement["written"]
    assert cached == uncached
    assert len(cached) == WRITTEN + 1
