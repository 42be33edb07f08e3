import gc
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from t5g2convert import convert
from t5g2convert.adaptation.data.images import check_picture, pixel_values, text_pieces
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.rows import Document
from t5g2convert.errors import CheckpointError, DataError
from tests.conftest import TwinFolder
from tests.models.gemma_tokenizer import write_processor, write_tokenizer


def colours(width: int, height: int) -> Image.Image:
    gradient = Image.linear_gradient("L").resize((width, height))
    turned = gradient.transpose(Image.Transpose.ROTATE_180)
    return Image.merge("RGB", (gradient, turned, gradient.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


def _rotated_by_exif(path: Path) -> None:
    picture = colours(60, 90)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)


def _animated(path: Path) -> None:
    colours(40, 30).save(path, save_all=True, append_images=[colours(40, 30).rotate(90)])


PICTURES: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: colours(131, 90).save(path),
    "small.png": lambda path: colours(1, 2).save(path),
    "exact.png": lambda path: colours(56, 56).save(path),
    "lying.jpg": _rotated_by_exif,
    "cmyk.jpg": lambda path: colours(70, 70).convert("CMYK").save(path),
    "grey.png": lambda path: colours(90, 30).convert("L").save(path),
    "bit.png": lambda path: colours(90, 30).convert("1").save(path),
    "clear.png": lambda path: colours(30, 90).convert("RGBA").rotate(30).save(path),
    "palette.png": lambda path: colours(77, 78).quantize(16).save(path, transparency=3),
    "deep.png": lambda path: Image.fromarray(np.arange(3600, dtype=np.uint16).reshape(60, 60) * 18).save(path),
    "moving.gif": _animated,
    "a.webp": lambda path: colours(70, 20).save(path),
    "a.bmp": lambda path: colours(70, 20).save(path),
    "a.tiff": lambda path: colours(70, 20).save(path),
    "a.ppm": lambda path: colours(70, 20).save(path),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, make in PICTURES.items():
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def model(twin_folder: TwinFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with images of 56 x 56, 4 tokens each, and Gemma 3's vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(twin_folder("images-with-fill"), folder / "source")
    write_tokenizer(folder / "source")
    write_processor(folder / "source", side=56, tokens=4)
    convert(folder / "source", folder / "model", flush=False)
    return folder / "model"


# transformers does not close the file of an animated image.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_pixels_equal_those_of_transformers_bit_for_bit(model: Path, pictures: Path) -> None:
    paths = [pictures / name for name in PICTURES]
    processor = AutoProcessor.from_pretrained(model)
    expected = processor(images=[[str(path)] for path in paths], return_tensors="np")["pixel_values"]
    gc.collect()
    found = pixel_values(paths, model)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (len(paths), 3, 56, 56)
    for name, ours, theirs in zip(PICTURES, found, expected, strict=True):
        assert np.array_equal(ours, theirs), name
    assert len({row.tobytes() for row in found}) > 10, "and the pictures differ"


def test_other_means_and_sizes_are_applied_or_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(model, other)
    path = other / "processor_config.json"
    document = json.loads(path.read_text())

    def say(**fields: object) -> None:
        path.write_text(json.dumps({**document, "image_processor": {**document["image_processor"], **fields}}))

    say(image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.5, 0.7], rescale_factor=0.01, resample=3)
    photo = pictures / "rgb.png"
    theirs = AutoProcessor.from_pretrained(other)(images=[str(photo)], return_tensors="np")["pixel_values"]
    assert np.array_equal(pixel_values([photo], other), theirs)
    assert not np.array_equal(pixel_values([photo], model), theirs)
    say(size={"height": 56, "width": 55})
    with pytest.raises(CheckpointError, match="resizes to 55 x 56, but the vision tower expects 56 x 56"):
        pixel_values([photo], other)
    for field in ({"do_pan_and_scan": True}, {"do_normalize": False}, {"do_resize": False}, {"do_rescale": False}):
        say(**field)
        with pytest.raises(CheckpointError, match=rf"image_processor\.{next(iter(field))}"):
            pixel_values([photo], other)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no processor_config\.json"):
        pixel_values([photo], other)


TEXTS: dict[str, list[str]] = {
    "<start_of_image> ab ab": ["rgb.png"],
    "ab<start_of_image>\nab": ["a.webp"],
    "ab <start_of_image><start_of_image> ab\n\n<start_of_image>\n\nab ": ["rgb.png", "lying.jpg", "rgb.png"],
}


def test_tokens_equal_those_of_transformers(model: Path, pictures: Path, tmp_path: Path) -> None:
    given = [Document("a:1", text, tuple(pictures / name for name in names)) for text, names in TEXTS.items()]
    pack(model, tmp_path / "out", given, bos=True, shard_tokens=10, flush=False)
    packed = Packed.open(tmp_path / "out", verify=True)
    processor = AutoProcessor.from_pretrained(model)
    for document, source in zip(packed.images, given, strict=True):
        paths = [[str(path) for path in source.images]]
        made = processor(images=paths, text=[source.text], return_tensors="np")
        assert document.tokens.tolist() == [*made["input_ids"][0].tolist(), 1]
        assert np.array_equal(pixel_values([image.read() for image in document.images], model), made["pixel_values"])
        assert document.tokens[document.split - 1] == 256_000
        assert 256_000 not in document.tokens[document.split :]
    assert (packed.tokens, packed.index.text.documents, len(packed.images)) == (0, 0, 3)
    assert (packed.index.pictures.images, packed.index.pictures.places) == (3, 5)
    assert packed.index.special == {"1": 3, "2": 3, "255999": 5, "256000": 5, "256001": 20}
    assert packed.counts[256_001:].sum() == 20


def test_a_text_without_placeholders_has_its_images_first() -> None:
    blank = "\n\n"
    assert text_pieces("ab", 2) == [blank, blank * 2, f"{blank}ab"]
    assert text_pieces("a<start_of_image>b", 1) == [f"a{blank}", f"{blank}b"]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("a<start_of_image>b", 2, "has 2 image(s), but <start_of_image> 1 time(s)"),
        ("<start_of_image><start_of_image>b", 1, "has 1 image(s), but <start_of_image> 2 time(s)"),
        ("a<start_of_image>", 1, "ends with an image: no text is left to learn"),
        ("a<start_of_image> \n", 1, "ends with an image"),
        ("", 1, "ends with an image"),
    ],
)
def test_a_document_with_a_wrong_number_of_placeholders_is_refused(text: str, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        text_pieces(text, images)


def test_images_that_cannot_be_read_are_refused(pictures: Path, tmp_path: Path) -> None:
    whole = (pictures / "rgb.png").read_bytes()
    made = {
        "cut.png": (whole[: len(whole) // 2], "cannot be read as an image: "),
        "text.png": (b"a picture", "is not an image of a supported format \\(PNG, JPEG"),
        "empty.png": (b"", "is not an image of a supported format"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "is not an image of a supported format"),
    }
    for name, (data, message) in made.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            check_picture(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        check_picture(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is not a file"):
        check_picture(tmp_path)
    endings = {check_picture(pictures / name)[0] for name in PICTURES}
    assert endings == {
        "png",
        "jpg",
        "gif",
        "webp",
        "bmp",
        "tiff",
        "ppm",
    }


def test_an_image_that_would_take_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="cannot be read as an image: Image size"):
        check_picture(tmp_path / "a.png")


def test_an_image_that_is_lost_later_is_a_data_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: no such file"):
        pixel_values([tmp_path / "a.png"], model)
