"""Verification of models with a vision tower from another checkpoint."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import MappingError, Report, UsageError, convert, plan, verify
from t5g2convert.checkpoint.manifest import seal
from tests.conftest import TwinFolder

TOWER = "model.encoder.vision_tower.vision_model."
PROJECTOR = "model.encoder.multi_modal_projector."


@dataclass(frozen=True)
class Grafted:
    """A conversion with a donor that the test may damage and verify."""

    source: Path
    donor: Path
    output: Path
    projector: str = "copy"
    residual: float | None = None

    def verify(self, **options: Any) -> Report:
        return verify(self.output, self.source, **{"vision_from": self.donor, "record": False, **options})

    def failed(self) -> set[str]:
        return {check.name for check in self.verify().failed}

    def edit_tensors(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        path = self.output / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    def edit_manifest(self, **changes: Any) -> None:
        path = self.output / "t5g2.json"
        path.write_bytes(seal(json.loads(path.read_text()) | changes))


DONORS = {"copy": "images-13", "zeros": "donor-wide", "aligned": "donor-wide"}


@pytest.fixture(params=DONORS)
def grafted(request: pytest.FixtureRequest, twin_folder: TwinFolder, tmp_path: Path) -> Grafted:
    """Return a conversion with a copied, a zero, and an aligned projector."""
    source, donor = twin_folder("text-8"), twin_folder(DONORS[request.param])
    done = convert(source, tmp_path / "out", vision_from=donor, projector=request.param, flush=False)
    return Grafted(source, donor, tmp_path / "out", request.param, done.residual)


def test_a_graft_passes_exactly(grafted: Grafted) -> None:
    report = grafted.verify()
    assert report.passed
    names = [check.name for check in report.checks]
    assert {"integrity", "provenance", "config", "vision_parity", "decoder_parity", "encoder_parity", "runs"} <= set(
        names
    )
    for check in report.checks:
        if check.figures is not None:
            assert check.figures.max_abs == 0.0


def test_a_copied_projector_is_compared_after_projection_and_zeros_before(grafted: Grafted) -> None:
    details = {check.name: check.detail for check in grafted.verify().checks}
    compared = "image features" if grafted.projector == "copy" else "tower states before the projector"
    assert details["vision_parity"].startswith(compared)
    assert ("image" in details["runs"]) is (grafted.projector != "zeros")
    assert ("is the donor's, aligned" in details["provenance"]) is (grafted.projector == "aligned")


def test_provenance_reports_owners_and_the_alignment_residual(grafted: Grafted) -> None:
    (detail,) = (check.detail for check in grafted.verify().checks if check.name == "provenance")
    made = plan(grafted.source, vision_from=grafted.donor, projector=grafted.projector)
    donated = sum(tensor.content.kind == "copy" and tensor.part in ("vision", "projector") for tensor in made.tensors)
    copied = sum(tensor.content.kind == "copy" for tensor in made.tensors)
    assert f"{donated} are the donor's byte for byte" in detail
    assert detail.startswith(f"{copied - donated} tensors are the source's byte for byte")
    assert ("1 is zeros" in detail) is (grafted.projector == "zeros")
    assert ("residual" in detail) is (grafted.projector == "aligned")
    if grafted.residual is not None:
        assert f"1 is the donor's, aligned (residual {grafted.residual:.3g})" in detail


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, ": pixels match the donor's"),
        ("special_tokens_map.json", ": tokens match the source's, pixels match the donor's"),
    ],
)
def test_pixel_values_are_reported_as_the_donors(
    name: str | None, expected: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    shutil.copytree(twin_folder("text-8"), tmp_path / "source")
    if name is not None:
        (tmp_path / "source" / name).write_text("{}")
    donor = twin_folder("donor-wide")
    convert(tmp_path / "source", tmp_path / "out", vision_from=donor, flush=False)
    report = verify(tmp_path / "out", tmp_path / "source", vision_from=donor, record=False)
    (found,) = (check for check in report.checks if check.name == "tokenizer")
    assert found.passed
    assert found.detail.endswith(expected)


def test_the_result_is_recorded(grafted: Grafted) -> None:
    grafted.verify(record=True)
    assert json.loads((grafted.output / "t5g2.json").read_text())["verification"]["passed"] is True
    assert grafted.verify().passed


def test_without_the_donor_verification_is_refused(grafted: Grafted) -> None:
    with pytest.raises(UsageError, match="--vision-from"):
        grafted.verify(vision_from=None)


def test_another_donor_is_refused(grafted: Grafted, twin_folder: TwinFolder) -> None:
    report = grafted.verify(vision_from=twin_folder("images-8"))
    assert {"provenance"} <= {check.name for check in report.failed}


def test_a_donor_without_a_source_is_refused(grafted: Grafted) -> None:
    with pytest.raises(UsageError, match="need --source"):
        verify(grafted.output, vision_from=grafted.donor, record=False)


def test_a_donor_for_a_conversion_without_one_is_refused(converted_twin: TwinFolder, twin_folder: TwinFolder) -> None:
    for name in ("text-8", "images-8"):
        with pytest.raises(UsageError, match="is not from another checkpoint") as refused:
            verify(converted_twin(name), twin_folder(name), vision_from=twin_folder("images-13"), record=False)
        assert refused.value.hint == "omit --vision-from"
    with pytest.raises(UsageError, match="is not from another checkpoint"):
        verify(converted_twin("text-8"), twin_folder("text-8"), decoder_from=twin_folder("text-13"), record=False)


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], set[str]]] = {
    "a weight of the tower": (
        lambda tensors: tensors[f"{TOWER}encoder.layers.1.mlp.fc1.weight"][0].neg_(),
        {"provenance", "vision_parity"},
    ),
    "two layers of the tower exchanged": (
        lambda tensors: tensors.update(
            {
                f"{TOWER}encoder.layers.{one}.layer_norm1.bias": tensors[
                    f"{TOWER}encoder.layers.{other}.layer_norm1.bias"
                ].clone()
                for one, other in ((0, 2), (2, 0))
            }
        ),
        {"provenance", "vision_parity"},
    ),
    "the norm of the soft tokens": (
        lambda tensors: tensors[f"{PROJECTOR}mm_soft_emb_norm.weight"][3].add_(1),
        {"provenance", "vision_parity"},
    ),
    "the projector": (
        lambda tensors: tensors[f"{PROJECTOR}mm_input_projection_weight"][1].add_(1),
        {"provenance"},
    ),
    "a decoder tensor": (
        lambda tensors: tensors["model.decoder.layers.2.self_attn.q_proj.weight"].neg_(),
        {"provenance", "decoder_parity"},
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(grafted: Grafted, damage: str) -> None:
    change, expected = DAMAGES[damage]
    grafted.edit_tensors(change)
    assert expected | {"integrity"} <= grafted.failed()


@pytest.mark.sampled
@pytest.mark.parametrize("setting", ["num_attention_heads", "layer_norm_eps", "hidden_act", "image_size"])
def test_a_changed_setting_of_the_tower_is_found(grafted: Grafted, setting: str) -> None:
    path = grafted.output / "config.json"
    config = json.loads(path.read_text())
    tower = config["encoder"]["vision_config"]
    tower[setting] = {"num_attention_heads": 4, "layer_norm_eps": 1e-3, "hidden_act": "relu", "image_size": 28}[setting]
    path.write_text(json.dumps(config))
    assert {"config", "integrity"} <= grafted.failed()


def test_a_false_projector_in_the_manifest_is_found(grafted: Grafted) -> None:
    for false_projector in DONORS.keys() - {grafted.projector}:
        grafted.edit_manifest(options={"projector": false_projector})
        if false_projector == "copy":
            with pytest.raises(MappingError, match="has output width 32"):
                grafted.verify()
        else:
            assert "provenance" in grafted.failed()


def test_a_false_ridge_in_the_manifest_is_found(twin_folder: TwinFolder, tmp_path: Path) -> None:
    made = Grafted(twin_folder("text-8"), twin_folder("donor-wide"), tmp_path / "out", "aligned")
    convert(made.source, made.output, vision_from=made.donor, projector="aligned", ridge=0.1, flush=False)
    assert made.verify().passed
    made.edit_manifest(options={"projector": "aligned", "ridge": 0.11})
    (check,) = made.verify().failed
    assert check.name == "provenance"
    assert "are not the donor's projector, aligned" in check.detail


def test_one_step_of_one_element_of_an_aligned_projector_is_found(twin_folder: TwinFolder, tmp_path: Path) -> None:
    made = Grafted(twin_folder("text-8"), twin_folder("donor-wide"), tmp_path / "out", "aligned")
    convert(made.source, made.output, vision_from=made.donor, projector="aligned", flush=False)

    def step(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PROJECTOR}mm_input_projection_weight"].view(torch.int16)[7, 3] += 1

    made.edit_tensors(step)
    (offender,) = next(check for check in made.verify().failed if check.name == "provenance").offenders
    assert "1 of 480 elements" in offender
    assert "[7, 3]" in offender


def test_a_false_donor_file_in_the_manifest_is_found(grafted: Grafted) -> None:
    donor = json.loads((grafted.output / "t5g2.json").read_text())["vision_from"]
    donor["files"]["model.safetensors"]["bytes"] += 1
    grafted.edit_manifest(vision_from=donor)
    assert "provenance" in grafted.failed()


def test_a_declared_tower_of_zeros_does_not_pass_as_the_donors(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    """Check a text-only conversion that claims to have a donor."""
    shutil.copytree(converted_twin("text-8"), tmp_path / "out")
    made = Grafted(twin_folder("text-8"), twin_folder("images-13"), tmp_path / "out")
    made.edit_manifest(options={"projector": "copy"})
    assert {"provenance", "config"} <= made.failed()
