"""`t5g2 demo`."""


def demo() -> None:
    """Later."""
