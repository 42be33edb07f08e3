"""Pictures: their places in a document, whether they can be read, and the pixels that the model looks at."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat

from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.checkpoint.families.config_section import ConfigSection, Size, parse_section
from t5g2convert.checkpoint.families.t5gemma2 import read_t5gemma2
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.errors import CheckpointError, DataError, T5g2Error
from t5g2convert.interrupts import raise_interruption

if TYPE_CHECKING:
    from PIL.Image import Image

PLACEHOLDER: Final = "<start_of_image>"
"""Stands in a text where a picture does."""

ENDINGS: Final = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "PPM": "ppm"}
"""Kinds of pictures that are read; no others, since pillow starts other programs for some."""


def text_pieces(text: str, images: int) -> list[str]:
    """The texts before, between and behind the pictures of a document, with the blank lines that Gemma 3 has there.

    Raises:
        ValueError: The text has places for another number of pictures, or nothing behind the last.
    """
    places = text.count(PLACEHOLDER)
    if not places:
        text, places = PLACEHOLDER * images + text, images
    if places != images:
        raise ValueError(f"has {images} picture(s), and {PLACEHOLDER} {places} time(s)")
    pieces = text.split(PLACEHOLDER)
    if not pieces[-1].strip():
        raise ValueError("ends with a picture: nothing is left to be learnt")
    blank = "\n\n"
    return f"{blank}{PLACEHOLDER}{blank}".join(pieces).split(PLACEHOLDER)


def with_images(pieces: Sequence[NDArray[np.uint32]], tokens: ModelTokens) -> NDArray[np.uint32]:
    """The pieces of a document with the tokens of a picture between each two, [tokens]."""
    picture = np.array([tokens.boi, *[tokens.image] * tokens.per_image, tokens.eoi], dtype=np.uint32)
    joined = [pieces[0]]
    for piece in pieces[1:]:
        joined += [picture, piece]
    return np.concatenate(joined)


def check_picture(path: Path) -> str:
    """Decode a picture to see whether it can be; the ending that its file should have.

    Raises:
        ValueError: It is missing, damaged, of another kind, or so large that it would take gigabytes.
    """
    with _opened(path) as image:
        kind = image.format or ""
        _upright(image)
    return ENDINGS[kind]


def pixel_values(paths: Sequence[Path], model: Path) -> NDArray[np.float32]:
    """The pixels of pictures as transformers' image processor of the model's folder gives them, bit for bit.

    This is its processor for pillow, given the paths. With torchvision installed, transformers resizes by other
    arithmetic, and is not followed.

    Args:
        paths: Picture files.
        model: The folder of a converted model.

    Returns:
        [pictures, 3, side, side].

    Raises:
        CheckpointError: The processor's settings are none, or ask for what is not done here.
        DataError: A file is no picture.
    """
    settings = _processor(model)
    result = np.empty((len(paths), 3, settings.height, settings.width), dtype=np.float32)
    for row, path in zip(result, paths, strict=True):
        try:
            with _opened(path) as image:
                row[:] = settings.apply(_upright(image))
        except ValueError as error:
            raise DataError(str(error), where=path) from None
    return result


@contextmanager
def _opened(path: Path) -> Iterator["Image"]:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise ValueError("is not a file" if path.exists() else "no such file")
    with warnings.catch_warnings():
        # Pillow warns of a picture that is suspiciously large, and refuses one that is twice so.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=list(ENDINGS)) as image:
                yield image
        except UnidentifiedImageError:
            raise_interruption()
            raise ValueError(f"is no picture that is read here: {', '.join(ENDINGS)}") from None
        except (ValueError, T5g2Error):
            raise
        except Exception as error:  # noqa: BLE001 - pillow's readers raise whatever a damaged file makes them raise
            raise_interruption()
            raise ValueError(f"cannot be read as a picture: {error}") from None


def _upright(image: "Image") -> "Image":
    """Turned as its EXIF says, in RGB; a colour that is declared transparent becomes white, as in transformers 5.23."""
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(image).convert("RGB")
    if turned.info.get("transparency") is None:
        return turned
    white = Image.new("RGBA", turned.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, turned.convert("RGBA")).convert("RGB")


class _Size(ConfigSection):
    height: Size
    width: Size


class _Processor(ConfigSection):
    """The settings of Gemma 3's image processor; a default is what it has where a file says nothing."""

    do_resize: Literal[True, None] = True
    do_rescale: Literal[True, None] = True
    do_normalize: Literal[True, None] = True
    do_pan_and_scan: Literal[False, None] = None
    size: _Size
    resample: Literal[0, 1, 2, 3, 4, 5] = 2
    rescale_factor: PositiveFloat = 1 / 255
    image_mean: list[float] = Field(default=[0.5, 0.5, 0.5], min_length=3, max_length=3)
    image_std: list[PositiveFloat] = Field(default=[0.5, 0.5, 0.5], min_length=3, max_length=3)

    @property
    def height(self) -> int:
        return self.size.height

    @property
    def width(self) -> int:
        return self.size.width

    def apply(self, image: "Image") -> NDArray[np.float32]:
        """Pixels of a picture in RGB, [3, height, width]."""
        from PIL import Image

        resized = image.resize((self.width, self.height), Image.Resampling(self.resample))
        # In float64 first, and rounded once: so transformers does it.
        scaled = (np.asarray(resized).astype(np.float64) * float(self.rescale_factor)).astype(np.float32)
        mean, deviation = (np.array(each, dtype=np.float32) for each in (self.image_mean, self.image_std))
        pixels: NDArray[np.float32] = (scaled - mean) / deviation
        return pixels.transpose(2, 0, 1)


def _processor(model: Path) -> _Processor:
    side = read_t5gemma2(read_json_object(model / "config.json"), model / "config.json").vision.image_size
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = model / name
        if path.is_file():
            document = read_json_object(path)
            section = document if key is None else document.get(key)
            if isinstance(section, dict):
                found = parse_section(_Processor, section, path, key or "")
                if (found.height, found.width) != (side, side):
                    raise CheckpointError(
                        f"resizes to {found.width} x {found.height}, the vision tower looks at {side} x {side}",
                        where=path,
                    )
                return found
    raise CheckpointError("has no processor_config.json: nothing tells how pictures become pixels", where=model)
