"""Verification of a fine-tuned model, and of damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5g2convert import CheckpointError, UsageError, compare, convert, verify
from t5g2convert.adaptation.export import export
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.cli.demo import build_demo_source
from tests.adaptation.runs import FACTS, Tensors, text_only, trained_from, write_checkpoint
from tests.parity.mutations import EOI, PROJECTOR, TABLE, TOWER, Bench, Document, check_of

FROZEN_LAYER = "model.encoder.layers.2.mlp.up_proj.weight"
KEPT = "model.decoder.layers.1.self_attn.q_norm.weight"


def trains(name: str) -> bool:
    """Train the text stacks but for two tensors."""
    return text_only(name) and name not in (FROZEN_LAYER, EOI)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a Gemma 3 with images and tokenizer, its conversion, and the fine-tuned conversion."""
    root = tmp_path_factory.mktemp("scene")
    parent, model, adapted = root / "parent", root / "model", root / "adapted"
    build_demo_source(parent)
    convert(parent, model, flush=False)
    trained = trained_from(model, trains)
    # One tensor that training did not change.
    trained[KEPT] = load_file(model / "model.safetensors")[KEPT].float()
    adapt(model, trained, adapted, root / "step")
    return parent, model, adapted


def adapt(model: Path, trained: Tensors, output: Path, step: Path, **options: Any) -> Path:
    export(model, CheckpointReader(write_checkpoint(step, trained, 100)), output, facts=FACTS, flush=False, **options)
    return output


@pytest.fixture
def bench(scene: tuple[Path, Path, Path], tmp_path: Path) -> Bench:
    return Bench.of(scene[1], scene[2], tmp_path / "damaged")


def test_untrained_tensors_are_checked_and_trained_ones_are_named(bench: Bench) -> None:
    report = bench.judge()
    assert report.passed, report.failed
    assert report.complete
    assert [check.name for check in report.checks] == [
        "integrity",
        "provenance",
        "config",
        "tokenizer",
        "vision_parity",
        "runs",
    ]
    detail = check_of(report, "provenance").detail
    manifest = read_manifest(bench.folder).document()
    assert "41 tensors are the source's byte for byte" in detail
    assert "210 were trained and are finite; their values are not judged" in detail
    assert f"1 of them still have the source's values: {KEPT}" in detail
    assert manifest["adaptation"]["frozen"] == ["projector", "vision"]
    assert "difference 0" in check_of(report, "vision_parity").detail
    assert any("only t5g2.json records" in remark for remark in report.remarks)
    assert any("step 100" in remark and "51200 tokens" in remark for remark in report.remarks)


def test_without_a_source_only_integrity_is_checked(bench: Bench) -> None:
    report = verify(bench.folder, record=False)
    assert report.passed
    assert not report.complete
    assert {check.name for check in report.checks} == {"integrity", "runs"}


def test_the_result_is_recorded(bench: Bench) -> None:
    verify(bench.folder, bench.source)
    assert read_manifest(bench.folder).document()["verification"]["passed"] is True


def test_the_gemma_3_parent_is_not_its_source(scene: tuple[Path, Path, Path]) -> None:
    with pytest.raises(
        UsageError, match="was trained after conversion; pass the T5Gemma 2 it was trained from, not parent"
    ):
        verify(scene[2], scene[0], record=False)


