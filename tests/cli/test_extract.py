"""`t5g2 extract` on the command line."""

import json
from pathlib import Path

import pytest

from t5g2convert.checkpoint.manifest import read_manifest
from tests.cli.commandline import CommandLine
from tests.conftest import TwinFolder


@pytest.fixture
def whole(converted_twin: TwinFolder) -> Path:
    return converted_twin("images-8")


@pytest.mark.sampled
@pytest.mark.parametrize(("part", "family"), [("encoder", "t5gemma2_encoder"), ("decoder", "gemma3")])
def test_a_part_is_written_and_verified_in_one_run(
    part: str, family: str, t5g2: CommandLine, whole: Path, tmp_path: Path
) -> None:
    result = t5g2("extract", whole, tmp_path / "out", "--part", part, "--verify", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["mapping"] == f"t5gemma2-{part}"
    assert document["verification"]["passed"]
    assert document["parameters"]["encoder" if part == "decoder" else "decoder"] == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == family
    manifest = read_manifest(tmp_path / "out").document()
    assert manifest["source"]["family"] == "t5gemma2"
    assert (tmp_path / "out/generation_config.json").exists() == (part == "decoder")
    again = t5g2("verify", tmp_path / "out", "--source", whole)
    assert again.code == 0
    assert f"{part}_parity" in again.out


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_can_be_inspected(part: str, t5g2: CommandLine, whole: Path, tmp_path: Path) -> None:
    t5g2("extract", whole, tmp_path / "out", "--part", part)
    result = t5g2("inspect", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert (document["missing"], document["unexpected"]) == ([], [])
    assert document["parameters"][part] > 0
    assert document["parameters"]["total"] == read_manifest(tmp_path / "out").document()["parameters"]["total"]


def test_a_plan_shows_what_would_be_extracted(t5g2: CommandLine, whole: Path) -> None:
    result = t5g2("plan", whole, "--part", "encoder", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["mapping"] == "t5gemma2-encoder"
    assert document["parameters"]["decoder"] == 0
    assert {drop["because"] for drop in document["dropped"]} == {"the encoder is taken without the decoder"}
    shown = t5g2("plan", whole, "--part", "decoder")
    assert "t5gemma2 to gemma3" in shown.out
    assert len([line for line in shown.err.splitlines() if "are dropped" in line]) == 1


def test_options_of_the_writer_are_used(t5g2: CommandLine, whole: Path, tmp_path: Path) -> None:
    arguments = ("extract", whole, tmp_path / "out", "--part", "encoder")
    assert t5g2(*arguments, "--dtype", "float32", "--max-shard-size", "20KB").code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    refused = t5g2(*arguments)
    assert refused.code == 5
    assert "--overwrite" in refused.err
    assert t5g2(*arguments, "--overwrite").code == 0
    assert t5g2("verify", tmp_path / "out", "--source", whole).code == 0


def test_an_unknown_part_is_refused(t5g2: CommandLine, whole: Path, tmp_path: Path) -> None:
    result = t5g2("extract", whole, tmp_path / "out", "--part", "tower")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "t5g2: Invalid value for '--part': 'tower' is not one of" in result.err
    assert "'encoder', 'decoder'" in result.err
    missing = t5g2("extract", whole, tmp_path / "out")
    assert missing.code == 2
    assert not (tmp_path / "out").exists()


def test_a_gemma_3_has_no_parts(t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path) -> None:
    result = t5g2("extract", twin_folder("text-8"), tmp_path / "out", "--part", "encoder")
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert "'gemma3_text' cannot be taken apart for its encoder" in result.err
    assert not (tmp_path / "out").exists()


def test_convert_does_not_extract(t5g2: CommandLine, whole: Path, tmp_path: Path) -> None:
    result = t5g2("convert", whole, tmp_path / "out")
    assert result.code == 3
    assert "an encoder-decoder already" in result.err


@pytest.mark.parametrize(
    "options", [("--rope-scaling", "linear:2"), ("--sliding-window", "9"), ("--preset", "t5gemma-2-270m-270m")]
)
def test_an_extracted_part_keeps_its_settings(
    options: tuple[str, str], t5g2: CommandLine, whole: Path, tmp_path: Path
) -> None:
    result = t5g2("convert", whole, tmp_path / "out", "--mapping", "t5gemma2-encoder", *options)
    assert (result.code, result.err.count("\n")) == (4, 1)
    assert "cannot be used when extracting" in result.err


def test_a_folder_that_lacks_a_tensor_is_refused(t5g2: CommandLine, whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    config = json.loads((whole / "config.json").read_text())
    config["decoder"]["num_hidden_layers"] += 1
    config["decoder"]["layer_types"].append("full_attention")
    (broken / "config.json").write_text(json.dumps(config))
    result = t5g2("extract", broken, tmp_path / "out", "--part", "decoder")
    assert result.code == 3
    assert "missing: model.decoder.layers.8.self_attn.q_proj.weight" in result.err


def test_scaled_sliding_layers_are_refused(t5g2: CommandLine, whole: Path, tmp_path: Path) -> None:
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    (scaled / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    config = json.loads((whole / "config.json").read_text())
    config["decoder"]["rope_parameters"]["sliding_attention"] |= {"rope_type": "linear", "factor": 2.0}
    (scaled / "config.json").write_text(json.dumps(config))
    result = t5g2("extract", scaled, tmp_path / "out", "--part", "decoder")
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert "decoder.rope_sliding_factor is 2.0" in result.err
    assert t5g2("extract", scaled, tmp_path / "encoder", "--part", "encoder").code == 0


def test_a_logit_cap_that_gemma_3_with_images_lacks_is_refused(
    t5g2: CommandLine, whole: Path, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    for source, section, arguments in (
        (twin_folder("images-8"), "text_config", ("plan",)),
        (whole, "decoder", ("plan", "--part", "decoder")),
    ):
        capped = tmp_path / section
        capped.mkdir()
        (capped / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        config = json.loads((source / "config.json").read_text())
        config[section]["final_logit_softcapping"] = 30.0
        (capped / "config.json").write_text(json.dumps(config))
        result = t5g2(arguments[0], capped, *arguments[1:])
        assert (result.code, result.err.count("\n")) == (3, 1)
        assert "final_logit_softcapping is 30.0; mapping" in result.err


def test_a_part_and_a_map_of_another_are_refused(t5g2: CommandLine, whole: Path, twin_folder: TwinFolder) -> None:
    result = t5g2("plan", whole, "--part", "encoder", "--mapping", "t5gemma2-decoder")
    assert (result.code, result.err.count("\n")) == (4, 1)
    assert "mapping 't5gemma2-decoder' extracts the decoder, not the encoder" in result.err
    result = t5g2("plan", twin_folder("text-8"), "--part", "encoder", "--mapping", "gemma3")
    assert "mapping 'gemma3' converts whole models, not the encoder" in result.err
