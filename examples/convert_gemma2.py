"""Convert a Gemma 2 into a T5Gemma of the first generation, verify it, and print the result of each check.

python examples/convert_gemma2.py SOURCE OUTPUT
"""

import sys
from pathlib import Path

from t5g2convert import convert, plan, verify

PROVED = {
    "decoder_parity": "without its cross-attention, the decoder computes Gemma 2's logits",
    "encoder_parity": "under causal masks, the encoder computes Gemma 2's states",
    "cross_parity": "each cross-attention is the self-attention that it started from, nothing rotated, nothing hidden",
}


def main(source: Path, output: Path) -> None:
    """Show the plan, convert, and verify the result."""
    print(plan(source).config["model_type"], "with", f"{plan(source).parameters['total']:,}", "parameters")
    done = convert(source, output)
    print(*done.notes, sep="\n")
    report = verify(output, source)
    for check in report.checks:
        print("passed" if check.passed else "FAILED", check.name, "-", PROVED.get(check.name, check.detail))
    sys.exit(0 if report.passed else 6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