def test_a_conversion_is_not_a_fine_tuned_model(scene: tuple[Path, Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="is not Gemma 3"):
        verify(scene[1], scene[1], record=False)


def _nudge(name: str, element: int = 0) -> Callable[[Bench], None]:
    """Flip one bit of one number."""

    def change(bench: Bench) -> None:
        with bench.tensors() as tensors:
            flat = tensors[name].view(-1).view(torch.uint16)
            flat[element] = flat[element] ^ 1

    return change


def _setting(*path: str, value: Any) -> Callable[[Bench], None]:
    def put(document: Document) -> None:
        for key in path[:-1]:
            document = document[key]
        assert document[path[-1]] != value
        document[path[-1]] = value

    return lambda bench: bench.edit("config.json", put)


def _not_a_number(bench: Bench) -> None:
    with bench.tensors() as tensors:
        tensors["model.decoder.norm.weight"][5] = float("nan")


def _token(bench: Bench) -> None:
    bench.edit("tokenizer.json", lambda document: document["added_tokens"][0].update(special=False))


def _stranger(bench: Bench) -> None:
    (bench.folder / "chat_template.jinja").write_text("{{ 'something else' }}")


ATTACKS: dict[str, tuple[Callable[[Bench], None], set[str]]] = {
    "the first byte of the tower": (
        _nudge(f"{TOWER}embeddings.patch_embedding.weight"),
        {"provenance", "vision_parity"},
    ),
    "a bias of the tower": (_nudge(f"{TOWER}encoder.layers.1.mlp.fc2.bias", 7), {"provenance", "vision_parity"}),
    "the projector": (_nudge(f"{PROJECTOR}mm_input_projection_weight", 99), {"provenance", "vision_parity"}),
    "a frozen layer": (_nudge(FROZEN_LAYER, -1), {"provenance"}),
    "the end-of-image row": (_nudge(EOI, 3), {"provenance"}),
    "a window": (_setting("decoder", "sliding_window", value=17), {"config"}),
    "an epsilon": (_setting("encoder", "text_config", "rms_norm_eps", value=1e-5), {"config"}),
    "a rope factor": (
        _setting("decoder", "rope_parameters", "full_attention", "factor", value=2.0),
        {"config"},
    ),
    "a vision setting": (_setting("encoder", "vision_config", "layer_norm_eps", value=1e-3), {"config"}),
    "a number that is none": (_not_a_number, {"provenance"}),
    "a token": (_token, {"tokenizer"}),
    "a chat template": (_stranger, {"provenance", "tokenizer"}),
}


@pytest.mark.sampled
@pytest.mark.parametrize("attack", ATTACKS)
def test_only_trained_values_may_change(attack: str, bench: Bench) -> None:
    change, caught_by = ATTACKS[attack]
    change(bench)
    assert {"integrity"} <= {check.name for check in bench.judge().failed}
    bench.reseal()
    failed = {check.name for check in bench.judge().failed}
    assert caught_by <= failed, failed
    assert "integrity" not in failed


def _trained(*names: str) -> Callable[[Document], object]:
    return lambda manifest: manifest["adaptation"]["trained"].extend(names)


def _undeclared(manifest: Document) -> None:
    manifest["adaptation"]["trained"].remove("model.decoder.norm.weight")


def _drop(manifest: Document) -> None:
    manifest["mapping"] = {"name": "gemma3", "sha256": "0" * 64}
    del manifest["adaptation"]


FALSE_FIELDS: dict[str, tuple[Callable[[Document], object], str]] = {
    "that the tower was trained": (
        _trained(f"{TOWER}post_layernorm.weight"),
        "belongs to the vision tower, which stays frozen",
    ),
    "that a tensor was trained which is not there": (
        _trained("model.decoder.norm.bias"),
        "is not a tensor of this model",
    ),
    "that the softmax was trained": (_trained("lm_head.out_proj.weight"), f"is another name of {TABLE}"),
    "that a trained tensor was not": (_undeclared, "model.decoder.norm.weight[0] is not model.decoder.norm.weight"),
    "that nothing is frozen": (
        lambda manifest: manifest["adaptation"].update(frozen=[]),
        "records trained names or parts that this source does not have",
    ),
    "that it was cast": (
        lambda manifest: manifest["options"].update(dtype="float32"),
        "is BF16",
    ),
    "that it was converted": (_drop, "t5g2.json records no adaptation"),
    "of another source": (
        lambda manifest: manifest["source"]["files"]["model.safetensors"].update(bytes=7),
        "records files with other names or sizes",
    ),
    "that its source is a Gemma 3": (
        lambda manifest: manifest["source"].update(family="gemma3"),
        "says source family 'gemma3', expected 't5gemma2'",
    ),
}


@pytest.mark.parametrize("false_field", FALSE_FIELDS)
def test_a_false_field_in_the_manifest_is_found(false_field: str, bench: Bench) -> None:
    falsify, message = FALSE_FIELDS[false_field]
    bench.reseal(falsify)
    check = check_of(bench.judge(), "provenance")
    assert not check.passed
    assert message in "\n".join([check.detail, *check.offenders])


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: manifest["adaptation"].pop("steps"),
        lambda manifest: manifest["adaptation"].update(started="today"),
        lambda manifest: manifest.update(adaptation=None),
        lambda manifest: manifest.update(mapping={"name": "gemma3", "sha256": "0" * 64}),
        lambda manifest: manifest.pop("adaptation"),
    ],
)
def test_an_invalid_training_record_in_the_manifest_fails(damage: Callable[[Document], object], bench: Bench) -> None:
    bench.reseal(damage)
    assert not check_of(bench.judge(), "integrity").passed
    with pytest.raises(CheckpointError):
        read_manifest(bench.folder)


