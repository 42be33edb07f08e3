import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import t5g2convert
from t5g2convert import CheckpointError, MappingError, Report, UsageError, convert, verify
from t5g2convert.checkpoint.manifest import read_manifest, seal
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.conftest import TwinFolder
from tests.models.twins import BY_NAME, DIALECTS, IMAGE_SPELLINGS, TEXT_SPELLINGS, TWINS, respell, rewrite_config
from tests.processes.memory import run_and_measure

CHECKS = ["integrity", "provenance", "config", "tokenizer", "vision_parity", "decoder_parity", "encoder_parity", "runs"]
TEXT = "A text with as many words as the longest window has tokens, and a few more."


def names(report: Report) -> list[str]:
    return [check.name for check in report.checks]


def assert_exact(report: Report, *, images: bool) -> None:
    """Assert that every check ran and passed, and both models agree bit for bit."""
    assert report.passed, report.failed
    assert report.failed == ()
    # Twins without images have neither a tokenizer nor an image processor.
    assert names(report) == [name for name in CHECKS if images or name not in ("tokenizer", "vision_parity")]
    assert list(report.skipped) == ([] if images else ["tokenizer", "vision_parity"])
    measured = {check.name: check.figures for check in report.checks if check.name.endswith("_parity")}
    for figures in measured.values():
        assert figures is not None
        assert (figures.max_abs, figures.relative, figures.departs) == (0.0, 0.0, None)
        assert figures.compared > 0
    decoder = measured["decoder_parity"]
    assert decoder is not None
    assert (decoder.kl, decoder.agreement) == (0.0, 1.0)


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def own_map(path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    document = yaml.safe_load(find_map("gemma3").path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return str(path)


def test_verify_compare_and_write_are_public() -> None:
    assert {"verify", "compare", "generate", "Report", "Comparison", "VerificationError"} <= set(t5g2convert.__all__)
    assert set(t5g2convert.__all__) == set(dir(t5g2convert))
    for name in t5g2convert.__all__:
        assert getattr(t5g2convert, name) is not None
    assert verify is t5g2convert.verify
    assert t5g2convert.compare.__module__ == "t5g2convert.parity.compare"
    assert t5g2convert.generate.__module__ == "t5g2convert.reference.generation.generator"


# Sound conversions


@pytest.mark.parametrize("dtype", ["stored", "float32", "bfloat16"])
@pytest.mark.parametrize("name", [twin.name for twin in TWINS])
def test_every_twin_is_verified_exactly(
    name: str, dtype: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    twin = BY_NAME[name]
    stored = str(twin.dtype).removeprefix("torch.")
    given = None if dtype == "stored" else dtype
    report = verify(converted_twin(name), twin_folder(name), dtype=given, record=False)
    assert_exact(report, images=twin.vision is not None)
    assert report.dtype == (given or stored)
    assert (report.device, report.tolerance) == ("cpu", 0.0)
    left_out = [remark for remark in report.remarks if "end-of-image token was left out" in remark]
    assert len(left_out) == (twin.has_eoi and report.dtype != stored)
    assert len(report.remarks) == len(left_out) + (report.dtype == "float16")


@pytest.mark.sampled
@pytest.mark.parametrize("passes", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["text-float32", "text-float16", "images-8"])
def test_a_cast_is_compared_with_the_cast_source(
    name: str, target: str, passes: str | None, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder(name), tmp_path / "out", dtype=target, flush=False)
    report = verify(tmp_path / "out", twin_folder(name), dtype=passes, record=False)
    assert_exact(report, images=name.startswith("images"))
    stored = str(BY_NAME[name].dtype).removeprefix("torch.")
    cast = [remark for remark in report.remarks if "cast" in remark]
    assert len(cast) == (stored != target)
    for remark in cast:
        assert stored in remark
        assert target in remark


def test_a_cast_to_float16_is_verified(twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", dtype="float16", flush=False)
    report = verify(tmp_path / "out", twin_folder("text-8"), record=False)
    assert_exact(report, images=False)
    assert report.dtype == "float16"


def test_a_source_of_several_dtypes_is_verified(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = copied(twin_folder("images-8"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", flush=False)
    for dtype in (None, "float32"):
        assert_exact(verify(tmp_path / "out", source, dtype=dtype, record=False), images=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spelling"),
    [("images-8", spelling) for spelling in IMAGE_SPELLINGS] + [("text-8", spelling) for spelling in TEXT_SPELLINGS],
)
def test_every_spelling_of_the_source_is_verified(
    name: str, spelling: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    respell(twin_folder(name), tmp_path / "source", (IMAGE_SPELLINGS | TEXT_SPELLINGS)[spelling])
    convert(tmp_path / "source", tmp_path / "out", flush=False)
    assert_exact(verify(tmp_path / "out", tmp_path / "source", record=False), images=name == "images-8")


@pytest.mark.sampled
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["text-13", "images-13", "text-8"])
def test_every_dialect_of_the_config_is_verified(
    name: str, dialect: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    rewrite_config(twin_folder(name), tmp_path / "source", DIALECTS[dialect])
    convert(tmp_path / "source", tmp_path / "out", flush=False)
    assert_exact(verify(tmp_path / "out", tmp_path / "source", record=False), images=name == "images-13")


def test_without_hashes_a_conversion_is_verified(twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(twin_folder("images-8"), tmp_path / "out", hashing=False, flush=False)
    report = verify(tmp_path / "out", twin_folder("images-8"), record=False)
    assert_exact(report, images=True)
    assert "no sha256" in report.checks[0].detail


def test_the_end_tokens_of_an_it_model_are_verified(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = copied(twin_folder("text-8"), tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 106], "do_sample": true}')
    convert(source, tmp_path / "out", flush=False)
    assert_exact(verify(tmp_path / "out", source, record=False), images=False)


def test_a_custom_text_and_picture_are_used(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "out", flush=False)
    (tmp_path / "text").write_text(TEXT)
    Image.effect_noise((90, 60), 50).save(tmp_path / "picture.png")
    seeded = verify(tmp_path / "out", demo_source, record=False)
    own = verify(tmp_path / "out", demo_source, text=tmp_path / "text", image=tmp_path / "picture.png", record=False)
    assert_exact(seeded, images=True)
    assert_exact(own, images=True)
    (tmp_path / "text").write_text("a short text")
    short = verify(tmp_path / "out", demo_source, text=tmp_path / "text", record=False)
    assert_exact(short, images=True)
    assert any("sliding window of 16 was not exceeded" in remark for remark in short.remarks)


@pytest.mark.parametrize("given", ["text", "image"])
def test_a_text_or_picture_without_a_source_is_refused(given: str, demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "out", flush=False)
    before = (tmp_path / "out/t5g2.json").read_bytes()
    files: dict[str, Any] = {given: tmp_path / "out/config.json"}
    with pytest.raises(UsageError, match="require --source"):
        verify(tmp_path / "out", **files)
    assert (tmp_path / "out/t5g2.json").read_bytes() == before


def test_a_text_without_a_tokenizer_does_not_fail_a_sound_conversion(demo_source: Path, tmp_path: Path) -> None:
    (demo_source / "tokenizer.json").unlink()
    convert(demo_source, tmp_path / "out", flush=False)
    before = (tmp_path / "out/t5g2.json").read_bytes()
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        verify(tmp_path / "out", demo_source, text=tmp_path / "text")
    assert (tmp_path / "out/t5g2.json").read_bytes() == before


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_an_end_of_image_token_in_a_text_does_not_fail_a_sound_conversion(
    dtype: str | None, demo_source: Path, tmp_path: Path
) -> None:
    convert(demo_source, tmp_path / "out", flush=False)
    (tmp_path / "text").write_text(f"An image ends here:<end_of_image> {TEXT}")
    report = verify(tmp_path / "out", demo_source, text=tmp_path / "text", dtype=dtype, record=False)
    assert_exact(report, images=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["images-8", "text-13"])
def test_a_sound_conversion_passes_on_a_gpu(
    name: str, dtype: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    report = verify(converted_twin(name), twin_folder(name), dtype=dtype, device="cuda", tolerance=1e-3, record=False)
    assert report.passed, report.failed
    assert report.device == "cuda"


def test_progress_is_reported(twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    progress: list[str] = []
    verify(converted_twin("images-8"), twin_folder("images-8"), record=False, progress=progress.append)
    assert len(progress) > 10
    assert all(progress)


# Declared changes

PATH = "rope_parameters.full_attention.factor"


def literally(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Write a map with an explicit setting for both stacks."""

    def change(document: dict[str, Any]) -> None:
        for stack in (document["config"]["encoder"]["text_config"], document["config"]["decoder"]):
            *path, last = key.split(".")
            section = stack
            for step in path:
                section = section[step]
            section[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "source", "target"),
    [
        (PATH, 1.0, 8.0),
        ("rope_parameters.full_attention.rope_theta", 1e6, 1e4),
        ("rope_parameters.sliding_attention.rope_theta", 1e4, 77.0),
        ("sliding_window", 5, 3),
    ],
)
def test_an_explicit_setting_is_declared_and_parity_ignores_it(
    key: str, source: float, target: float, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    mapping = own_map(tmp_path / "mine.yaml", literally(key, target))
    convert(twin_folder("images-8"), tmp_path / "out", mapping=mapping, flush=False)
    paths = [f"encoder.text_config.{key}", f"decoder.{key}"]
    assert read_manifest(tmp_path / "out").document()["changes"] == [
        {"field": path, "source": source, "target": target} for path in paths
    ]
    report = verify(tmp_path / "out", twin_folder("images-8"), mapping=mapping, record=False)
    assert_exact(report, images=True)
    (remark,) = (remark for remark in report.remarks if remark.startswith(f"{key} of both stacks"))
    assert str(source) in remark
    assert str(target) in remark
    assert "parity checks use" in remark
    shipped = verify(tmp_path / "out", twin_folder("images-8"), record=False)
    assert "provenance" in [check.name for check in shipped.failed]


def test_an_explicit_setting_equal_to_the_source_is_not_a_change(twin_folder: TwinFolder, tmp_path: Path) -> None:
    mapping = own_map(tmp_path / "mine.yaml", literally(PATH, 8.0))
    convert(twin_folder("images-13"), tmp_path / "out", mapping=mapping, flush=False)
    assert read_manifest(tmp_path / "out").document()["changes"] == []
    assert verify(tmp_path / "out", twin_folder("images-13"), mapping=mapping, record=False).passed


@pytest.mark.parametrize(
    ("key", "value", "parities"),
    [("rms_norm_eps", 0.5, 2), ("query_pre_attn_scalar", 300, 2), ("final_logit_softcapping", 3.0, 1)],
)
def test_any_other_explicit_setting_is_a_fault(
    key: str, value: float, parities: int, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    mapping = own_map(tmp_path / "mine.yaml", literally(key, value))
    convert(twin_folder("images-8"), tmp_path / "out", mapping=mapping, flush=False)
    failed = {check.name: check for check in verify(tmp_path / "out", twin_folder("images-8"), mapping=mapping).failed}
    assert f"decoder.{key} is {value}" in " ".join(failed["config"].offenders)
    assert len([name for name in failed if name.endswith("_parity")]) == parities


def test_a_map_of_another_name_is_required(twin_folder: TwinFolder, tmp_path: Path) -> None:
    mapping = own_map(tmp_path / "mine.yaml", lambda document: document.update(name="mine"))
    convert(twin_folder("text-8"), tmp_path / "out", mapping=mapping, flush=False)
    assert verify(tmp_path / "out", twin_folder("text-8"), mapping=mapping, record=False).passed
    (failed,) = verify(tmp_path / "out", twin_folder("text-8"), record=False).failed
    assert failed.name == "provenance"
    assert "--mapping" in failed.detail


# Faults of the output


def test_another_source_fails(twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    report = verify(converted_twin("text-8"), twin_folder("text-sharded"), record=False)
    assert {check.name for check in report.failed} == {"provenance", "decoder_parity", "encoder_parity"}
    deeper = verify(converted_twin("text-8"), twin_folder("text-13"), record=False)
    assert {"provenance", "config", "decoder_parity", "encoder_parity"} <= {check.name for check in deeper.failed}
    images = verify(converted_twin("text-8"), twin_folder("images-with-head"), record=False)
    assert "vision_parity" in {check.name for check in images.failed}


def test_without_a_source_files_and_use_are_checked_and_the_rest_is_listed(converted_twin: TwinFolder) -> None:
    report = verify(converted_twin("images-8"), record=False)
    assert report.passed
    assert names(report) == ["integrity", "runs"]
    assert set(report.skipped) == set(CHECKS) - {"integrity", "runs"}
    assert all("source" in because for because in report.skipped.values())
    assert report.source is None


def test_a_trained_model_without_a_manifest_never_passes(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    (output / "t5g2.json").unlink()
    report = verify(output, twin_folder("images-8"))
    assert [check.name for check in report.failed] == ["integrity"]
    assert names(report) == CHECKS
    assert not (output / "t5g2.json").exists()


@pytest.mark.parametrize("damage", ["config", "weights", "index"])
def test_an_output_that_cannot_be_read_fails_and_the_rest_is_listed(
    damage: str, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    if damage == "config":
        (output / "config.json").write_text("{")
    elif damage == "weights":
        (output / "model.safetensors").write_bytes(b"")
    else:
        (output / "model.safetensors").rename(output / "model-1.safetensors")
    report = verify(output, twin_folder("images-8"), record=False)
    assert [check.name for check in report.failed] == ["integrity", "config"]
    assert set(report.skipped) == set(CHECKS) - {"integrity", "config"}
    assert report.dtype is None


def test_a_missing_dtype_fails_and_everything_else_is_checked(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    config = json.loads((output / "config.json").read_text())
    del config["dtype"]
    (output / "config.json").write_text(json.dumps(config))
    report = verify(output, twin_folder("images-8"), record=False)
    assert {check.name for check in report.failed} == {"integrity", "config"}
    assert {"decoder_parity", "encoder_parity", "vision_parity"} <= set(names(report))


def test_a_tolerance_passes_a_small_difference_and_is_reported(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-float32"), tmp_path / "out")
    tensors = load_file(output / "model.safetensors")
    tensors["model.encoder.layers.3.mlp.up_proj.weight"] += 1e-6
    save_file(tensors, output / "model.safetensors")
    strict = verify(output, twin_folder("images-float32"), record=False)
    lenient = verify(output, twin_folder("images-float32"), tolerance=1e-3, record=False)
    # Bytes are compared without a tolerance.
    assert [check.name for check in strict.failed] == ["integrity", "provenance", "encoder_parity"]
    assert [check.name for check in lenient.failed] == ["integrity", "provenance"]
    assert lenient.tolerance == 1e-3


@pytest.mark.sampled
@pytest.mark.parametrize(
    "values",
    [
        {"changes": [{"field": "a.b", "source": 1, "target": 2}]},
        {"changes": [{"field": "decoder.sliding_window.x", "source": 1, "target": 2}]},
        {"changes": [{"field": "dtype", "source": "float32", "target": "int8"}]},
        {"changes": [{"field": "dtype", "source": "float32", "target": 5}]},
        {"changes": [{"field": ["x"], "source": 1, "target": 2}]},
        {"changes": [{}]},
        {"changes": [5]},
        {"changes": 5},
        {"changes": None},
        {"mapping": "gemma3"},
        {"source": []},
        {"source": {"files": 5}},
        {"source": {"files": {"config.json": 5}}},
        {"parameters": [1]},
        {"parameters": "x"},
        {"files": {"config.json": 5}},
    ],
    ids=str,
)
def test_a_sealed_nonsense_manifest_fails_but_all_checks_run(
    values: Mapping[str, Any], twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    (output / "t5g2.json").write_bytes(seal({**read_manifest(output).document(), **values}))
    report = verify(output, twin_folder("images-8"))
    assert not report.passed
    assert {"integrity", "provenance"} & {check.name for check in report.failed}
    assert json.loads(json.dumps(report.to_json()))["passed"] is False


# Faults of the source and of the call


def test_an_invalid_source_is_an_error(twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    before = (output / "t5g2.json").read_bytes()
    source = copied(twin_folder("images-8"), tmp_path / "source")
    for damage in (
        lambda: (source / "model.safetensors").write_bytes(b""),
        lambda: (source / "config.json").write_text("{"),
        lambda: (source / "config.json").unlink(),
        lambda: shutil.rmtree(source),
    ):
        damage()
        with pytest.raises(CheckpointError):
            verify(output, source)
    with pytest.raises(CheckpointError, match="is not Gemma 3"):
        verify(output, converted_twin("images-8"))
    assert (output / "t5g2.json").read_bytes() == before


def test_a_source_of_another_family_is_an_error(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    source = copied(twin_folder("images-8"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"stranger": torch.zeros(2)}, source / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        verify(converted_twin("images-8"), source, record=False)
    assert "stranger" in " ".join(caught.value.details)


def test_an_invalid_map_is_an_error(twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("format: 1\n")
    with pytest.raises(MappingError):
        verify(converted_twin("text-8"), twin_folder("text-8"), mapping=str(tmp_path / "bad.yaml"), record=False)


def test_an_output_that_is_not_a_folder_is_an_error(twin_folder: TwinFolder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, says in (("file", "is a file, expected a checkpoint folder"), ("missing", "no such folder")):
        with pytest.raises(CheckpointError, match=says):
            verify(tmp_path / name, twin_folder("text-8"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "dtype: Input should be"),
        ({"dtype": ""}, "dtype: Input should be"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": float("inf")}, "tolerance"),
    ],
    ids=str,
)
def test_an_invalid_argument_is_an_error(
    options: dict[str, Any], says: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    with pytest.raises(UsageError, match=says):
        verify(converted_twin("text-8"), twin_folder("text-8"), record=False, **options)


def test_invalid_custom_inputs_are_an_error(
    twin_folder: TwinFolder, demo_source: Path, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(demo_source, tmp_path / "out", flush=False)
    before = (tmp_path / "out/t5g2.json").read_bytes()
    (tmp_path / "text").write_text("short")
    wrong: list[dict[str, Any]] = [
        {"text": tmp_path / "text"},
        {"text": tmp_path / "missing"},
        {"image": tmp_path / "text"},
    ]
    for options in wrong:
        with pytest.raises(UsageError):
            verify(tmp_path / "out", demo_source, **options)
    assert (tmp_path / "out/t5g2.json").read_bytes() == before
    with pytest.raises(UsageError, match="has no vision tower"):
        verify(converted_twin("text-8"), twin_folder("text-8"), image=tmp_path / "text", record=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_is_not_a_fault_of_the_output(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    before = (output / "t5g2.json").read_bytes()
    for source in (twin_folder("images-8"), None):
        with pytest.raises(UsageError, match="cuda"):
            verify(output, source, device="cuda")
    assert (output / "t5g2.json").read_bytes() == before


# The record


def test_the_result_is_recorded_and_the_folder_stays_sound(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    first = verify(output, twin_folder("images-8"))
    recorded = (output / "t5g2.json").read_bytes()
    assert read_manifest(output).document()["verification"] == first.record()
    second = verify(output, twin_folder("images-8"))
    assert first == second
    assert_exact(second, images=True)
    assert (output / "t5g2.json").read_bytes() == recorded
    assert str(tmp_path).encode() not in recorded
    alone = verify(output)
    assert alone.passed
    assert not alone.complete
    assert set(alone.skipped) == set(CHECKS) - {"integrity", "runs"}
    assert (output / "t5g2.json").read_bytes() == recorded


def test_nothing_is_written_without_recording(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = copied(converted_twin("images-8"), tmp_path / "out")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    verify(output, twin_folder("images-8"), record=False)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == before


# Memory


def write_text_model(folder: Path, weight_map: WeightMap, **sizes: int) -> None:
    config = {
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 8,
        "max_position_embeddings": 512,
        **sizes,
    }
    folder.mkdir()
    write_synthetic_source(folder, weight_map, config, seed=0)


@pytest.mark.slow
def test_V3_verification_needs_a_fraction_of_the_model_size(gemma3_map: WeightMap, tmp_path: Path) -> None:
    peaks, written = {}, {}
    sizes = {
        "small": {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6},
        "large": {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 28},
    }
    for name, size in sizes.items():
        write_text_model(tmp_path / name, gemma3_map, **size)
        output = tmp_path / f"{name}-out"
        written[name] = convert(tmp_path / name, output, flush=False).nbytes
        printed, peaks[name] = run_and_measure("verify", output, "--source", tmp_path / name, "--json")
        document = json.loads(printed)
        assert document["passed"]
        assert [check["name"] for check in document["checks"]] == [
            name for name in CHECKS if name not in ("tokenizer", "vision_parity")
        ]
    assert written["large"] > 350e6
    assert written["small"] < 3e6
    assert peaks["large"] - peaks["small"] < written["large"] / 5
