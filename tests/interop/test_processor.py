"""Tokenizer and image processor of an output, loaded by transformers without network.

torchvision is not installed; transformers then takes the image processor that works with pillow, and all of this runs.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer, pipeline

from t5g2convert import convert, generate, verify
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.prompts import TextCodec, picture
from tests.conftest import TwinFolder
from tests.models.gemma_tokenizer import write_nested_processor, write_processor, write_tokenizer

LAYOUTS: Final[dict[str, Callable[..., None]]] = {"hub": write_processor, "transformers-5": write_nested_processor}

PROMPT: Final = "<start_of_image> ab ab"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a colour picture that must be resized in both directions."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    gradient = Image.linear_gradient("L").resize((131, 90))
    Image.merge("RGB", (gradient, gradient.rotate(180), gradient.transpose(Image.Transpose.FLIP_TOP_BOTTOM))).save(path)
    return path


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request: pytest.FixtureRequest, twin_folder: TwinFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Gemma 3 with images and the published vocabulary, with files as on the Hub or from transformers 5."""
    folder = tmp_path_factory.mktemp("processor") / "source"
    shutil.copytree(twin_folder("images-with-fill"), folder)
    write_tokenizer(folder)
    LAYOUTS[request.param](folder, side=56, tokens=4)
    return folder


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    convert(source, source.parent / "out")
    return source.parent / "out"


def test_the_tokenizer_is_gemmas_with_the_token_moved(source: Path, output: Path) -> None:
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(output)
    assert type(after).__name__ == type(before).__name__ == "GemmaTokenizer"
    assert (before.image_token_id, after.image_token_id) == (262_144, 256_001)
    assert (after.boi_token_id, after.eoi_token_id, after.mask_token_id) == (255_999, 256_000, 4)
    assert len(after) == 262_144
    assert before("ab ab\n\nab").input_ids == after("ab ab\n\nab").input_ids
    assert after(PROMPT).input_ids[:2] == [2, 255_999]


def test_saved_again_the_tokenizer_is_the_same_file(output: Path, tmp_path: Path) -> None:
    """GemmaTokenizer makes <mask> special, so the output does too."""
    AutoTokenizer.from_pretrained(output).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (output / "tokenizer.json").read_bytes()


def test_the_processor_gives_the_same_pixels_and_the_models_image_tokens(
    source: Path, output: Path, photo: Path
) -> None:
    with Image.open(photo) as image:
        before, after = (
            AutoProcessor.from_pretrained(folder)(images=image, text=PROMPT, return_tensors="pt")
            for folder in (source, output)
        )
    assert type(AutoProcessor.from_pretrained(output)).__name__ == "Gemma3Processor"
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    moved = before["input_ids"].masked_fill(before["input_ids"] == 262_144, 256_001)
    assert torch.equal(moved, after["input_ids"])
    config = json.loads((output / "config.json").read_text())
    assert int((after["input_ids"] == config["image_token_index"]).sum()) == 4


def test_saved_again_the_processor_says_the_same(output: Path, tmp_path: Path) -> None:
    """Readers write no null keys and only keys that they read."""
    AutoProcessor.from_pretrained(output).save_pretrained(tmp_path)
    ours, theirs = (json.loads((folder / "processor_config.json").read_text()) for folder in (output, tmp_path))
    ours["image_processor"] = {key: value for key, value in ours["image_processor"].items() if value is not None}
    theirs["image_processor"] = {key: value for key, value in theirs["image_processor"].items() if value is not None}
    assert ours == theirs


def test_the_reference_sees_the_pixels_and_tokens_that_the_processor_makes(output: Path, photo: Path) -> None:
    processor = AutoProcessor.from_pretrained(output)
    with Image.open(photo) as image:
        made = processor(images=image, text="<start_of_image>ab", return_tensors="pt")
    tower = Gemma3Reference(open_checkpoint(output.parent / "source")).vision
    assert tower is not None
    assert torch.equal(picture(photo, tower, output, torch.float32), made["pixel_values"])
    tokens = TextCodec(output).encode_with_image("ab", boi=255_999, eoi=256_000, image=256_001, count=4)
    assert tokens == made["input_ids"][0].tolist()


