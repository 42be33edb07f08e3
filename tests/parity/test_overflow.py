"""A float16 overflow is reported as the dtype's fault, not the source's or the conversion's."""

import re
from pathlib import Path

import pytest

from t5g2convert import UsageError, convert, verify
from t5g2convert.parity.compare import compare
from tests.conftest import TwinFolder
from tests.models.overflowing import make_overflow

NAMES_THE_DTYPE = r"^float16 overflows .* \(compute with --dtype float32\)$"


@pytest.mark.parametrize("name", ["text-8", "images-8", "gemma2-5", "text-float32"])
def test_V4_a_cast_to_float16_is_judged_in_another_dtype(name: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = make_overflow(twin_folder(name), tmp_path / "source")
    convert(source, tmp_path / "out", dtype="float16")
    with pytest.raises(UsageError, match=NAMES_THE_DTYPE) as caught:
        verify(tmp_path / "out", source)
    assert re.search(r"after layers\.3\b", caught.value.message)
    for dtype in ("float32", "bfloat16"):
        assert verify(tmp_path / "out", source, dtype=dtype).passed


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_conversion_is_not_blamed_when_the_user_chooses_float16(
    dtype: str | None, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = make_overflow(twin_folder("text-8"), tmp_path / "source")
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out", source, dtype=dtype).passed
    with pytest.raises(UsageError, match=NAMES_THE_DTYPE):
        verify(tmp_path / "out", source, dtype="float16")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_extracted_from_a_model_that_overflows(part: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(make_overflow(twin_folder("images-8"), tmp_path / "source"), tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "out", part=part)
    assert verify(tmp_path / "out", tmp_path / "whole").passed
    with pytest.raises(UsageError, match=NAMES_THE_DTYPE):
        verify(tmp_path / "out", tmp_path / "whole", dtype="float16")


@pytest.mark.parametrize("name", ["text-8", "images-8", "gemma2-5"])
def test_V4_without_a_source_the_dtype_is_named_too(name: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(make_overflow(twin_folder(name), tmp_path / "source"), tmp_path / "out", dtype="float16")
    with pytest.raises(UsageError, match=NAMES_THE_DTYPE):
        verify(tmp_path / "out")
    assert verify(tmp_path / "out", dtype="float32").passed


def test_an_overflow_only_in_the_conversion_is_its_fault(twin_folder: TwinFolder, tmp_path: Path) -> None:
    """The source stays finite in float16, so the conversion differs in any dtype."""
    source = twin_folder("text-float16")
    convert(source, tmp_path / "whole")
    out = make_overflow(tmp_path / "whole", tmp_path / "out")
    report = verify(out, source)
    found = {check.name: check.detail for check in report.failed}
    assert {"integrity", "provenance", "decoder_parity", "encoder_parity", "runs"} == set(found)
    assert "not finite" in found["decoder_parity"]
    assert "departs at decoder layers.3" in found["decoder_parity"]
    assert "--dtype float32" in found["runs"]


def test_a_float16_verification_states_its_limits(twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(twin_folder("text-float16"), tmp_path / "out")
    report = verify(tmp_path / "out", twin_folder("text-float16"))
    assert report.passed
    assert any("computed in float16" in remark for remark in report.remarks)
    report = verify(tmp_path / "out", twin_folder("text-float16"), dtype="float32")
    assert not any("computed in float16" in remark for remark in report.remarks)


def test_compare_names_the_dtype(demo_source: Path, tmp_path: Path) -> None:
    source = make_overflow(demo_source, tmp_path / "source")
    convert(source, tmp_path / "out", dtype="float16")
    (tmp_path / "text").write_text("one two three four five six seven eight nine ten")
    with pytest.raises(UsageError, match=NAMES_THE_DTYPE):
        compare(source, tmp_path / "out", tmp_path / "text")
    compared = compare(source, tmp_path / "out", tmp_path / "text", dtype="float32")
    assert compared.decoder_alone.kl < 0.1
