"""The base of the manifest's sections, and the form of a sha256 in it."""

from typing import Annotated, Any

from pydantic import Field

from t5g2convert.checkpoint.families.config_section import ConfigSection

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A sha256, hexadecimal."""


class ManifestSection(ConfigSection, extra="forbid"):
    """A section of the manifest; it remembers which keys are present."""

    def document(self) -> dict[str, Any]:
        """Return the section as JSON, without absent keys."""
        return self.model_dump(exclude_unset=True)