def test_a_picture_and_a_text_become_a_text(output: Path, photo: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(output)
    with Image.open(photo) as image:
        inputs = processor(images=[image], text=[PROMPT], return_tensors="pt")
    with_image = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    black = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], -1.0)}
    memories = [
        model.get_encoder()(**{key: fields[key] for key in ("input_ids", "attention_mask", "pixel_values")})[0]
        for fields in (inputs, black)
    ]
    assert not torch.equal(*memories)
    shown = pipeline("image-text-to-text", model=str(output))
    (answer,) = shown(images=str(photo), text=PROMPT, max_new_tokens=6, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == processor.decode(with_image[0], skip_special_tokens=True)


def test_the_reference_writes_with_the_same_files(output: Path, photo: Path) -> None:
    assert isinstance("".join(generate(output, "ab ab", image=photo, max_new_tokens=4)), str)


@pytest.mark.slow
def test_verification_passes(source: Path, output: Path, photo: Path) -> None:
    report = verify(output, source, image=photo, record=False)
    assert report.passed, report.failed
    assert "tokenizer" in [check.name for check in report.checks]


def test_a_processor_made_from_the_config_equals_gemma_3s(twin_folder: TwinFolder, photo: Path, tmp_path: Path) -> None:
    convert(twin_folder("images-with-fill"), tmp_path / "out")
    document = json.loads((tmp_path / "out/processor_config.json").read_text())["image_processor"]
    assert document["size"] == {"height": 56, "width": 56}
    loaded = AutoProcessor.from_pretrained
    write_tokenizer(tmp_path / "out")
    with Image.open(photo) as image:
        pixels = loaded(tmp_path / "out").image_processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56)
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1


@pytest.mark.slow
def test_a_grafted_model_uses_the_donors_processor_and_its_own_tokenizer(
    source: Path, photo: Path, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    text, donor = tmp_path / "text", tmp_path / "donor"
    shutil.copytree(twin_folder("text-with-fill"), text)
    write_tokenizer(text)
    shutil.copytree(source, donor)
    (donor / "tokenizer.json").unlink()
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (donor / name).exists():
            (donor / name).write_text((donor / name).read_text().replace("0.5", "0.25"))
    convert(text, tmp_path / "out", vision_from=donor)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_processor.image_mean) == [0.25] * 3
    shown = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    (answer,) = shown(images=str(photo), text=PROMPT, max_new_tokens=6, do_sample=False, return_full_text=False)
    assert answer["generated_text"] is not None
    assert verify(tmp_path / "out", text, vision_from=donor, image=photo, record=False).passed
    path = tmp_path / "out/processor_config.json"
    path.write_text(path.read_text().replace("0.25", "0.5"))
    failed = verify(tmp_path / "out", text, vision_from=donor, record=False).failed
    assert {"integrity", "tokenizer"} <= {check.name for check in failed}


OLDER = os.environ.get("T5G2_OLDER_PYTHON", "")

SCRIPT: Final = """
import json, sys
from PIL import Image
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, pipeline
output, photo, prompt = sys.argv[1:]
processor = AutoProcessor.from_pretrained(output)
made = processor(images=Image.open(photo), text=prompt, return_tensors="pt")
answer = pipeline("image-text-to-text", model=output)(images=photo, text=prompt, max_new_tokens=4, do_sample=False)
print(json.dumps([made["input_ids"][0].tolist(), made["pixel_values"].double().sum().item(), bool(answer)]))
"""


@pytest.mark.skipif(not OLDER, reason="T5G2_OLDER_PYTHON names no Python with transformers 5.0.0 (make test-oldest)")
def test_the_oldest_transformers_reads_the_same(output: Path, photo: Path) -> None:
    run = subprocess.run([OLDER, "-c", SCRIPT, output, photo, PROMPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with Image.open(photo) as image:
        made = AutoProcessor.from_pretrained(output)(images=image, text=PROMPT, return_tensors="pt")
    tokens, total, answered = json.loads(run.stdout.splitlines()[-1])
    assert tokens == made["input_ids"][0].tolist()
    assert total == made["pixel_values"].double().sum().item()
    assert answered
