import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, convert, plan
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.conversion.convert import execute
from t5g2convert.conversion.options import WriteOptions
from t5g2convert.conversion.write import computed_tensors, copy
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.processes.memory import run_and_measure


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(params=[5_000_000_000, 60_000, 500_000], ids=["one-file", "many-shards", "two-shards"])
def max_shard_bytes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("hashing", [True, False])
def test_every_copied_range_holds_the_bytes_of_its_source(
    demo_source: Path, tmp_path: Path, max_shard_bytes: int, hashing: bool
) -> None:
    made = plan(demo_source, max_shard_bytes=max_shard_bytes)
    execute(made, Folders(demo_source), tmp_path / "out", WriteOptions(hashing=hashing))
    source = (demo_source / "model.safetensors").read_bytes()
    copied = [tensor for tensor in made.tensors if tensor.content.kind == "copy"]
    assert len(copied) == 250
    for tensor in copied:
        assert tensor.content.source is not None
        written = (tmp_path / "out" / tensor.shard).read_bytes()[tensor.start : tensor.end]
        assert written == source[tensor.content.source.start : tensor.content.source.end], tensor.name


def test_the_library_reads_every_tensor_that_was_planned(
    demo_source: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    made = plan(demo_source, max_shard_bytes=max_shard_bytes)
    execute(made, Folders(demo_source), tmp_path / "out")
    found = {name: tensor for shard in made.shards for name, tensor in load_file(tmp_path / "out" / shard.name).items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        tensor.name: tensor.shape for tensor in made.tensors
    }
    parent = load_file(demo_source / "model.safetensors")
    table = parent["language_model.model.embed_tokens.weight"]
    assert torch.equal(
        found["model.encoder.embed_tokens.eoi_embedding"], table[254] * torch.tensor(48**0.5).to(torch.bfloat16)
    )


def test_the_manifest_holds_the_sha256_of_every_file(demo_source: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    convert(demo_source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    manifest = json.loads((tmp_path / "out/t5g2.json").read_text())
    others = {path.name for path in (tmp_path / "out").iterdir()} - {"t5g2.json"}
    assert manifest["files"].keys() == others
    for name, facts in manifest["files"].items():
        path = tmp_path / "out" / name
        assert facts == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for name, facts in manifest["source"]["files"].items():
        assert facts == {"bytes": (demo_source / name).stat().st_size, "sha256": sha256(demo_source / name)}
    assert str(tmp_path) not in json.dumps(manifest)


def test_without_hashing_the_manifest_says_so_with_null(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "out", hashing=False)
    manifest = json.loads((tmp_path / "out/t5g2.json").read_text())
    assert {facts["sha256"] for facts in manifest["files"].values()} == {None}


def test_hashing_changes_no_weight(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "one", hashing=True)
    convert(demo_source, tmp_path / "other", hashing=False)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


@pytest.mark.parametrize("hashing", [True, False])
def test_each_source_byte_is_copied_from_once(
    hashing: bool, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, written = 0, 0
    real_read, real_write = copy.read_exactly, os.pwrite

    def count_read(fd: int, data: memoryview, offset: int, file: str) -> None:
        nonlocal read
        read += len(data)
        real_read(fd, data, offset, file)

    def count_write(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        done = real_write(fd, data, offset)
        written += done
        return done

    monkeypatch.setattr(copy, "read_exactly", count_read)
    monkeypatch.setattr(computed_tensors, "read_exactly", count_read)
    monkeypatch.setattr(os, "pwrite", count_write)
    made = plan(demo_source)
    execute(made, Folders(demo_source), tmp_path / "out", WriteOptions(hashing=hashing))
    tensor_bytes = sum(
        entry.end - entry.start for entry in {t.content.source for t in made.tensors if t.content.source}
    )
    assert read == tensor_bytes
    assert written == made.nbytes


def test_short_reads_and_writes_are_continued(
    demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(demo_source, tmp_path / "expected")
    real_read, real_write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real_read(fd, [views[0][:777]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_write(fd, data[:555], offset))
    convert(demo_source, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    assert (tmp_path / "out/t5g2.json").read_bytes() == (tmp_path / "expected/t5g2.json").read_bytes()


def test_mixed_dtypes_are_kept_and_aligned(demo_source: Path, tmp_path: Path) -> None:
    tensors = load_file(demo_source / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, demo_source / "model.safetensors", {"format": "pt"})
    made = plan(demo_source)
    assert {tensor.dtype for tensor in made.tensors} == {"F32", "BF16"}
    assert all(tensor.start % 4 == 0 for tensor in made.tensors if tensor.dtype == "F32")
    assert made.dtype == "bfloat16"
    assert any("several dtypes (BF16, F32)" in note for note in made.notes)
    execute(made, Folders(demo_source), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["model.decoder.norm.weight"], tensors["language_model.model.norm.weight"])


def test_I6_a_head_that_differs_is_refused_as_untied(demo_source: Path, tmp_path: Path) -> None:
    tensors = load_file(demo_source / "model.safetensors")
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, demo_source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="untied"):
        convert(demo_source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-source"]


SPOILED: Mapping[str, tuple[tuple[int, ...], float]] = {
    "language_model.model.embed_tokens.weight": ((200, 7), float("inf")),
    "language_model.model.layers.3.mlp.up_proj.weight": ((5, 5), float("nan")),
    "language_model.model.norm.weight": ((0,), float("-inf")),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": ((1,), float("nan")),
}


def spoil(source: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    for name, (place, value) in SPOILED.items():
        tensors[name][place] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("hashing", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", ["keep", "float32"])
def test_I9_every_tensor_with_nan_or_infinity_is_named_and_nothing_is_left(
    hashing: bool, dtype: torch.dtype, cast: str, demo_source: Path, tmp_path: Path
) -> None:
    spoil(demo_source, dtype)
    with pytest.raises(CheckpointError, match=r"4 tensor\(s\) hold NaN or infinity .*--allow-nonfinite") as error:
        convert(demo_source, tmp_path / "out", dtype=cast, hashing=hashing)
    assert sorted(error.value.details) == [
        f"{name}[{', '.join(map(str, place))}] is {'infinity' if abs(value) == float('inf') else 'NaN'}"
        for name, (place, value) in sorted(SPOILED.items())
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-source"]


@pytest.mark.parametrize("hashing", [True, False])
@pytest.mark.parametrize("cast", ["keep", "float16", "float32"])
def test_I9_allowed_they_are_copied_and_noted(hashing: bool, cast: str, demo_source: Path, tmp_path: Path) -> None:
    spoil(demo_source)
    done = convert(demo_source, tmp_path / "out", dtype=cast, hashing=hashing, allow_nonfinite=True)
    assert any(note.startswith("4 tensor(s) hold NaN or infinity, copied as they are: ") for note in done.notes)
    parent, found = load_file(demo_source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    target = {"keep": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[cast]
    for part in ("encoder", "decoder"):
        expected = parent["language_model.model.layers.3.mlp.up_proj.weight"].to(target)
        torch.testing.assert_close(
            found[f"model.{part}.layers.3.mlp.up_proj.weight"], expected, rtol=0, atol=0, equal_nan=True
        )
    if hashing:
        manifest = json.loads((tmp_path / "out/t5g2.json").read_text())
        assert manifest["files"]["model.safetensors"]["sha256"] == sha256(tmp_path / "out/model.safetensors")


def test_I9_finding_them_costs_no_second_read_and_nothing_is_written_after_the_first(
    demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(demo_source)
    size = (demo_source / "model.safetensors").stat().st_size
    read: list[int] = []
    written: list[int] = []
    real_read, real_write = os.preadv, os.pwrite

    def count_read(fd: int, views: list[memoryview], offset: int) -> int:
        read.append(real_read(fd, views, offset))
        return read[-1]

    def count_write(fd: int, data: memoryview, offset: int) -> int:
        written.append(real_write(fd, data, offset))
        return written[-1]

    monkeypatch.setattr(os, "preadv", count_read)
    monkeypatch.setattr(os, "pwrite", count_write)
    with pytest.raises(CheckpointError, match="NaN"):
        convert(demo_source, tmp_path / "out", hashing=False)
    assert 0.9 * size < sum(read) <= size
    assert sum(written) < size, "all would be twice as much"


def test_I9_a_number_that_a_cast_makes_infinite_is_refused_even_if_infinity_is_allowed(
    demo_source: Path, tmp_path: Path
) -> None:
    tensors = load_file(demo_source / "model.safetensors")
    tensors["language_model.model.layers.3.mlp.up_proj.weight"][5, 5] = 1e30
    save_file(tensors, demo_source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight: has a value too large for F16"):
        convert(demo_source, tmp_path / "out", dtype="float16", allow_nonfinite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-source"]


def test_I13_a_source_that_changed_since_it_was_planned_is_refused(demo_source: Path, tmp_path: Path) -> None:
    made = plan(demo_source)
    os.utime(demo_source / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        execute(made, Folders(demo_source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_I13_a_source_that_changes_while_it_is_copied_is_refused(demo_source: Path, tmp_path: Path) -> None:
    made = plan(demo_source)

    def touch(count: int) -> None:
        os.utime(demo_source / "model.safetensors", ns=(2, 2))

    with pytest.raises(CheckpointError, match="changed while it was being read"):
        execute(made, Folders(demo_source), tmp_path / "out", WriteOptions(progress=touch))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-source"]


def test_progress_counts_every_byte_but_the_headers(demo_source: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    made = plan(demo_source)
    execute(made, Folders(demo_source), tmp_path / "out", WriteOptions(progress=counts.append))
    assert sum(counts) == sum(tensor.nbytes for tensor in made.tensors)


@pytest.mark.sampled
@pytest.mark.parametrize("options", [[], ["--no-hash"]])
def test_a_large_model_takes_no_more_memory_than_a_small_one(
    options: list[str], demo_config: Mapping[str, Any], gemma3_map: WeightMap, tmp_path: Path
) -> None:
    text = {**demo_config["text_config"], "vocab_size": 60_000, "hidden_size": 512, "intermediate_size": 4096}
    source = tmp_path / "source"
    source.mkdir()
    write_synthetic_source(source, gemma3_map, {**demo_config, "text_config": text}, seed=None)
    assert plan(source).nbytes > 250e6
    (source / "tokenizer.json").write_bytes(b"{}")  # a published one is in test_aux_files.py
    _, peak = run_and_measure("convert", "--no-verify", "--no-card", source, tmp_path / "out", *options)
    assert peak < 64e6
