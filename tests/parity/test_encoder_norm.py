"""A conversion whose encoder has another final norm: what is written, what is proved, and what verify refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Gemma2ForConditionalGeneration

from t5g2convert import MappingError, UsageError, convert, plan, verify
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from tests.conftest import TwinFolder
from tests.parity.mutations import Bench, MakeBench, Tally, check_of, flip_exponent

NORM = "model.encoder.norm.weight"

Damage = Callable[[Bench], object]


def options_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST_FILE).read_text())["options"])


@pytest.mark.parametrize(
    ("norm", "recorded", "stored"),
    [("unit", "1", 0.0), ("1.0", "1", 0.0), ("0.1", "0.1", -0.8984375), ("3", "3", 2.0), ("1e-2", "0.01", -0.98828125)],
)
def test_the_norm_has_one_value_and_all_else_is_the_same(
    norm: str, recorded: str, stored: float, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("images-8"), tmp_path / "out", encoder_norm=norm)
    found, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted_twin("images-8")))
    assert found.keys() == kept.keys()
    assert [name for name in found if not torch.equal(found[name], kept[name])] == [NORM]
    # 0.1 - 1 and 0.01 - 1 are rounded to bfloat16.
    assert found[NORM].dtype == kept[NORM].dtype == torch.bfloat16
    assert found[NORM].unique().tolist() == [stored]
    assert options_of(tmp_path / "out") == {"encoder_norm": recorded}
    report = verify(tmp_path / "out", twin_folder("images-8"))
    assert report.passed, report.failed
    assert f"with the declared final norm of {recorded}" in check_of(report, "encoder_parity").detail
    assert "1 has one value, as declared" in check_of(report, "provenance").detail
    for name in ("decoder_parity", "encoder_parity"):
        figures = check_of(report, name).figures
        assert figures is not None
        assert figures.max_abs == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("twin", ["text-8", "text-float32", "text-float16", "text-sharded"])
def test_every_dtype_is_rounded_as_verify_expects(
    twin: str, dtype: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    for number, norm in enumerate(("0.3", "7.77", "123.4567")):
        out = tmp_path / str(number)
        convert(twin_folder(twin), out, encoder_norm=norm, dtype=dtype)
        assert verify(out, twin_folder(twin)).passed


@torch.inference_mode()
def test_transformers_computes_the_states_of_the_parent_norm_divided_by_its_factors(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("text-float32"), tmp_path / "out", encoder_norm="0.5")
    ids = torch.randint(5, 60, (2, 19), generator=torch.Generator().manual_seed(0))
    changed, kept = (
        T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        for folder in (tmp_path / "out", converted_twin("text-float32"))
    )
    factors = 1 + load_file(converted_twin("text-float32") / "model.safetensors")[NORM]
    states, others = (model.model.encoder(input_ids=ids).last_hidden_state for model in (changed, kept))
    torch.testing.assert_close(states, others / factors * 0.5, rtol=1e-4, atol=1e-5)


def test_plan_and_card_say_it(twin_folder: TwinFolder, tmp_path: Path) -> None:
    made = plan(twin_folder("text-8"), encoder_norm="unit")
    (tensor,) = (tensor for tensor in made.tensors if tensor.name == NORM)
    assert (tensor.content.kind, tensor.content.value, tensor.origin) == ("filled", 0.0, None)
    assert any(note.startswith("the encoder's final norm multiplies by 1 everywhere") for note in made.notes)
    assert [each["value"] for each in made.to_json()["tensors"] if "value" in each] == [0.0]
    # The decoder still has the norm, so nothing of the source is lost.
    assert not [drop for drop in made.dropped if "norm" in drop.name]


def test_a_norm_that_no_stack_takes_is_dropped_by_name(twin_folder: TwinFolder, tmp_path: Path) -> None:
    other = twin_folder("text-unlike-7")
    made = plan(twin_folder("text-8"), decoder_from=other, encoder_norm="unit")
    assert [drop.because for drop in made.dropped if drop.name.endswith("model.norm.weight")] == [
        "the decoder is another checkpoint's, and the encoder's final norm is replaced"
    ]
    convert(twin_folder("text-8"), tmp_path / "out", decoder_from=other, encoder_norm="unit", encoder_layers="first:5")
    report = verify(tmp_path / "out", twin_folder("text-8"), decoder_from=other)
    assert report.passed, report.failed


@pytest.mark.parametrize("norm", ["", "0", "-1", "nan", "inf", "10001", "0.009", "small", "keep ", "1,5"])
def test_a_factor_that_cannot_be_is_refused(norm: str, twin_folder: TwinFolder) -> None:
    with pytest.raises(UsageError, match=r"'.*' is not keep, unit, or a number between 0.01 and 10000"):
        plan(twin_folder("text-8"), encoder_norm=norm)


def test_keep_is_the_default_and_leaves_no_trace(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", encoder_norm="keep")
    for name in ("model.safetensors", MANIFEST_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (converted_twin("text-8") / name).read_bytes()


def test_maps_without_the_mark_and_extractions_refuse_it(twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    with pytest.raises(MappingError, match="--encoder-norm cannot be used with mapping 'gemma2'"):
        plan(twin_folder("gemma2-5"), encoder_norm="unit")
    with pytest.raises(MappingError, match="--encoder-norm cannot be used with mapping"):
        plan(converted_twin("text-8"), part="encoder", encoder_norm="unit")


# Damage


def fill(value: float) -> Damage:
    def damage(made: Bench) -> None:
        with made.tensors() as tensors:
            tensors[NORM].fill_(value)

    return damage


def declare(**options: Any) -> Damage:
    return lambda made: made.reseal(lambda manifest: manifest.update(options=options))


def one_element(made: Bench) -> None:
    with made.tensors() as tensors:
        flip_exponent(tensors[NORM][3:4])


DAMAGES = {
    "another-value": fill(0.25),
    "one-element": one_element,
    "not-declared": declare(),
    "declared-otherwise": declare(encoder_norm="0.2"),
    "declared-as-a-number": declare(encoder_norm=0.1),
    "declared-not-normalised": declare(encoder_norm="0.10"),
    "declared-as-nonsense": declare(encoder_norm="much"),
}


@pytest.mark.usefixtures("same_source")
def test_no_other_norm_and_no_other_declaration_passes(bench: MakeBench) -> None:
    made = bench("text-8", encoder_norm="0.1")
    assert made.judge().passed
    tally = Tally()
    for name, damage in DAMAGES.items():
        made.restore()
        damage(made)
        made.reseal()
        tally.add(name, made.judge())
    tally.close("encoder norm", len(DAMAGES))


@pytest.mark.usefixtures("same_source")
def test_a_norm_that_was_replaced_without_a_declaration_is_found(bench: MakeBench) -> None:
    made = bench("text-8")
    fill(0.0)(made)
    made.reseal()
    report = made.judge()
    assert {check.name for check in report.failed} >= {"provenance", "encoder_parity"}
