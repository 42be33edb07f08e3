"""The manifest `t5g2.json`: what made a folder, from what, and the sha256 of all its files.

It has one form, byte for byte, and ends with the sha256 of everything before, so that a change of any one byte shows.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.folder import read_json_file
from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.errors import CheckpointError

MANIFEST_FILE: Final = "t5g2.json"
FORMAT: Final = 1
SEAL: Final = "sha256"
"""The manifest's last key."""


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
        CheckpointError: There is none, it is of another format, or not byte for byte as it was written.
    """
    path = folder / MANIFEST_FILE
    text = read_json_file(path)
    document = parse_object(text, path)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"has format {document.get('format')!r}, expected {FORMAT}", where=path)
    if seal(document) != text:
        raise CheckpointError("was changed after it was written: its sha256 does not fit its contents", where=path)
    return document
