"""Make a deep encoder and a shallow decoder from one Gemma 3, or take the decoder from another Gemma 3.

    python examples/convert_unbalanced.py SOURCE OUTPUT DECODER_LAYERS [OTHER]

DECODER_LAYERS selects the layers that the decoder takes from its parent: `first:6`, `1:34:2`, or `0,3,5:12`. OTHER is a
Gemma 3 of the same width and vocabulary, for example the instruction-tuned version of a pretrained SOURCE; without it,
both stacks come from SOURCE. Each layer keeps its kind and its weights, so each stack still computes the same as those
layers of its parent.
"""

import sys
from pathlib import Path

from t5g2convert import convert, verify


def main(source: Path, output: Path, decoder_layers: str, other: Path | None = None) -> None:
    """Convert, and verify each stack against its own parent and its own layers."""
    done = convert(source, output, decoder_layers=decoder_layers, decoder_from=other)
    print(*done.notes, sep="\n")
    print(f"parameters: encoder {done.parameters['encoder']:,}, decoder {done.parameters['decoder']:,}")
    report = verify(output, source, decoder_from=other)
    for check in report.checks:
        print("passed" if check.passed else "FAILED", check.name, "-", check.detail)
    print(*report.remarks, sep="\n")
    sys.exit(0 if report.passed else 6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:5]))
