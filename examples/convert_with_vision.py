"""Convert a text-only Gemma 3 (270m, 1b) with the vision tower of a larger one and the context length of a release.

    python examples/convert_with_vision.py SOURCE DONOR OUTPUT

The projector is aligned by least squares between both embedding tables. Without `projector` it would be zeros, and
images would have no effect until it is trained.
"""

import sys
from pathlib import Path

from t5g2convert import convert, verify


def main(source: Path, donor: Path, output: Path) -> None:
    """Convert with a donor, and verify text and tower, each against the model that it came from."""
    done = convert(source, output, vision_from=donor, projector="aligned", rope_scaling="linear:8")
    print(*done.notes, sep="\n")
    report = verify(output, source, vision_from=donor)
    for check in report.checks:
        print("passed" if check.passed else "FAILED", check.name, "-", check.detail)
    print(*report.remarks, sep="\n")
    sys.exit(0 if report.passed else 6)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
