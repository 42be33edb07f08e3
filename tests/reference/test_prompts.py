import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower
from tests.conftest import TwinFolder

SIDE = 56


@pytest.fixture(scope="module")
def tower(converted_twin: TwinFolder) -> VisionTower:
    found = T5Gemma2Reference(open_checkpoint(converted_twin("images-8"))).vision
    assert found is not None
    return found


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def by_hand(image: Image.Image, resample: int = 2, mean: Any = 0.5, deviation: Any = 0.5) -> torch.Tensor:
    resized = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling(resample)), dtype=np.float64)
    return torch.from_numpy(((resized / 255 - mean) / deviation).transpose(2, 0, 1)[None]).float()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# Pictures


@pytest.mark.parametrize(("width", "height"), [(56, 56), (200, 31), (7, 90), (1, 1)])
def test_a_picture_is_resized_and_centred(width: int, height: int, tower: VisionTower, tmp_path: Path) -> None:
    image = noise(width, height)
    image.save(tmp_path / "x.png")
    found = picture(tmp_path / "x.png", tower, tmp_path, torch.float32)
    assert found.shape == tower.pixel_shape(1)
    close(found, by_hand(image))


def test_channels_rows_and_columns_keep_their_order(tower: VisionTower, tmp_path: Path) -> None:
    values = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    values[:10, :, 0], values[:, :20, 1], values[..., 2] = 255, 255, 51
    Image.fromarray(values).save(tmp_path / "x.png")
    found = picture(tmp_path / "x.png", tower, tmp_path, torch.float32)[0]
    assert (found[0, :10] == 1).all()
    assert (found[0, 10:] == -1).all()
    assert (found[1, :, :20] == 1).all()
    assert (found[1, :, 20:] == -1).all()
    torch.testing.assert_close(found[2], torch.full((SIDE, SIDE), -0.6))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_kind_of_picture_becomes_three_channels(mode: str, tower: VisionTower, tmp_path: Path) -> None:
    image = noise(30, 20).convert(mode)
    name = "x.tiff" if mode == "CMYK" else "x.png"
    image.save(tmp_path / name)
    close(picture(tmp_path / name, tower, tmp_path, torch.float32), by_hand(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_are_rounded_at_the_very_end(dtype: torch.dtype, tower: VisionTower, tmp_path: Path) -> None:
    noise(90, 70).save(tmp_path / "x.png")
    wide = picture(tmp_path / "x.png", tower, tmp_path, torch.float32)
    assert torch.equal(picture(tmp_path / "x.png", tower, tmp_path, dtype), wide.to(dtype))


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("preprocessor_config.json", lambda settings: settings),
        ("processor_config.json", lambda settings: {"image_processor": settings, "processor_class": "Gemma3Processor"}),
    ],
)
def test_the_folders_processor_says_how(
    name: str, wrap: Callable[[object], object], tower: VisionTower, tmp_path: Path
) -> None:
    mean, deviation = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]
    settings = {"resample": 3, "image_mean": mean, "image_std": deviation, "size": {"height": 896, "width": 896}}
    (tmp_path / name).write_text(json.dumps(wrap(settings)))
    image = noise(80, 60)
    image.save(tmp_path / "x.png")
    found = picture(tmp_path / "x.png", tower, tmp_path, torch.float32)
    close(found, by_hand(image, 3, np.array(mean), np.array(deviation)))
    assert not torch.allclose(found, by_hand(image), atol=0.05)


