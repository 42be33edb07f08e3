"""Convert a text-only Gemma 3, and verify the result.

python examples/convert_text.py SOURCE OUTPUT
"""

import sys
from pathlib import Path

from t5g2convert import convert, plan, verify


def main(source: Path, output: Path) -> None:
    """Show the plan, convert, and verify the result."""
    print("will have", f"{plan(source).parameters['total']:,}", "parameters")
    done = convert(source, output)
    print(*done.notes, sep="\n")
    report = verify(output, source)
    for check in report.checks:
        print("passed" if check.passed else "FAILED", check.name, "-", check.detail)
    sys.exit(0 if report.passed else 6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
