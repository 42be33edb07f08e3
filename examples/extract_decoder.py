"""Extract a Gemma 3 from a T5Gemma 2: its decoder without memory; this also works for a model that was trained further.

    python examples/extract_decoder.py T5GEMMA2 GEMMA3 [PROMPT]

From a model that was only converted, this gives the parent again, every tensor byte for byte.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from t5g2convert import convert, verify


def main(whole: Path, gemma3: Path, prompt: str) -> None:
    """Extract, verify, and continue a prompt in transformers."""
    done = convert(whole, gemma3, part="decoder")
    print(f"{done.parameters['total']:,} parameters: {done.parameters}")
    report = verify(gemma3, whole)
    for check in report.checks:
        print("passed" if check.passed else "FAILED", check.name, "-", check.detail)
    if not report.passed:
        sys.exit(6)
    tokenizer, model = AutoTokenizer.from_pretrained(gemma3), AutoModelForCausalLM.from_pretrained(gemma3)
    written = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    print(repr(tokenizer.decode(written[0], skip_special_tokens=True)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "Once upon a time")