def test_a_processor_without_image_settings_defers_to_the_other_file(tower: VisionTower, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"image_seq_length": 256, "processor_class": "Gemma3Processor"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    image = noise(20, 20)
    image.save(tmp_path / "x.png")
    close(picture(tmp_path / "x.png", tower, tmp_path, torch.float32), by_hand(image, 2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(56, 56), (131, 80), (20, 33)])
def test_pixels_equal_those_of_gemma_3s_image_processor(
    width: int, height: int, tower: VisionTower, tmp_path: Path
) -> None:
    module = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = module.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    image = noise(width, height)
    image.save(tmp_path / "x.png")
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    close(picture(tmp_path / "x.png", tower, tmp_path, torch.float32), expected.float())


def test_a_file_that_is_not_a_picture_is_an_error(tower: VisionTower, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no picture")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    stream = io.BytesIO()
    noise(90, 90).save(stream, "PNG")
    (tmp_path / "cut").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    for name in ("text", "empty", "folder", "cut", "missing"):
        with pytest.raises(UsageError, match=f"{name} cannot be read as an image"):
            picture(tmp_path / name, tower, tmp_path, torch.float32)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"])
def test_a_damaged_picture_is_a_picture_or_is_refused(kind: str, tower: VisionTower, tmp_path: Path) -> None:
    stream = io.BytesIO()
    noise(12, 9).save(stream, kind)
    sound = stream.getvalue()
    draw = np.random.default_rng(len(kind))
    refused = 0
    for _ in range(60):
        damaged = bytearray(sound)
        if draw.random() < 0.3:
            del damaged[draw.integers(len(damaged)) :]
        else:
            damaged[draw.integers(min(len(damaged), draw.choice([40, 10**6])))] = draw.integers(256)
        (tmp_path / "x").write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                picture(tmp_path / "x", tower, tmp_path, torch.float32)
            except UsageError:
                refused += 1
    assert refused > 5


def test_a_picture_larger_than_pillow_reads_is_refused(
    tower: VisionTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(40, 40).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UsageError, match=r"x\.png cannot be read as an image"):
        picture(tmp_path / "x.png", tower, tmp_path, torch.float32)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    "settings",
    [{"resample": 99}, {"resample": "bilinear"}, {"image_mean": "x"}, {"image_mean": [0.5, 0.5]}, {"image_std": [[]]}],
    ids=str,
)
def test_invalid_processor_settings_are_an_error_of_the_folder(
    settings: dict[str, Any], tower: VisionTower, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    noise(40, 40).save(tmp_path / "x.png")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        picture(tmp_path / "x.png", tower, tmp_path, torch.float32)


# Texts


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer built like Gemma's: words, and one token for every byte."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *map(chr, range(33, 127)), "\n", "\n\n", "<boi>"]
    tokenizer = Tokenizer(
        models.BPE(
            {word: number for number, word in enumerate(words)},
            [("\n", "\n")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<boi>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_special_tokens_are_added_only_on_request(byte_level: Path) -> None:
    codec = TextCodec(byte_level)
    assert codec.encode("ab") == [2, *codec.encode("ab", special=False)]
    assert 2 not in codec.encode("ab", special=False)
    assert codec.encode("") == [2]


@pytest.mark.parametrize("text", ["plain text", "Zürich – 東京 🎉", "\n\n a\n", "tab\tand\rmore"])
def test_decoding_restores_the_encoded_text(byte_level: Path, text: str) -> None:
    codec = TextCodec(byte_level)
    assert codec.decode(codec.encode(text)) == text


def test_a_character_of_several_tokens_is_whole_with_its_last_one(byte_level: Path) -> None:
    codec = TextCodec(byte_level)
    tokens = codec.encode("東", special=False)
    assert len(tokens) == 3
    assert all(codec.decode(tokens[:count]).endswith("\N{REPLACEMENT CHARACTER}") for count in (1, 2))
    assert codec.decode(tokens) == "東"


def test_an_image_is_before_the_text_between_blank_lines(byte_level: Path) -> None:
    codec = TextCodec(byte_level)
    tokens = codec.encode_with_image("see", boi=500, eoi=501, image=502, count=4)
    blank = codec.encode("\n\n", special=False)
    assert len(blank) == 1
    rest = codec.encode("see", special=False)
    assert tokens == [2, *blank, 500, 502, 502, 502, 502, 501, *blank, *rest]
    # Blank lines and the text after them are encoded together.
    lines = codec.encode_with_image("\n\nsee", boi=500, eoi=501, image=502, count=1)
    assert lines == [2, *blank, 500, 502, 501, *codec.encode("\n\n\n\nsee", special=False)]


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        TextCodec(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"type": "BPE"}}', "\0"])
def test_an_invalid_tokenizer_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read by the tokenizers library"):
        TextCodec(tmp_path)
