"""A deep encoder and a shallow decoder of one Gemma 3, or a decoder that another Gemma 3 gives.

    python examples/convert_unbalanced.py SOURCE OUTPUT DECODER_LAYERS [OTHER]

DECODER_LAYERS are those that the decoder takes of its parent: `first:6`, `1:34:2`, or `0,3,5:12`. OTHER is a Gemma 3 of
the same width and vocabulary, as an instruction-tuned one beside a pretrained SOURCE; without it both stacks are of
SOURCE. Each layer keeps its kind and its weights, so that each stack still computes what those layers of its parent do.
"""

import sys
from pathlib import Path

from t5g2convert import convert, verify


def main(source: Path, output: Path, decoder_layers: str, other: Path | None = None) -> None:
    """Convert, and judge each stack by its own parent and its own layers."""
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
