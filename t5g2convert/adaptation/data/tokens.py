"""The token ids of a model, and a tokenizer that never turns text into special tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.checkpoint.families.registry import read_trainable
from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.checkpoint.folder import check_folder, read_json_object
from t5g2convert.errors import CheckpointError
from t5g2convert.interrupts import raise_interruption

UNUSED: Final = re.compile(r"<unused\d+>")
"""Names of Gemma's unused tokens, which serve as sentinels."""


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """The token ids in a model's config.

    Attributes:
        vocabulary: Rows of the embedding table.
        bos: Begin of text, if the model has it.
        eos: End of text; the first, if there are several.
        pad: Padding, if the model has it.
        boi: Begin of image.
        eoi: End of image.
        image: Placeholder for a part of an image.
        per_image: Number of placeholders per image.
        pictures: Whether the model has a vision tower.
    """

    vocabulary: int
    bos: int | None
    eos: int
    pad: int | None
    boi: int
    eoi: int
    image: int
    per_image: int
    pictures: bool

    @property
    def reserved(self) -> frozenset[int]:
        """All of these ids that have a row in the table."""
        named = (self.bos, self.eos, self.pad, self.boi, self.eoi, self.image)
        return frozenset(token for token in named if token is not None and 0 <= token < self.vocabulary)


def read_tokens(model: Path) -> ModelTokens:
    """Read the token ids of a converted model.

    Raises:
        CheckpointError: config.json is missing, describes another kind of model, or names no end of text.
    """
    check_folder(model)
    where = model / "config.json"
    settings = read_trainable(read_json_object(where), where)
    text, tokens = settings.decoder, settings.tokens
    eos = text.eos_token_id[:1] if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if not eos or eos[0] is None:
        raise CheckpointError("decoder.eos_token_id is missing, but every document ends with it", where=where)
    found = ModelTokens(
        settings.encoder.vocab_size, text.bos_token_id, eos[0], text.pad_token_id,
        boi=tokens.boi_token_index, eoi=tokens.eoi_token_index, image=tokens.image_token_index,
        per_image=tokens.mm_tokens_per_image, pictures=settings.vision.num_hidden_layers > 0,
    )  # fmt: skip
    _check_rows(found, where)
    return found


def read_positions(model: Path) -> tuple[int, int]:
    """Return the most tokens that the encoder and the decoder of a converted model read.

    Raises:
        CheckpointError: config.json is missing or describes another kind of model.
    """
    where = model / "config.json"
    settings = read_trainable(read_json_object(where), where)
    return settings.encoder.max_position_embeddings, settings.decoder.max_position_embeddings


def _check_rows(tokens: ModelTokens, where: Path) -> None:
    needed = {"eos_token_id": tokens.eos}
    if tokens.bos is not None:
        needed["bos_token_id"] = tokens.bos
    if tokens.pictures:
        needed |= {"boi_token_index": tokens.boi, "eoi_token_index": tokens.eoi, "image_token_index": tokens.image}
    if outside := [f"{name} {token}" for name, token in needed.items() if not 0 <= token < tokens.vocabulary]:
        raise CheckpointError(
            f"the embedding table has {tokens.vocabulary} rows, but no row for {', '.join(outside)}", where=where
        )


def tokenizer_sha256(model: Path) -> str:
    """Return the sha256 of a folder's tokenizer.json, hexadecimal.

    Raises:
        CheckpointError: It is missing or cannot be read.
    """
    path = model / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError("is missing, but text needs it", where=path)
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None


class TextEncoder:
    """The tokenizer of a folder, for untrusted text.

    The tokenizers library turns the name of any added token in a text into that token. Tokens with a meaning for the
    model or the objective are removed from its list, so `<eos>` in a text is read as five characters; plain words, like
    Gemma's runs of line breaks, stay. (`encode_special_tokens` of the library does this only for tokens marked special,
    and `<unused99>` is not.)

    Args:
        model: The folder.
        tokens: Its token ids, from `read_tokens`.

    Raises:
        CheckpointError: tokenizer.json is missing, or the tokenizers library cannot read it.
    """

    def __init__(self, model: Path, tokens: ModelTokens) -> None:
        self.path = model / TOKENIZER_FILE
        self.sha256 = tokenizer_sha256(model)
        document = read_json_object(self.path)
        hidden = _take_out(document, tokens.reserved)
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise_interruption()
            raise CheckpointError(f"cannot be read by the tokenizers library: {error}", where=self.path) from None
        # A file may enable both, and texts would be cut silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary = tokens.vocabulary
        self.special: Mapping[int, str] = {
            **{token: self._tokenizer.id_to_token(token) or "" for token in tokens.reserved}, **hidden
        }  # fmt: skip
        """Ids and names of tokens that text never becomes, except the unknown token."""
        unknown = document.get("model", {}).get("unk_token")
        allowed = {self._tokenizer.token_to_id(unknown)} if isinstance(unknown, str) else set()
        self._refused = np.zeros(tokens.vocabulary, dtype=bool)
        self._refused[[token for token in self.special if token < tokens.vocabulary and token not in allowed]] = True

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the token ids of each text, without bos and eos; the library works in parallel."""
        return [
            np.array(encoding.ids, dtype=np.uint32)
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def fault(self, tokens: NDArray[np.uint32]) -> str | None:
        """Return what is wrong with the ids of a text: a special token, or an id without a row; None if nothing."""
        if not len(tokens):
            return None
        if (highest := int(tokens.max())) >= self._vocabulary:
            return f"contains token {highest}, but the embedding table has {self._vocabulary} rows"
        refused = tokens[self._refused[tokens]]
        if len(refused):
            token = int(refused[0])
            return f"contains the special token {token} ({self.special[token]}), although its name was read as text"
        return None


def _take_out(document: dict[str, Any], reserved: frozenset[int]) -> dict[int, str]:
    """Remove the tokens that text must not become from a tokenizer's added tokens; return their ids and names."""
    entries = document.get("added_tokens")
    hidden: dict[int, str] = {}
    kept = []
    for entry in entries if isinstance(entries, list) else []:
        token, name = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if (
            isinstance(token, int)
            and isinstance(name, str)
            and (entry.get("special") is True or token in reserved or UNUSED.fullmatch(name))
        ):
            hidden[token] = name
        else:
            kept.append(entry)
    document["added_tokens"] = kept
    return hidden
