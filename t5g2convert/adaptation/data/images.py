"""Images: their positions in a document, checks of their files, and their pixels for the model."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat

from t5g2convert.adaptation.data.image_columns import ImageBytes, ImageSource
from t5g2convert.checkpoint.families.config_section import ConfigSection, Size, parse_section
from t5g2convert.checkpoint.families.t5gemma2 import read_t5gemma2
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.errors import CheckpointError, DataError, T5g2Error
from t5g2convert.interrupts import raise_interruption

if TYPE_CHECKING:
    from PIL.Image import Image

PLACEHOLDER: Final = "<start_of_image>"
"""Marks the position of an image in a text."""

ENDINGS: Final = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "PPM": "ppm"}
"""Supported formats and their extensions; pillow starts other programs for some others."""


LOSING_MODES: Final = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F", "LA", "La", "PA", "RGBA", "RGBa"})
"""Modes of pillow that hold more than 8-bit RGB."""


def text_pieces(text: str, images: int, *, at_end: bool = False) -> list[str]:
    """Split a document into the texts around its images, with the blank lines that Gemma 3 puts there.

    Args:
        text: The text, with a placeholder for each image; without any, the images come first.
        images: Their number.
        at_end: Whether the text may end with an image.

    Raises:
        ValueError: The text has another number of placeholders, or nothing after the last.
    """
    places = text.count(PLACEHOLDER)
    if not places:
        text, places = PLACEHOLDER * images + text, images
    if places != images:
        raise ValueError(f"has {images} image(s), but {PLACEHOLDER} {places} time(s)")
    pieces = text.split(PLACEHOLDER)
    if not at_end and not pieces[-1].strip():
        raise ValueError("ends with an image: no text is left to learn")
    blank = "\n\n"
    return f"{blank}{PLACEHOLDER}{blank}".join(pieces).split(PLACEHOLDER)


def check_picture(source: ImageSource) -> tuple[str, bool]:
    """Decode an image.

    Returns:
        The extension for its file, and whether it has more than 8-bit RGB holds: 16 bits, floats or transparency.

    Raises:
        ValueError: It is missing, damaged, of another format, or so large that it would take gigabytes.
    """
    with _opened(source) as image:
        kind = image.format or ""
        loses = image.mode in LOSING_MODES or image.info.get("transparency") is not None
        _upright(image)
    return ENDINGS[kind], loses


def pixel_values(images: Sequence[ImageSource], model: Path) -> NDArray[np.float32]:
    """Return the pixels of images exactly as transformers' pillow-based image processor for the model's folder.

    With torchvision installed, transformers resizes with other arithmetic, which is not reproduced.

    Args:
        images: Images, as files or bytes.
        model: The folder of a converted model.

    Returns:
        [images, 3, side, side].

    Raises:
        CheckpointError: The processor's settings are missing or not supported.
        DataError: One is not an image.
    """
    settings = _processor(model)
    result = np.empty((len(images), 3, settings.height, settings.width), dtype=np.float32)
    for row, source in zip(result, images, strict=True):
        try:
            with _opened(source) as image:
                row[:] = settings.apply(_upright(image))
        except ValueError as error:
            raise DataError(str(error), where=str(source)) from None
    return result


@contextmanager
def _opened(source: ImageSource) -> Iterator["Image"]:
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Path) and not source.is_file():
        raise ValueError("is not a file" if source.exists() else "no such file")
    with warnings.catch_warnings():
        # Pillow warns about a very large image, and refuses one of twice that size.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            file = BytesIO(source.data) if isinstance(source, ImageBytes) else source
            with Image.open(file, formats=list(ENDINGS)) as image:
                yield image
        except UnidentifiedImageError:
            raise_interruption()
            raise ValueError(f"is not an image of a supported format ({', '.join(ENDINGS)})") from None
        except (ValueError, T5g2Error):
            raise
        except Exception as error:  # noqa: BLE001 - pillow's readers raise anything for a damaged file
            raise_interruption()
            raise ValueError(f"cannot be read as an image: {error}") from None


def _upright(image: "Image") -> "Image":
    """Return an image in RGB, rotated as its EXIF data says; transparency becomes white, as in transformers 5.23."""
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
    """The settings of Gemma 3's image processor, with its defaults."""

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
        """Return the pixels of an RGB image, [3, height, width]."""
        from PIL import Image

        resized = image.resize((self.width, self.height), Image.Resampling(self.resample))
        # In float64 and rounded once, as in transformers.
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
                        f"resizes to {found.width} x {found.height}, but the vision tower expects {side} x {side}",
                        where=path,
                    )
                return found
    raise CheckpointError("has no processor_config.json, which defines the pixels of images", where=model)
