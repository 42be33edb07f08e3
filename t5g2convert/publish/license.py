"""The license of a converted model: what the card of its source says, and never a default."""

import re
from dataclasses import dataclass
from typing import Final

from t5g2convert.errors import CheckpointError
from t5g2convert.printable import printable
from t5g2convert.publish.frontmatter import Card, Value, parse_card
from t5g2convert.publish.markdown import code

KEYS: Final = ("license", "license_name", "license_link")
"""What the Hub reads: a license by its name there, or `other` with a name and an address of its own."""

GEMMA_TERMS: Final = "https://ai.google.dev/gemma/terms"
MAX_CHARACTERS: Final = 500

_ADDRESS: Final = re.compile(r"https://[!-~]+")
_FILE: Final = re.compile(r"(?!.*\.\.)\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class SourceLicense:
    """What the source's card says of its license.

    Attributes:
        known: Whether there is such a card.
        metadata: `license`, `license_name` and `license_link`, those that it has and that hold here too.
        beside: A link to a file that is the source's, and is not here.
        gemma: Whether the card names Gemma's terms.
    """

    known: bool
    metadata: dict[str, str | list[str]]
    beside: str | None
    gemma: bool


def read_license(source_card: str | None, files: str | None) -> SourceLicense:
    """Read the source's card.

    Args:
        source_card: Its text; None where it is not at hand.
        files: The address that the source's files stand behind, if it is a model of the Hub.

    Raises:
        CheckpointError: The card's metadata cannot be read, or its license is neither a text nor a list of texts.
    """
    if source_card is None:
        return SourceLicense(False, {}, None, False)
    where = "the source's card"
    card = parse_card(source_card, error=CheckpointError, where=where)
    found = {key: value for key in KEYS if (value := _told(card, key, where)) is not None}
    if "license" not in found:
        found = {}
    beside = None
    link = found.get("license_link")
    if link is not None and not (isinstance(link, str) and _ADDRESS.fullmatch(link)):
        if isinstance(link, str) and files is not None and _FILE.fullmatch(link):
            found["license_link"] = files + link
        else:
            beside = str(link)
            del found["license_link"]
    names = [found.get("license"), found.get("license_name")]
    gemma = any(isinstance(name, str) and name.lower().startswith("gemma") for name in names)
    return SourceLicense(True, found, beside, gemma or GEMMA_TERMS.removeprefix("https://") in source_card.lower())


def _told(card: Card, key: str, where: str) -> str | list[str] | None:
    """What a card says under a key, without control characters."""
    if key not in card.entries:
        return None
    entry = card.entries[key]
    if not entry.legible:
        raise CheckpointError(f"has metadata whose {key} is neither a text nor a list of texts", where=where)
    value = entry.value
    if value is None or not "".join(value).strip():
        return None
    if sum(map(len, value)) > MAX_CHARACTERS:
        raise CheckpointError(f"has a {key} of more than {MAX_CHARACTERS} characters", where=where)
    return printable(value) if isinstance(value, str) else [printable(text) for text in value]


def license_text(source: SourceLicense, named: Value, *, ours: bool) -> str:
    """A card's words on its license, in Markdown.

    Args:
        source: What the source's card says.
        named: What the card's own metadata name.
        ours: Whether that was taken from a card of the source, now or before.
    """
    theirs = source.metadata.get("license")
    if theirs is not None:
        lines = [f"The source's card names the license {_names(theirs)}, which a conversion does not change."]
        if "license_name" in source.metadata:
            lines.append(f"It calls it {_names(source.metadata['license_name'])}.")
        if not ours:
            lines.append(f"**This card's metadata name {_names(named)}**, which was there before and was not changed.")
    elif source.known:
        lines = [
            "The source's card names no license in its metadata, so none is stated here; its terms hold all the same."
        ]
    else:
        lines = [
            "The source's card was not at hand, so no license is taken from it; the source's terms hold all the same."
        ]
    if theirs is None and named is not None:
        told = "was taken from a card of the source before" if ours else "was there before, and is not from the source"
        lines.append(f"The license {_names(named)} in this card's metadata {told}.")
    if source.beside is not None:
        lines.append(f"Its text, {code(source.beside)}, is a file of the source and is not among the files here.")
    if source.gemma:
        lines.append(
            f"The source names Google's [Gemma Terms of Use]({GEMMA_TERMS}): who passes this on is bound by them."
        )
    return " ".join(lines)


def _names(value: str | list[str] | Value) -> str:
    """A license, or several."""
    if value is None:
        return "(none that can be told)"
    return code(value) if isinstance(value, str) else ", ".join(code(item) for item in value)
