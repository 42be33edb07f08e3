"""The manifest `t5g2.json`: what made a folder, from what, and the sha256 of all its files.

It has one form, byte for byte, and ends with the sha256 of everything before, so that a change of any one byte shows.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from t5g2convert.checkpoint.dtypes import BY_CONFIG_NAME
from t5g2convert.checkpoint.families.config_section import ConfigSection, Depth, Number, Positive, Size, parse_section
from t5g2convert.checkpoint.folder import read_json_file
from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.errors import CheckpointError

MANIFEST_FILE: Final = "t5g2.json"
FORMAT: Final = 1
SEAL: Final = "sha256"
"""The manifest's last key."""


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A sha256, hexadecimal."""


def encode_json(document: Mapping[str, Any]) -> bytes:
    """The one form in which this tool writes JSON files."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def seal(document: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, its own sha256 added at the end (an older one is replaced)."""
    unsealed = {key: value for key, value in document.items() if key != SEAL}
    return encode_json({**unsealed, SEAL: hashlib.sha256(encode_json(unsealed)).hexdigest()})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        CheckpointError: There is none, it is of another format, not byte for byte as it was written, or lacks a part.
    """
    path = folder / MANIFEST_FILE
    text = read_json_file(path)
    document = parse_object(text, path)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"has format {document.get('format')!r}, expected {FORMAT}", where=path)
    try:
        sealed = seal(document)
    except UnicodeEncodeError:
        raise CheckpointError("holds text that cannot be written again", where=path) from None
    if sealed != text:
        raise CheckpointError("was changed after it was written: its sha256 does not fit its contents", where=path)
    parse_section(_Manifest, document, path)
    ways = [document[key] for key in ("mapping", "adaptation") if key in document]
    if len(ways) != 1 or ways[0] is None:
        raise CheckpointError("expected a mapping, of a conversion, or an adaptation, of a training", where=path)
    return document


def unverified(document: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without what a verification writes into it: two copies of one are the same."""
    return {key: value for key, value in document.items() if key not in (SEAL, "verification")}


def digest_of(document: Any) -> str:
    """sha256 of a JSON document, hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_adaptation(document: Mapping[str, Any]) -> None:
    """Refuse what a manifest cannot tell of a training.

    Raises:
        CheckpointError: A part is missing, of another kind, or one too many; all of them are named.
    """
    parse_section(_Adaptation, document, Path(MANIFEST_FILE), "adaptation")


_RELEASE: Final = r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?(\+[a-z0-9.]+)?"
Version = Annotated[str, Field(max_length=60, pattern=f"^{_RELEASE}$")]
"""The version of a Python package."""


class _File(ConfigSection, extra="forbid"):
    bytes: NonNegativeInt
    sha256: Digest | None


class _Tool(ConfigSection, extra="forbid"):
    name: Literal["t5g2convert"]
    version: Version


class _Mapping(ConfigSection, extra="forbid"):
    name: str
    sha256: Digest


class _Hub(ConfigSection, extra="forbid"):
    repo: str
    revision: str


class _Source(ConfigSection, extra="forbid"):
    family: str
    layout: dict[str, str]
    files: dict[str, _File]
    hub: _Hub | None = None


class _Options(ConfigSection, extra="forbid"):
    """Those that differ from what a conversion does by itself."""

    dtype: str | None = None
    max_shard_bytes: PositiveInt | None = None
    embedding_from: Literal["decoder-from"] | None = None
    encoder_layers: list[Depth] | None = None
    decoder_layers: list[Depth] | None = None
    projector: Literal["copy", "zeros", "aligned"] | None = None
    ridge: Positive | None = None
    rope_scaling: str | None = None
    sliding_window: Size | None = None
    preset: str | None = None
    keep_rows: Literal[True] | None = None
    drop_heads: Literal[True] | None = None


class _Dropped(ConfigSection, extra="forbid"):
    name: str
    because: str


class _Change(ConfigSection, extra="forbid"):
    field: str
    source: Any
    target: Any

    @model_validator(mode="after")
    def _casts_to_a_dtype(self) -> Self:
        if self.field == "dtype" and self.target not in list(BY_CONFIG_NAME):
            raise ValueError(f"{self.target!r} is no dtype that a model is cast to")
        return self


class _TokenChange(ConfigSection, extra="forbid"):
    token: str
    source: NonNegativeInt | None
    target: NonNegativeInt
    replaces: str | None


class _Task(ConfigSection, extra="forbid"):
    """A task of the objective, as the table of the mixture has it."""

    name: str
    kind: Literal["spans", "prefix"]
    rate: Number
    mean_span: Number | None
    weight: PositiveInt
    mode_token: NonNegativeInt | None
    sentinel: bool


class _Mixture(ConfigSection):
    tasks: Annotated[list[_Task], Field(min_length=1)]


class _TrainingSettings(ConfigSection):
    """Those settings of a training that are read again; the others are left alone."""

    mixture: _Mixture
    encoder_length: PositiveInt
    decoder_length: PositiveInt
    image_every: PositiveInt | None
    teacher: Digest | None
    steps: PositiveInt
    batch_tokens: PositiveInt
    lr: Positive
    lr_floor: Number
    warmup: NonNegativeInt
    seed: NonNegativeInt
    betas: Annotated[list[Number], Field(min_length=2, max_length=2)]
    weight_decay: Number
    clip: Positive
    freeze_until: NonNegativeInt
    trainable: list[str]


class _Adaptation(ConfigSection, extra="forbid"):
    """What made the values that are not the source's.

    `steps` is how long the training had run, `checkpoints` the steps whose values were averaged, or the one that was
    taken. `tokens` is how many were read until then. `settings` are all that decide the result, the identity of a
    teacher among them. `trained` names the tensors, `{layer}` in place of the numbers of all layers; `frozen` the parts
    of which none was trained.
    """

    steps: PositiveInt
    checkpoints: Annotated[list[PositiveInt], Field(min_length=1)]
    tokens: NonNegativeInt
    settings: _TrainingSettings
    settings_sha256: Digest
    data_sha256: Digest
    trained: Annotated[list[str], Field(min_length=1)]
    frozen: list[str]

    @model_validator(mode="before")
    @classmethod
    def _settings_are_those_of_the_digest(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and digest_of(fields.get("settings")) != fields.get("settings_sha256"):
            raise ValueError("settings_sha256 does not fit the settings")
        return fields


class _Manifest(ConfigSection, extra="forbid"):
    """What a manifest must be, so that its readers need not ask."""

    format: Literal[1]
    tool: _Tool
    mapping: _Mapping | None = None
    adaptation: _Adaptation | None = None
    options: _Options
    source: _Source
    decoder_from: _Source | None = None
    vision_from: _Source | None = None
    dtype: str
    parameters: dict[str, NonNegativeInt]
    dropped: list[_Dropped]
    changes: list[_Change]
    tokens: list[_TokenChange]
    notes: list[str]
    files: dict[str, _File]
    verification: dict[str, Any] | None = None
    sha256: str
