"""transformers loads a conversion with nothing missing, and it computes the same as Gemma 3."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from t5g2convert import convert
from tests.conftest import TwinFolder
from tests.interop.judge import judge, tower_difference
from tests.models.twins import BY_NAME, DIALECTS, IMAGE_SPELLINGS, TEXT_SPELLINGS, TWINS, Twin, respell, rewrite_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_the_three_equalities_hold_exactly(
    twin: Twin, dtype: torch.dtype, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder(twin.name)
    convert(source, tmp_path / "out")
    judgement = judge(source, tmp_path / "out", dtype)
    assert judgement.complaints == []
    assert judgement.decoder == 0.0
    assert judgement.encoder == 0.0
    assert judgement.vision == (None if twin.vision is None else 0.0)
    assert judgement.finite
    assert len(judgement.generated) > 1


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["text-float32", "images-8", "text-float16"])
def test_a_cast_conversion_equals_the_source_loaded_in_that_dtype(
    name: str, target: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder(name)
    convert(source, tmp_path / "out", dtype=target)
    judgement = judge(source, tmp_path / "out", getattr(torch, target))
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)
    assert judgement.vision in (None, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("donor", ["images-13", "donor-wide"])
def test_a_grafted_tower_equals_the_donors_and_the_text_equals_the_sources(
    donor: str, dtype: torch.dtype, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", vision_from=twin_folder(donor))
    judgement = judge(twin_folder("text-8"), tmp_path / "out", dtype)
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)
    assert judgement.finite
    assert tower_difference(twin_folder(donor), tmp_path / "out", dtype) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["text-8", "images-13"])
def test_another_factor_and_window_equal_a_gemma_3_with_them(
    name: str, dtype: torch.dtype, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder(name), tmp_path / "out", rope_scaling="linear:3", sliding_window=9)

    def change(text: dict[str, Any]) -> None:
        text["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 3.0}
        text["sliding_window"] = 9

    rewrite_config(twin_folder(name), tmp_path / "changed", change)
    judgement = judge(tmp_path / "changed", tmp_path / "out", dtype)
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)
    assert judge(twin_folder(name), tmp_path / "out", dtype).decoder > 0


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def tensors(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {
        name: tensor.view(torch.uint8).numpy().tobytes()
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    ("twin", "spelling"),
    [("images-8", name) for name in IMAGE_SPELLINGS] + [("text-8", name) for name in TEXT_SPELLINGS],
)
def test_every_spelling_gives_the_same_tensors_and_config(
    twin: str, spelling: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder(twin)
    respell(source, tmp_path / "respelled", (IMAGE_SPELLINGS | TEXT_SPELLINGS)[spelling])
    convert(source, tmp_path / "expected")
    convert(tmp_path / "respelled", tmp_path / "found")
    assert tensors(tmp_path / "found") == tensors(tmp_path / "expected")
    assert (tmp_path / "found/config.json").read_bytes() == (tmp_path / "expected/config.json").read_bytes()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["text-13", "images-13", "text-8"])
def test_every_config_dialect_gives_the_same_output(
    name: str, dialect: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder(name)
    rewrite_config(source, tmp_path / "rewritten", DIALECTS[dialect])
    convert(source, tmp_path / "expected")
    convert(tmp_path / "rewritten", tmp_path / "found")
    assert shards(tmp_path / "found") == shards(tmp_path / "expected")
    assert (tmp_path / "found/config.json").read_bytes() == (tmp_path / "expected/config.json").read_bytes()


def test_the_fill_rows_are_cut_and_the_image_token_moves(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = twin_folder("images-with-fill")
    done = convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == config["decoder"]["vocab_size"] == 262_144
    assert config["image_token_index"] == config["encoder"]["image_token_index"] == 256_001
    table = tensors(source)["language_model.model.embed_tokens.weight"]
    assert tensors(tmp_path / "out")["model.encoder.embed_tokens.weight"] == table[: 262_144 * 8 * 2]
    assert any("cut from 262208 to 262144" in note for note in done.notes)
    assert any("from 262144 to 256001" in note for note in done.notes)


OLDER = os.environ.get("T5G2_OLDER_PYTHON", "")


oldest = pytest.mark.skipif(
    not OLDER, reason="T5G2_OLDER_PYTHON names no Python with transformers 5.0.0 (make test-oldest)"
)


@oldest
@pytest.mark.parametrize("name", ["text-8", "text-real-vocabulary", "images-8", "images-13", "images-with-fill"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_oldest_transformers_judges_the_same(
    name: str, dtype: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder(name)
    # transformers 5.0 reads only the published spelling of a source.
    if BY_NAME[name].vision is not None:
        respell(source, tmp_path / "published", IMAGE_SPELLINGS["hub"])
        source = tmp_path / "published"
    convert(source, tmp_path / "out")
    judgement = judged_by_the_oldest(source, tmp_path / "out", dtype)
    assert (judgement["complaints"], judgement["decoder"], judgement["encoder"]) == ([], 0.0, 0.0)
    assert judgement["vision"] in (None, 0.0)


@oldest
@pytest.mark.parametrize("projector", ["zeros", "aligned"])
def test_the_oldest_transformers_takes_a_graft(projector: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = twin_folder("text-8")
    convert(source, tmp_path / "out", vision_from=twin_folder("donor-wide"), projector=projector)
    judgement = judged_by_the_oldest(source, tmp_path / "out", "bfloat16")
    assert (judgement["complaints"], judgement["decoder"], judgement["encoder"]) == ([], 0.0, 0.0)


def judged_by_the_oldest(source: Path, output: Path, dtype: str) -> dict[str, Any]:
    command = [OLDER, str(Path(__file__).with_name("judge.py")), str(source), str(output), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))
