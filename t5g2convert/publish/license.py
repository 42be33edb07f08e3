"""The license in a model card: the license that the source's card names, never a default."""

import re
from dataclasses import dataclass
from typing import Final

from t5g2convert.errors import CheckpointError
from t5g2convert.printable import printable
from t5g2convert.publish.frontmatter import Card, Value, parse_card
from t5g2convert.publish.markdown import code

LICENSE_KEYS: Final = ("license", "license_name", "license_link")
"""The keys that the Hub reads: the name of a license that it knows, or `other` with a name and a link."""

GEMMA_TERMS: Final = "https://ai.google.dev/gemma/terms"
MAX_CHARACTERS: Final = 500

_ADDRESS: Final = re.compile(r"https://[!-~]+")
_FILE: Final = re.compile(r"(?!.*\.\.)\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class SourceLicense:
    """The license that the source's card names.

    Attributes:
        has_card: Whether the source's card was available.
        metadata: Its `license`, `license_name` and `license_link`, as far as they are valid for the output.
        missing_file: A license file that the source's card links to but that is not in the output.
        gemma: Whether the card names the Gemma Terms of Use.
    """

    has_card: bool
    metadata: dict[str, str | list[str]]
    missing_file: str | None
    gemma: bool


def read_license(source_card: str | None, address: str | None) -> SourceLicense:
    """Read the license from the source's card.

    Args:
        source_card: The text of the card; None if it is not available.
        address: The start of the URLs of the source's files on the Hub; None for a local folder.

    Raises:
        CheckpointError: The card's metadata cannot be read, or its license is neither text nor a list of texts.
    """
    if source_card is None:
        return SourceLicense(False, {}, None, False)
    where = "the source's card"
    card = parse_card(source_card, error=CheckpointError, where=where)
    found = {key: value for key in LICENSE_KEYS if (value := _read_key(card, key, where)) is not None}
    if "license" not in found:
        found = {}
    missing_file = None
    link = found.get("license_link")
    if link is not None and not (isinstance(link, str) and _ADDRESS.fullmatch(link)):
        if isinstance(link, str) and address is not None and _FILE.fullmatch(link):
            found["license_link"] = address + link
        else:
            missing_file = str(link)
            del found["license_link"]
    names = [found.get("license"), found.get("license_name")]
    gemma = any(isinstance(name, str) and name.lower().startswith("gemma") for name in names)
    return SourceLicense(
        True, found, missing_file, gemma or GEMMA_TERMS.removeprefix("https://") in source_card.lower()
    )


def _read_key(card: Card, key: str, where: str) -> str | list[str] | None:
    """Return the value of a key, without control characters; None if it is missing or empty."""
    if key not in card.entries:
        return None
    entry = card.entries[key]
    if not entry.readable:
        raise CheckpointError(f"{key} in the metadata is neither text nor a list of texts", where=where)
    value = entry.value
    if value is None or not "".join(value).strip():
        return None
    if sum(map(len, value)) > MAX_CHARACTERS:
        raise CheckpointError(f"{key} has more than {MAX_CHARACTERS} characters", where=where)
    return printable(value) if isinstance(value, str) else [printable(text) for text in value]


def license_text(source: SourceLicense, own: Value, *, from_source: bool) -> str:
    """Return the license section of a card, in Markdown.

    Args:
        source: The license that the source's card names.
        own: The license in this card's own metadata.
        from_source: Whether `own` was copied from the source's card, now or earlier.
    """
    theirs = source.metadata.get("license")
    if theirs is not None:
        lines = [f"The source's card names the license {_names(theirs)}; a conversion does not change it."]
        if "license_name" in source.metadata:
            lines.append(f"It calls the license {_names(source.metadata['license_name'])}.")
        if not from_source:
            lines.append(f"**This card's own metadata name {_names(own)}**; that was already there and was kept.")
    elif source.has_card:
        lines = ["The source's card names no license in its metadata, so none is stated here; its terms still apply."]
    else:
        lines = ["The source's card was not available, so no license is copied; the source's terms still apply."]
    if theirs is None and own is not None:
        origin = "was copied from a card of the source earlier" if from_source else "was already there"
        lines.append(f"The license {_names(own)} in this card's metadata {origin}.")
    if source.missing_file is not None:
        lines.append(f"Its text, {code(source.missing_file)}, is a file of the source and is not included here.")
    if source.gemma:
        lines.append(
            f"The source is under Google's [Gemma Terms of Use]({GEMMA_TERMS}), which bind everyone who passes it on."
        )
    return " ".join(lines)


def _names(value: str | list[str] | Value) -> str:
    if value is None:
        return "(not readable)"
    return code(value) if isinstance(value, str) else ", ".join(code(item) for item in value)
