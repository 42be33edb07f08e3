"""Text from outside, escaped for terminals, pages and logs."""


def printable(text: str, keep: str = "") -> str:
    """Return text with its control characters escaped, except those in `keep`.

    Example:
        >>> printable("red \x1b[31m")
        'red \\x1b[31m'
    """
    return "".join(
        character if character in keep or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
