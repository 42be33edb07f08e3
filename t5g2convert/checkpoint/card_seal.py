"""The seal of a model card that t5g2 wrote alone: its last line, the sha256 of everything before it.

A card with its seal holds nothing that its owner wrote, so `convert --overwrite` may replace it.
"""

import hashlib
from pathlib import Path
from typing import Final

CARD_FILE: Final = "README.md"


def sealed(card: str) -> str:
    """Return a card with its seal."""
    return f"{card}<!-- t5g2:sha256 {hashlib.sha256(card.encode()).hexdigest()} -->\n"


def is_sealed(card: str) -> bool:
    """Return whether a card has its seal, and no character was changed since."""
    before, mark, _ = card.rpartition("<!-- t5g2:sha256 ")
    return bool(mark) and card == sealed(before)


def has_sealed_card(folder: Path) -> bool:
    """Return whether the README.md of a folder is a regular file, and a card with its seal."""
    path = folder / CARD_FILE
    try:
        return not path.is_symlink() and path.is_file() and is_sealed(path.read_bytes().decode())
    except (OSError, UnicodeError):
        return False
