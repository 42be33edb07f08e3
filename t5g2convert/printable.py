"""Text from outside, made safe to show."""


def printable(text: str, keep: str = "") -> str:
    """Text with its control characters escaped, so that a terminal, a page or a log shows them and obeys none."""
    return "".join(
        character if character in keep or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
