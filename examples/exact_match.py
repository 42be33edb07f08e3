"""How many held-out pairs a model gets exactly right: a T5Gemma 2 from the input, a Gemma 3 from examples before it.

    python examples/exact_match.py T5GEMMA2 HELD_OUT.jsonl [--rows 200]
    python examples/exact_match.py GEMMA3 HELD_OUT.jsonl --shots TRAIN.jsonl [--count 8] [--labels English German]

Rows are such as {"input": "the 3rd of March, 1987", "target": "1987-03-03"}. With --shots, the first --count rows of
that file stand before each input in the prompt of a decoder-only model, and its answer ends with the line. Both decode
greedily. Printed are the first wrong answers and the share of exact matches.
"""

import argparse
import json
from pathlib import Path

Row = dict[str, str]


def main() -> None:
    """Measure a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--shots", type=Path, help="pairs of which the first stand in the prompt of a Gemma 3")
    parser.add_argument("--count", type=int, default=8, help="examples in the prompt")
    parser.add_argument("--labels", nargs=2, default=("Input", "Output"), help="how the prompt names input and target")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows to measure, from the first")
    parser.add_argument("--batch", type=int, default=20, help="rows that run at once")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    chosen = parser.parse_args()
    rows = read(chosen.held_out)[: chosen.rows]
    inputs = [each["input"] for each in rows]
    if chosen.shots is None:
        written = answers(chosen.model, inputs, chosen.batch, chosen.max_new_tokens)
    else:
        asked, answered = chosen.labels
        shots = read(chosen.shots)[: chosen.count]
        before = "".join(f"{asked}: {shot['input']}\n{answered}: {shot['target']}\n\n" for shot in shots)
        prompts = [f"{before}{asked}: {text}\n{answered}:" for text in inputs]
        written = first_lines(chosen.model, prompts, chosen.batch, chosen.max_new_tokens)
    report(rows, written)


def read(path: Path) -> list[Row]:
    """Read rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(model: Path, inputs: list[str], batch: int, new: int) -> list[str]:
    """Return what an encoder-decoder writes for each input."""
    from t5g2convert.reference.generation.generator import Generator, Prompt
    from t5g2convert.reference.options import GenerateOptions

    generator = Generator(model, GenerateOptions(temperature=0, max_new_tokens=new, batch=batch))
    return [found.text.strip() for found in generator.texts(map(Prompt, inputs))]


def first_lines(model: Path, prompts: list[str], batch: int, new: int) -> list[str]:
    """Return the line that a decoder-only model writes after each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On the left, so that the generated tokens follow the prompt of each row.
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    decoder = AutoModelForCausalLM.from_pretrained(model).eval()
    texts: list[str] = []
    for at in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[at : at + batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            tokens = decoder.generate(**inputs, max_new_tokens=new, do_sample=False)
        written = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [text.strip().split("\n")[0] for text in written]
    return texts


def report(rows: list[Row], written: list[str]) -> None:
    """Print the first wrong answers, and the share of exact matches."""
    pairs = list(zip(rows, written, strict=True))
    wrong = [(each, text) for each, text in pairs if text != each["target"]]
    for each, text in wrong[:10]:
        print(f"{each['input']!r}: {text!r} in place of {each['target']!r}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} exactly right ({1 - len(wrong) / len(rows):.1%})")


if __name__ == "__main__":
    main()
