"""A text-only source with a donor's vision tower: plan and output."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, Conversion, MappingError, OutputError, convert, inspect, plan, verify
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.conversion.convert import execute
from t5g2convert.conversion.options import WriteOptions
from t5g2convert.conversion.plan.types import Change
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.conftest import TwinFolder
from tests.models.twins import BY_NAME, write_aligned_source, write_twin
from tests.processes.memory import run_and_measure

TOWER = "model.encoder.vision_tower.vision_model."
PROJECTOR = "model.encoder.multi_modal_projector.mm_input_projection_weight"


@pytest.mark.parametrize(("donor", "projector"), [("images-13", "copy"), ("donor-wide", "zeros")])
def test_only_the_tower_and_its_norm_are_the_donors(
    donor: str, projector: str, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    done = convert(twin_folder("text-8"), tmp_path / "out", vision_from=twin_folder(donor))
    found, text = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted_twin("text-8")))
    seeing = load_file(converted_twin(donor) / "model.safetensors")
    assert found.keys() == text.keys() | {name for name in seeing if name.startswith(TOWER)}
    for name, tensor in found.items():
        if name == PROJECTOR and projector == "zeros":
            assert tensor.shape == (20, 24)
            assert not tensor.any()
        else:
            given = seeing if "vision_tower" in name or "projector" in name else text
            assert torch.equal(tensor, given[name]) or name.endswith("eoi_embedding"), name
    assert done.parameters["vision"] == inspect(converted_twin(donor)).parameters["vision"] > 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = json.loads((converted_twin(donor) / "config.json").read_text())
    assert config["encoder"]["vision_config"] == expected["encoder"]["vision_config"]
    assert config["encoder"]["mm_tokens_per_image"] == 4
    assert config["image_token_index"] == config["encoder"]["image_token_index"] == 292
    assert (
        config["encoder"]["text_config"]
        == json.loads((converted_twin("text-8") / "config.json").read_text())["encoder"]["text_config"]
    )


def test_an_aligned_projector_is_the_donors_times_the_map_between_the_tables(
    twin_folder: TwinFolder, tmp_path: Path
) -> None:
    donor = twin_folder("donor-wide")
    matrix = write_aligned_source(twin_folder("text-8"), donor, tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out", vision_from=donor, projector="aligned")
    projector = load_file(donor / "model.safetensors")["multi_modal_projector.mm_input_projection_weight"]
    # Image features join embeddings that are scaled by the root of their width.
    expected = projector.double() @ matrix * (24 / 32) ** 0.5
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[PROJECTOR], expected.to(torch.bfloat16))
    (residual_note,) = (note for note in done.notes if "residual" in note)
    assert float(residual_note.split(": ")[1].split()[0]) < 1e-12
    assert done.residual is not None
    assert done.residual == done.to_json()["residual"] < 1e-12


def test_tables_that_do_not_fit_have_a_residual(twin_folder: TwinFolder, tmp_path: Path) -> None:
    done = convert(
        twin_folder("text-8"), tmp_path / "out", vision_from=twin_folder("donor-wide"), projector="aligned", ridge=0.1
    )
    (residual_note,) = (note for note in done.notes if "residual" in note)
    assert 0.5 < float(residual_note.split(": ")[1].split()[0]) < 1
    assert json.loads((tmp_path / "out/t5g2.json").read_text())["options"] == {"projector": "aligned", "ridge": 0.1}
    assert "residual" not in json.dumps(json.loads((tmp_path / "out/t5g2.json").read_text())["notes"])


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"max_shard_bytes": 20_000}], ids=str)
def test_an_aligned_projector_is_cast_and_sharded_like_all_else(
    options: dict[str, Any], twin_folder: TwinFolder, tmp_path: Path
) -> None:
    donor = twin_folder("donor-wide")
    write_aligned_source(twin_folder("text-8"), donor, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "plain", vision_from=donor, projector="aligned")
    convert(tmp_path / "source", tmp_path / "out", vision_from=donor, projector="aligned", **options)
    plain, found = (
        {name: tensor for path in (tmp_path / name).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for name in ("plain", "out")
    )
    assert found.keys() == plain.keys()
    assert torch.equal(found[PROJECTOR].to(torch.bfloat16), plain[PROJECTOR])
    assert found[PROJECTOR].dtype == (torch.float32 if "dtype" in options else torch.bfloat16)


def test_tables_with_fewer_rows_than_columns_are_refused_by_the_plan(tmp_path: Path) -> None:
    narrow, wide = BY_NAME["text-8"], BY_NAME["donor-wide"]
    tokens = {"boi_token_index": 20, "eoi_token_index": 21, "image_token_index": 22, "mm_tokens_per_image": 4}
    write_twin(replace(narrow, text={**narrow.text, "vocab_size": 31}), tmp_path / "source")
    write_twin(replace(wide, text={**wide.text, "vocab_size": 31}, tokens=tokens), tmp_path / "donor")
    with pytest.raises(CheckpointError, match="31 rows of width 32 do not determine the map") as caught:
        plan(tmp_path / "source", vision_from=tmp_path / "donor", projector="aligned")
    assert caught.value.hint == "try --ridge 1e-6"
    done = convert(
        tmp_path / "source", tmp_path / "out", vision_from=tmp_path / "donor", projector="aligned", ridge=1e-6
    )
    assert done.residual is not None


def test_without_an_alignment_there_is_no_residual(twin_folder: TwinFolder, tmp_path: Path) -> None:
    done = convert(twin_folder("text-8"), tmp_path / "out", vision_from=twin_folder("donor-wide"))
    assert done.residual is done.to_json()["residual"] is None
    assert not any("residual" in note for note in done.notes)


@pytest.mark.parametrize("fits", [True, False], ids=["tables-read-twice", "tables-read-once"])
def test_progress_counts_the_tables_of_an_alignment(
    fits: bool, twin_folder: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, donor = twin_folder("text-8"), twin_folder("donor-wide")
    if fits:
        write_aligned_source(source, donor, tmp_path / "source")
        source = tmp_path / "source"
    counts: list[int] = []
    made = plan(source, vision_from=donor, projector="aligned")
    monkeypatch.setattr("t5g2convert.conversion.write.aligned_projector.ROWS_AT_ONCE", 64)
    options = WriteOptions(progress=counts.append, flush=False)
    execute(made, Folders(source, vision_from=donor), tmp_path / "out", options)
    tables = 300 * (32 + 24) * 2
    assert sum(counts) == made.work == sum(tensor.nbytes for tensor in made.tensors) + tables
    # During the alignment, not only at its end.
    assert counts[1:3] == [64 * 32 * 2, 64 * 24 * 2]


def test_a_resumed_graft_has_the_same_bytes(twin_folder: TwinFolder, tmp_path: Path) -> None:
    donor = twin_folder("donor-wide")

    def run(name: str, judge: Any = None, counts: list[int] | None = None) -> Conversion:
        return convert(
            twin_folder("text-8"), tmp_path / name, vision_from=donor, projector="aligned", ridge=0.1,
            max_shard_bytes=20_000, resume=True, judge=judge, progress=None if counts is None else counts.append,
        )  # fmt: skip

    def stop(_: Path) -> None:
        raise OutputError("the disk fails")

    with pytest.raises(OutputError, match="the disk fails"):
        run("resumed", stop)
    counts: tuple[list[int], list[int]] = ([], [])
    resumed, plain = run("resumed", counts=counts[0]), run("plain", counts=counts[1])
    assert sum(counts[0]) == sum(counts[1])
    assert resumed.residual is None
    assert "the aligned projector is in a kept shard; verify reports its residual" in resumed.notes
    assert plain.residual is not None
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("resumed", "plain"))
    assert one == two


def test_the_end_of_image_row_is_the_sources_at_the_donors_token(twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", vision_from=twin_folder("donor-wide"))
    found = load_file(tmp_path / "out/model.safetensors")
    row = found["model.encoder.embed_tokens.weight"][291]
    assert torch.equal(found["model.encoder.embed_tokens.eoi_embedding"], row * torch.tensor(24**0.5).to(row.dtype))


def test_the_manifest_names_both_checkpoints(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, donor = twin_folder("text-8"), twin_folder("donor-wide")
    convert(source, tmp_path / "out", vision_from=donor)
    text = (tmp_path / "out/t5g2.json").read_text()
    manifest = json.loads(text)
    assert manifest["source"]["family"] == "gemma3_text"
    assert manifest["vision_from"]["family"] == "gemma3"
    assert manifest["vision_from"]["layout"].keys() == {"text", "vision", "projector"}
    assert manifest["vision_from"]["files"].keys() == {"model.safetensors", "config.json"}
    assert all(len(facts["sha256"]) == 64 for facts in manifest["vision_from"]["files"].values())
    assert manifest["options"] == {"projector": "zeros"}
    assert str(donor.parent) not in text


def test_of_a_sharded_donor_only_the_files_with_the_tower_are_read(twin_folder: TwinFolder) -> None:
    made = plan(twin_folder("text-8"), vision_from=twin_folder("images-sharded"))
    read = {file.name for file in made.sources["vision_from"].files}
    spans = {tensor.content.source.file for tensor in made.tensors if tensor.content.source is not None}
    assert read == {name for name in spans if name.startswith("vision_from/")}
    assert 0 < len(read) < len(list(twin_folder("images-sharded").glob("*.safetensors")))
    assert any("are not used" in note for note in made.notes)


def test_the_same_graft_twice_gives_the_same_bytes(twin_folder: TwinFolder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(twin_folder("text-8"), tmp_path / name, vision_from=twin_folder("donor-wide"))
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("source", "donor", "options", "says"),
    [
        ("images-8", "images-13", {}, "has its own vision tower"),
        ("text-8", "text-13", {}, "has no vision tower"),
        ("text-8", "donor-wide", {"projector": "copy"}, "has output width 32, the source has 24"),
    ],
)
def test_a_graft_that_does_not_fit_is_refused(
    source: str, donor: str, options: dict[str, Any], says: str, twin_folder: TwinFolder
) -> None:
    with pytest.raises(MappingError, match=says):
        plan(twin_folder(source), vision_from=twin_folder(donor), **options)


@pytest.mark.parametrize("holders", [{"donor"}, {"source", "donor"}], ids=lambda holders: "-".join(sorted(holders)))
def test_nan_is_reported_with_its_folder(holders: set[str], twin_folder: TwinFolder, tmp_path: Path) -> None:
    names = {"source": "model.norm.weight", "donor": "vision_tower.post_layernorm.bias"}
    for name, twin in (("source", "text-8"), ("donor", "donor-wide")):
        shutil.copytree(twin_folder(twin), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        if name in holders:
            tensors[names[name]][3] = float("nan")
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})

    def run(**options: bool) -> Conversion:
        return convert(tmp_path / "source", tmp_path / "out", vision_from=tmp_path / "donor", **options)

    with pytest.raises(CheckpointError, match="hold NaN or infinity") as caught:
        run()
    assert caught.value.where == " and ".join(str(tmp_path / name) for name in sorted(holders))
    lines = {"source": f"{names['source']}[3] is NaN", "donor": f"vision_from/{names['donor']}[3] is NaN"}
    assert set(caught.value.details) == {lines[name] for name in holders}
    assert any(lines["donor"] in note for note in run(allow_nonfinite=True).notes)


def test_a_donor_of_another_family_is_named_as_the_donor(twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    with pytest.raises(MappingError, match=r"the donor \(--vision-from\) is model_type 't5gemma2'"):
        plan(twin_folder("text-8"), vision_from=converted_twin("images-8"))


def test_a_donor_is_a_closed_world_too(twin_folder: TwinFolder, tmp_path: Path) -> None:
    shutil.copytree(twin_folder("donor-wide"), tmp_path / "donor")
    path = tmp_path / "donor/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "stranger": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        plan(twin_folder("text-8"), vision_from=tmp_path / "donor")
    assert "unused: stranger" in caught.value.details
    assert caught.value.where == str(tmp_path / "donor")


@pytest.fixture
def small_text(twin_folder: TwinFolder, gemma3_map: WeightMap, tmp_path: Path) -> Path:
    """Return a one-layer bfloat16 source, smaller than the tower of a float32 donor."""
    (tmp_path / "small").mkdir()
    config = json.loads((twin_folder("text-8") / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    write_synthetic_source(tmp_path / "small", gemma3_map, config, seed=3)
    return tmp_path / "small"


def test_the_config_names_the_sources_dtype_whatever_the_donor_has(small_text: Path, twin_folder: TwinFolder) -> None:
    made = plan(small_text, vision_from=twin_folder("images-float32"))
    sizes = Counter[str]()
    for tensor in made.tensors:
        sizes[tensor.dtype] += tensor.nbytes
    assert sizes["F32"] > sizes["BF16"]
    assert made.dtype == made.config["dtype"] == "bfloat16"
    assert made.changes == ()


def test_a_cast_is_declared_with_its_owner(small_text: Path, twin_folder: TwinFolder, tmp_path: Path) -> None:
    donor = twin_folder("images-float32")
    assert plan(small_text, vision_from=donor, dtype="bfloat16").changes == (
        Change("dtype", "the donor's float32", "bfloat16"),
    )
    assert plan(small_text, vision_from=donor, dtype="float16").changes == (
        Change("dtype", "bfloat16, the donor's float32", "float16"),
    )
    convert(small_text, tmp_path / "out", vision_from=donor, dtype="bfloat16", flush=False)
    report = verify(tmp_path / "out", small_text, vision_from=donor, record=False)
    assert report.passed
    (remark,) = (remark for remark in report.remarks if "cast" in remark)
    assert remark.startswith("weights were cast from the donor's float32 to bfloat16, as declared")


@pytest.mark.sampled
@pytest.mark.parametrize(("donor_width", "width"), [(512, 256), (1024, 512), (512, 1024)])
def test_an_alignment_takes_the_memory_in_its_plan(
    donor_width: int, width: int, demo_config: Mapping[str, Any], gemma3_map: WeightMap, tmp_path: Path
) -> None:
    text = {**demo_config["text_config"], "vocab_size": 4096, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    configs = {
        "source": {**text, "hidden_size": width, "model_type": "gemma3_text"},
        "donor": {**demo_config, "text_config": {**text, "hidden_size": donor_width}},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        write_synthetic_source(tmp_path / name, gemma3_map, config, seed=len(name))
    options = ["--vision-from", tmp_path / "donor", "--projector", "aligned", "--ridge", "1e-3"]
    planned = json.loads(run_and_measure("plan", tmp_path / "source", *options, "--json")[0])["peak_memory"]
    _, taken = run_and_measure(
        "convert", "--no-verify", "--no-card", tmp_path / "source", tmp_path / "out", *options, "--no-flush"
    )
    assert taken < planned < 1.25 * taken


def test_the_output_may_not_lie_in_the_donor(twin_folder: TwinFolder) -> None:
    donor = twin_folder("donor-wide")
    with pytest.raises(OutputError, match="lies inside the source folder"):
        convert(twin_folder("text-8"), donor / "out", vision_from=donor)
