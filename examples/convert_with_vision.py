"""Give a text-only Gemma 3 (270m, 1b) the eyes of a larger one while it is converted, and the context of a release.

    python examples/convert_with_vision.py SOURCE DONOR OUTPUT

The projector is aligned by least squares between both embedding tables; without `projector` it would be zeros, and
images would mean nothing until it is trained.
"""

import sys
from pathlib import Path

from t5g2convert import convert, verify


def main(source: Path, donor: Path, output: Path) -> None:
    """Convert with a donor, and judge text and tower, each by the model that it came from."""
    done = convert(source, output, vision_from=donor, projector="aligned", rope_scaling="linear:8")
    print(*done.notes, sep="\n")
    report = verify(output, source, vision_from=donor)
    for check in report.checks:
        print("passed" if check.passed else "FAILED", check.name, "-", check.detail)
    print(*report.remarks, sep="\n")
    sys.exit(0 if report.passed else 6)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
