"""The images of a row: the keys under which data sets keep them, and the forms of their values.

=================  =============================================================
`image`, `images`  also `image_path`, `img_path`, `img`, `picture`, `pictures`
`file_name`        in a file called `metadata.jsonl`, as in an image folder
a value            a file name, `{"bytes": ..., "path": ...}`, or a list of them
=================  =============================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.strictjson import is_text

IMAGE_KEYS: Final = ("image", "images", "image_path", "img_path", "img", "picture", "pictures")

IMAGE_ENDINGS: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic"}
)

METADATA_FILE: Final = "metadata.jsonl"
"""The file of an image folder; its rows name their images under `file_name`."""


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image inside a row: the bytes of its file, and a name for errors."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


ImageSource = Path | ImageBytes
"""A file, or the bytes of one."""


def image_keys(name: str) -> tuple[str, ...]:
    """Return the keys of images in the rows of a file."""
    return (*IMAGE_KEYS, "file_name") if name == METADATA_FILE else IMAGE_KEYS


def images_of(row: Mapping[str, Any], keys: Sequence[str], folder: Path | None) -> tuple[ImageSource, ...]:
    """Return the images of a row, in order.

    Args:
        row: Values by key.
        keys: The keys of images.
        folder: The folder that file names are relative to; None if rows cannot name files.

    Raises:
        ValueError: A value is not an image, or several keys have images.
    """
    found = [key for key in keys if row.get(key) is not None and row[key] != []]
    if len(found) > 1:
        raise ValueError(f"has images under several keys: {', '.join(map(repr, found))}")
    if not found:
        return ()
    (key,) = found
    values = row[key] if isinstance(row[key], list) else [row[key]]
    return tuple(image_source(value, repr(key), folder) for value in values)


def image_source(value: object, name: str, folder: Path | None) -> ImageSource:
    """Return the image that a value of a row is: the name of a file, or `{"bytes": ..., "path": ...}`.

    Args:
        value: The value.
        name: Its name, for errors.
        folder: The folder that file names are relative to; None if rows cannot name files.

    Raises:
        ValueError: It is not an image, or not below the folder.
    """
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return ImageBytes(path if isinstance(path, str) else name.strip("'"), data)
        value = path
    if not isinstance(value, str) or not is_text(value):
        raise ValueError(f"{name} is not a file name, or a list of them")
    path = Path(value)
    if folder is not None and path.is_relative_to(folder.absolute()):
        # The datasets library makes the names of an image folder absolute.
        path = path.relative_to(folder.absolute())
    if folder is None or path.is_absolute() or ".." in path.parts or "\0" in value or not path.parts:
        below = "a row that has no files" if folder is None else "the folder of its file"
        raise ValueError(f"the image {value!r} is not a file below {below}")
    return folder / path
