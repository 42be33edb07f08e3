"""Extract the encoder of a T5Gemma 2, and embed texts with it in sentence-transformers.

    python examples/extract_encoder.py T5GEMMA2 ENCODER "a cat" "a dog" "a bus"

Prints the similarity of the texts as cosines. For a model that was only converted they mean little: its encoder has not
yet been trained to see both ways.
"""

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

from t5g2convert import convert, verify


def main(whole: Path, encoder: Path, texts: list[str]) -> None:
    """Extract, verify, and embed."""
    convert(whole, encoder, part="encoder")
    report = verify(encoder, whole)
    for check in report.checks:
        print("passed" if check.passed else "FAILED", check.name, "-", check.detail)
    if not report.passed:
        sys.exit(6)
    # By default, sentence-transformers uses mean pooling over the tokens' states.
    model = SentenceTransformer(str(encoder), device="cpu")
    vectors = model.encode(texts)
    for text, row in zip(texts, model.similarity(vectors, vectors), strict=True):
        print(" ".join(f"{cosine:6.3f}" for cosine in row), "", text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
