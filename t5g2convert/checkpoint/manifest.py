"""The manifest `t5g2.json`: how a folder was made, from which files, and the sha256 of every file in it.

`Manifest` is the schema; the file is written and read through this class. The file has exactly one form, byte for byte,
and ends with the sha256 of everything before it, so any changed byte is detected.
"""

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PrivateAttr,
    model_validator,
)

from t5g2convert.checkpoint.families.config_section import Depth, Number, parse_section
from t5g2convert.checkpoint.folder import read_json_file
from t5g2convert.checkpoint.header import BY_CONFIG_NAME
from t5g2convert.checkpoint.manifest_section import Digest, Section
from t5g2convert.checkpoint.merge_record import MergeRecord
from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.checkpoint.training_record import AdaptationRecord
from t5g2convert.errors import CheckpointError

MANIFEST_FILE: Final = "t5g2.json"
FORMAT: Final = 1
SEAL: Final = "sha256"
"""The last key of the manifest: the sha256 of everything before it."""


_RELEASE: Final = r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?(\+[a-z0-9.]+)?"
Version = Annotated[str, Field(max_length=60, pattern=f"^{_RELEASE}$")]
"""The version of a Python package."""


def encode_json(document: Mapping[str, Any]) -> bytes:
    """Return a JSON document in the form in which this tool writes all JSON files."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def seal(document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest with its own sha256 as the last key; replace an earlier sha256."""
    unsealed = {key: value for key, value in document.items() if key != SEAL}
    return encode_json({**unsealed, SEAL: hashlib.sha256(encode_json(unsealed)).hexdigest()})


def unverified(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without the record of a verification and its own sha256.

    It is equal for two copies of a conversion, whether or not they were verified.
    """
    return {key: value for key, value in document.items() if key not in (SEAL, "verification")}


class FileRecord(Section):
    """A file: its size, and its sha256 if it was hashed."""

    bytes: NonNegativeInt
    sha256: Digest | None


class ToolRecord(Section):
    """The program that wrote the folder."""

    name: Literal["t5g2convert"]
    version: Version


class MappingRecord(Section):
    """The weight map of the conversion."""

    name: str
    sha256: Digest


class HubRecord(Section):
    """A commit of a model on the Hub."""

    repo: str
    revision: str


class SourceRecord(Section):
    """A checkpoint that the conversion read."""

    family: str
    layout: dict[str, str]
    files: dict[str, FileRecord]
    hub: HubRecord | None = None


OptionValue = str | bool | int | Number | Annotated[list[Depth], Field(min_length=1)]
"""The value of an option: text, a switch, a number, or the numbers of layers."""


class DroppedRecord(Section):
    """A source tensor that was left out."""

    name: str
    because: str


class ChangeRecord(Section):
    """A setting that differs from the source's."""

    field: str
    source: Any
    target: Any

    @model_validator(mode="after")
    def _casts_to_a_dtype(self) -> Self:
        if self.field == "dtype" and self.target not in list(BY_CONFIG_NAME):
            raise ValueError(f"{self.target!r} is not a dtype that a model can be cast to")
        return self


class TokenRecord(Section):
    """A token with another id than in the source."""

    token: str
    source: NonNegativeInt | None
    target: NonNegativeInt
    replaces: str | None


class Manifest(Section):
    """The contents of a manifest.

    `mapping` is present for a conversion, `adaptation` for a training, `merged` for a merge with an adapter; a merge
    also has the `adaptation` of its source, if that was trained. `options` holds the options that differ from their
    defaults: `PlanOptions.record` in `conversion/options.py` writes it, `PlanOptions.of_record` reads it.
    """

    format: Literal[1]
    tool: ToolRecord
    mapping: MappingRecord | None = None
    adaptation: AdaptationRecord | None = None
    merged: MergeRecord | None = None
    options: dict[str, OptionValue]
    source: SourceRecord
    decoder_from: SourceRecord | None = None
    vision_from: SourceRecord | None = None
    dtype: str
    parameters: dict[str, NonNegativeInt]
    dropped: list[DroppedRecord]
    changes: list[ChangeRecord]
    tokens: list[TokenRecord]
    notes: list[str]
    files: dict[str, FileRecord]
    verification: dict[str, Any] | None = None
    sha256: Digest | None = None
    _read: dict[str, Any] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _converted_trained_or_merged(self) -> Self:
        given = [key for key in ("mapping", "adaptation", "merged") if key in self.model_fields_set]
        known = ["mapping"], ["adaptation"], ["merged"], ["adaptation", "merged"]
        if given not in known or any(getattr(self, key) is None for key in given):
            raise ValueError("expected a mapping (of a conversion), an adaptation (of a training) or a merged adapter")
        return self

    @property
    def sources(self) -> dict[str, SourceRecord]:
        """The checkpoints that the conversion read, by input: `source`, `decoder_from`, `vision_from`."""
        found = {"source": self.source, "decoder_from": self.decoder_from, "vision_from": self.vision_from}
        return {name: record for name, record in found.items() if record is not None}

    @property
    def hashed(self) -> bool:
        """Whether every file has a sha256 (false after `t5g2 convert --no-hash`)."""
        return all(file.sha256 is not None for file in self.files.values())

    @classmethod
    def parse(cls, document: Mapping[str, Any], where: Path) -> Self:
        """Validate a manifest that was read as JSON; its contents and the order of its keys are kept.

        Raises:
            CheckpointError: A section is missing, unknown, or has an impossible value.
        """
        manifest = parse_section(cls, document, where)
        manifest._read = dict(document)
        return manifest

    def document(self) -> dict[str, Any]:
        """Return the manifest as JSON; a manifest that was read is returned unchanged."""
        return super().document() if self._read is None else deepcopy(self._read)

    def encode(self) -> bytes:
        """Return the bytes of the file `t5g2.json`."""
        return seal(self.document())

    def unverified(self) -> dict[str, Any]:
        """Return the manifest as JSON without the record of a verification and its own sha256."""
        return unverified(self.document())

    def with_verification(self, record: Mapping[str, Any]) -> Self:
        """Return the manifest with the record of a verification; it replaces an earlier record."""
        return self.parse({**self.document(), "verification": record}, Path(MANIFEST_FILE))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    ```python
    manifest = read_manifest(Path("converted"))
    manifest.source.files["config.json"].sha256
    ```

    Raises:
        CheckpointError: The manifest is missing, has another format, was changed after it was written, or lacks a
            section.
    """
    path = folder / MANIFEST_FILE
    text = read_json_file(path)
    document = parse_object(text, path)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"has format {document.get('format')!r}, expected {FORMAT}", where=path)
    try:
        sealed = seal(document)
    except UnicodeEncodeError:
        raise CheckpointError("contains text that cannot be encoded", where=path) from None
    if sealed != text:
        raise CheckpointError("was changed after it was written: its sha256 does not match its contents", where=path)
    return Manifest.parse(document, path)
