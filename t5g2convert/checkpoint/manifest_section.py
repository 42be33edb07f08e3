"""The base of the manifest's sections, and the sha256 of JSON documents."""

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field

from t5g2convert.checkpoint.families.config_section import ConfigSection

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A sha256, hexadecimal."""


def digest_of(document: Any) -> str:
    """Return the sha256 of a JSON document, hexadecimal; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Section(ConfigSection, extra="forbid"):
    """A section of the manifest; it remembers which keys are present."""

    def document(self) -> dict[str, Any]:
        """Return the section as JSON, without absent keys."""
        return self.model_dump(exclude_unset=True)