def test_a_cast_is_checked_as_declared(scene: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = scene[1]
    adapt(model, trained_from(model, trains), tmp_path / "out", tmp_path / "step", dtype="float32")
    report = verify(tmp_path / "out", model, record=False)
    assert report.passed, report.failed
    assert any("were cast from bfloat16 to float32" in remark for remark in report.remarks)
    bench = Bench.of(model, tmp_path / "out", tmp_path / "damaged")
    with bench.tensors() as tensors:
        tensors[f"{TOWER}post_layernorm.weight"][0] += 1
    bench.reseal()
    assert {"provenance", "vision_parity"} <= {check.name for check in bench.judge().failed}


@pytest.mark.parametrize("which", ["mm_input_projection_weight", "mm_soft_emb_norm.weight", ""])
def test_with_a_trained_projector_the_tower_is_still_compared(
    which: str, scene: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model = scene[1]
    trained = trained_from(model, lambda name: "multi_modal_projector" in name and name.endswith(which))
    adapt(model, trained, tmp_path / "out", tmp_path / "step")
    report = verify(tmp_path / "out", model, record=False)
    assert report.passed, report.failed
    assert "tower states before the projector" in check_of(report, "vision_parity").detail
    bench = Bench.of(model, tmp_path / "out", tmp_path / "damaged")
    _nudge(f"{TOWER}post_layernorm.weight")(bench)
    bench.reseal()
    assert not check_of(bench.judge(), "vision_parity").passed


def test_a_zero_projector_ignores_images_until_trained(
    scene: tuple[Path, Path, Path], twin_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    convert(twin_folder("text-8"), model, vision_from=twin_folder("donor-wide"), flush=False)
    adapt(model, trained_from(model, text_only), tmp_path / "out", tmp_path / "step")
    report = verify(tmp_path / "out", model, record=False)
    assert report.passed, report.failed
    assert any("its projector is zeros and was not trained" in remark for remark in report.remarks)


def test_a_text_only_model_has_no_tower_to_compare(converted_twin: Callable[[str], Path], tmp_path: Path) -> None:
    model = converted_twin("text-sharded")
    adapt(model, trained_from(model, text_only), tmp_path / "out", tmp_path / "step")
    report = verify(tmp_path / "out", model, record=False)
    assert report.passed, report.failed
    assert report.to_json()["skipped"] == {
        "tokenizer": "the output has no tokenizer",
        "vision_parity": "the source has no images",
    }


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_extracted_part_can_be_verified(part: str, scene: tuple[Path, Path, Path], tmp_path: Path) -> None:
    convert(scene[2], tmp_path / "part", part=part, flush=False)
    assert verify(tmp_path / "part", scene[2], record=False).passed
    assert not verify(tmp_path / "part", scene[1], record=False).passed


def test_its_distance_to_the_gemma_3_parent_can_be_measured(scene: tuple[Path, Path, Path], tmp_path: Path) -> None:
    parent, model, adapted = scene
    (tmp_path / "text.txt").write_text("an encoder-decoder reads, then writes what it has read. " * 4)
    before, after = (compare(parent, folder, tmp_path / "text.txt") for folder in (model, adapted))
    assert before.decoder_alone.kl == 0
    assert after.decoder_alone.kl > 0
    assert json.dumps(after.to_json())


def test_it_can_be_fine_tuned_again(scene: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapted = tmp_path / "adapted"
    shutil.copytree(scene[2], adapted)
    adapt(adapted, trained_from(adapted, trains, seed=1), tmp_path / "out", tmp_path / "step")
    assert verify(tmp_path / "out", adapted, record=False).passed
    other = verify(tmp_path / "out", scene[1], record=False)
    assert "for model.safetensors of the source, but it has" in check_of(other, "provenance").detail
