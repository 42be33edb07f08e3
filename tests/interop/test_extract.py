"""transformers loads extracted parts with nothing missing, and they compute the same as the whole."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, Gemma3ForCausalLM, T5Gemma2ForConditionalGeneration

from t5g2convert import convert
from tests.conftest import TwinFolder
from tests.interop.judge_extracts import ExtractJudgement, judge_extracts
from tests.interop.test_conversion import OLDER, oldest
from tests.models.gemma_tokenizer import write_tokenizer
from tests.models.twins import BY_NAME, IMAGE_SPELLINGS, respell, write_twin

NAMES = ["text-8", "text-13", "text-float32", "text-sharded", "images-8", "images-13", "images-float32"]


@pytest.fixture
def extracts(converted_twin: TwinFolder, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Return the encoder and the decoder of a converted twin."""

    def make(name: str) -> tuple[Path, Path]:
        folders = tmp_path / f"{name}.encoder", tmp_path / f"{name}.decoder"
        for part, folder in zip(("encoder", "decoder"), folders, strict=True):
            convert(converted_twin(name), folder, part=part)
        return folders

    return make


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_parts_and_they_compute_the_same_as_the_whole(
    name: str,
    dtype: torch.dtype,
    extracts: Callable[[str], tuple[Path, Path]],
    converted_twin: TwinFolder,
    twin_folder: TwinFolder,
) -> None:
    judgement = judge_extracts(converted_twin(name), *extracts(name), twin_folder(name), dtype)
    vision = 0.0 if BY_NAME[name].vision is not None else None
    assert judgement == ExtractJudgement([], 0.0, vision, 0.0, vision, judgement.generated, True)
    assert len(judgement.generated) > 1


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("name", ["text-8", "text-13", "text-float32", "text-float16", "text-real-vocabulary"])
def test_the_decoder_of_a_fresh_conversion_is_the_source_byte_for_byte(
    name: str, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    """The same file, including the header."""
    convert(converted_twin(name), tmp_path / "back", part="decoder")
    expected = (twin_folder(name) / "model.safetensors").read_bytes()
    assert (tmp_path / "back/model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("name", ["images-8", "images-13", "images-float32"])
def test_so_it_is_with_images_where_the_source_is_spelt_as_the_hub_does(
    name: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    respell(twin_folder(name), tmp_path / "hub", IMAGE_SPELLINGS["hub"])
    convert(tmp_path / "hub", tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "back", part="decoder")
    expected = (tmp_path / "hub/model.safetensors").read_bytes()
    assert (tmp_path / "back/model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("name", ["text-sharded", "images-sharded", "images-with-head", "images-8"])
def test_tensors_equal_the_sources_in_other_files_or_spellings(
    name: str, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(converted_twin(name), tmp_path / "back", part="decoder")
    expected = {
        key.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for key, tensor in tensors_of(twin_folder(name)).items()
        if ".head." not in key
    }
    assert same(tensors_of(tmp_path / "back"), expected)


def test_of_a_table_with_fill_the_real_rows_come_back(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(converted_twin("text-with-fill"), tmp_path / "back", part="decoder")
    expected = tensors_of(twin_folder("text-with-fill"))
    table = "model.embed_tokens.weight"
    expected[table] = expected[table][:262_144]
    assert same(tensors_of(tmp_path / "back"), expected)
    assert json.loads((tmp_path / "back/config.json").read_text())["vocab_size"] == 262_144


def test_the_way_there_and_back_and_there_again_is_the_same(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    for name in ("text-13", "images-13"):
        convert(converted_twin(name), tmp_path / f"{name}.back", part="decoder")
        convert(tmp_path / f"{name}.back", tmp_path / f"{name}.again")
        assert same(tensors_of(tmp_path / f"{name}.again"), tensors_of(converted_twin(name)))
        found, expected = (
            json.loads((folder / "config.json").read_text())
            for folder in (tmp_path / f"{name}.again", converted_twin(name))
        )
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text-with-fill", "images-with-fill"])
def test_sentence_transformers_makes_the_vectors_of_the_whole_models_encoder(name: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    source, whole, encoder = (tmp_path / place for place in ("source", "whole", "encoder"))
    source.mkdir()
    write_twin(BY_NAME[name], source)
    write_tokenizer(source)
    convert(source, whole)
    convert(whole, encoder, part="encoder")
    texts = ["a cat", "the quick brown fox jumps over the lazy dog", ""]
    load: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    found = SentenceTransformer(str(encoder), device="cpu", model_kwargs=load).encode(texts, batch_size=1)
    model = T5Gemma2ForConditionalGeneration.from_pretrained(whole, **load).eval()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model.model.encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(torch.from_numpy(vector), states[0].mean(0), rtol=0, atol=1e-6)
    assert abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.slow
def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_twin(BY_NAME["text-with-fill"], source)
    write_tokenizer(source)
    convert(source, tmp_path / "whole")
    text = "the quick brown fox"
    expected = AutoTokenizer.from_pretrained(tmp_path / "whole")(text)["input_ids"]
    for part in ("encoder", "decoder"):
        convert(tmp_path / "whole", tmp_path / part, part=part)
        assert AutoTokenizer.from_pretrained(tmp_path / part)(text)["input_ids"] == expected


def test_a_part_can_be_saved_and_loaded_by_transformers_again(
    extracts: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    encoder, decoder = extracts("text-8")
    for folder, loader in ((encoder, AutoModel), (decoder, Gemma3ForCausalLM)):
        model = loader.from_pretrained(folder, attn_implementation="eager")
        model.save_pretrained(tmp_path / "saved")
        again, loading = loader.from_pretrained(
            tmp_path / "saved", attn_implementation="eager", output_loading_info=True
        )
        assert not loading["missing_keys"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


@oldest
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["text-8", "images-8", "images-with-fill"])
def test_the_oldest_transformers_judges_the_parts_the_same(
    name: str, dtype: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source, twin = twin_folder(name), BY_NAME[name]
    if twin.vision is not None:
        respell(source, tmp_path / "published", IMAGE_SPELLINGS["hub"])
        source = tmp_path / "published"
    convert(source, tmp_path / "whole")
    for part in ("encoder", "decoder"):
        convert(tmp_path / "whole", tmp_path / part, part=part)
    folders = [str(tmp_path / place) for place in ("whole", "encoder", "decoder")]
    command = [OLDER, str(Path(__file__).with_name("judge_extracts.py")), *folders, str(source), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    judgement = json.loads(run.stdout.splitlines()[-1])
    vision = 0.0 if twin.vision is not None else None
    assert (judgement["complaints"], judgement["encoder"], judgement["decoder"]) == ([], 0.0, 0.0)
    assert (judgement["encoder_vision"], judgement["decoder_vision"]) == (vision, vision)
