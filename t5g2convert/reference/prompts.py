"""Encode texts and pictures for a model, with the tokenizer and the image processor of its folder."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from t5g2convert.checkpoint.families.config_section import ConfigSection, parse_section
from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.interrupts import raise_interruption
from t5g2convert.reference.vision import VisionTower


class TextCodec:
    """The tokenizer of a folder.

    Args:
        folder: The folder of tokenizer.json.
        vocab: The number of rows of the embedding table; tokens beyond it are refused.

    Raises:
        CheckpointError: The folder has no tokenizer.json, or the tokenizers library cannot read it.
    """

    def __init__(self, folder: Path, vocab: int | None = None) -> None:
        self._vocab = vocab
        self._path = path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError("is missing, but needed to encode text", where=path)
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise_interruption()
            raise CheckpointError(f"cannot be read by the tokenizers library: {error}", where=path) from None

    @property
    def rows(self) -> int:
        """The number of ids: rows of the embedding table, or tokens of the tokenizer."""
        return int(self._tokenizer.get_vocab_size()) if self._vocab is None else self._vocab

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text, with the special tokens around it if `special`.

        Raises:
            CheckpointError: The embedding table has no row for a token.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("the text contains half of a surrogate pair, or bytes that are not UTF-8") from None
        tokens = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if self._vocab is not None and max(tokens, default=0) >= self._vocab:
            raise CheckpointError(
                f"gives token {max(tokens)}, but the embedding table has {self._vocab} rows", where=self._path
            )
        return tokens

    def decode(self, tokens: list[int], *, special: bool = False) -> str:
        """Return the text of token ids, with special tokens if `special`."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not special))

    def token_id(self, name: str) -> int | None:
        """Return the id of a token by its name; None if the vocabulary has no such token."""
        found = self._tokenizer.token_to_id(name)
        return None if found is None else int(found)

    def token_name(self, token: int) -> str | None:
        """Return the name of a token by its id; None if the vocabulary has no such token."""
        found = self._tokenizer.id_to_token(token)
        return None if found is None else str(found)

    def encode_with_image(
        self, text: str, *, boi: int, eoi: int, image: int, count: int, before: str = "", special: bool = True
    ) -> list[int]:
        """Return the ids of an image and a text as Gemma 3's processor encodes them, with blank lines around the image.

        Args:
            text: The text after the image.
            boi: The begin-of-image token.
            eoi: The end-of-image token.
            image: The image token.
            count: The number of image tokens.
            before: The text before the image.
            special: Put the special tokens around it.
        """
        return [
            *self.encode(f"{before}\n\n", special=special),
            boi,
            *[image] * count,
            eoi,
            *self.encode(f"\n\n{text}", special=False),
        ]


def picture(path: Path, tower: VisionTower, folder: Path, dtype: torch.dtype) -> Tensor:
    """Return the pixels of a picture, [1, channels, side, side], normalised as the folder's processor specifies.

    If the folder has no processor, use Gemma 3's settings: bilinear, mean and standard deviation 0.5.

    Raises:
        CheckpointError: The processor's settings are not valid.
        UsageError: The file is not a picture.
    """
    from PIL import Image

    settings, side = _processor(folder), tower.settings.image_size
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} cannot be read as an image: not a file")
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((side, side), Image.Resampling(settings.resample))
    except Exception as error:  # noqa: BLE001 - pillow's readers raise whatever a damaged file makes them raise
        raise_interruption()
        raise UsageError(f"{path} cannot be read as an image: {error}") from None
    values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(side, side, 3).float() / 255.0
    normalised = (values - torch.tensor(settings.image_mean)) / torch.tensor(settings.image_std)
    return normalised.permute(2, 0, 1)[None].to(dtype)


class _Processor(ConfigSection):
    """Settings of an image processor, with the defaults of Gemma 3's."""

    resample: Literal[0, 1, 2, 3, 4, 5] = 2
    image_mean: list[float] = Field(default=[0.5, 0.5, 0.5], min_length=3, max_length=3)
    image_std: list[PositiveFloat] = Field(default=[0.5, 0.5, 0.5], min_length=3, max_length=3)


def _processor(folder: Path) -> _Processor:
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (folder / name).is_file():
            document = read_json_object(folder / name)
            section = document if key is None else document.get(key)
            if isinstance(section, dict):
                return parse_section(_Processor, section, folder / name)
    return _Processor()
