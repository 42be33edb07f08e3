"""Measure the decoding of `t5g2 generate` against transformers' generate, on the same weights, alternating in one run.

    python examples/benchmark_generate.py [270m] [--model DIR] [--rounds 7] [--dtypes float32 bfloat16] [--folder DIR]

Both load the same T5Gemma 2, of real shape with seeded random weights or the folder of --model, with torch's fused
attention. The script measures 64 greedy tokens after prompts of 16 and 512 tokens, and prints medians over the rounds:
seconds of processor time, and the ratio of ours to transformers' in the same round. OMP_NUM_THREADS sets the number of
threads for all.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_sources import make_source

from t5g2convert import convert
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.generation.decoding import Decoding
from t5g2convert.reference.generation.engines import ReferenceEngine
from t5g2convert.reference.generation.loop import Row, write_batch
from t5g2convert.reference.generation.sampling import Chooser
from t5g2convert.reference.generation.text_stream import TextStream
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference

PROMPT_TOKENS, WRITTEN_TOKENS = (16, 512), 64
Write = Callable[[torch.Tensor], list[int]]


class NoText(TextStream):
    """A stream that decodes nothing, because the seeded model has no tokenizer."""

    def __init__(self) -> None:
        self.stopped, self.special = False, False

    def push(self, token: int) -> str:
        """Return no text."""
        return ""

    def finish(self) -> str:
        """Return no text."""
        return ""


def main() -> None:
    """Measure the requested dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="270m")
    parser.add_argument("--model", type=Path, default=None, help="a converted model (default: a seeded one)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = arguments.model
        if model is None:
            source, model = Path(folder) / "source", Path(folder) / "output"
            source.mkdir()
            make_source(arguments.size, str(source))
            convert(source, model, flush=False)
        for name in arguments.dtypes:
            dtype = getattr(torch, name)
            measure(name, ours(model, dtype), theirs(model, dtype), arguments.rounds)


def ours(folder: Path, dtype: torch.dtype) -> Write:
    """Return the decoding of `t5g2 generate`."""
    model = T5Gemma2Reference(open_checkpoint(folder), dtype=dtype, resident=True, kernel="sdpa")
    engine, decoding = ReferenceEngine(model), Decoding(max_new_tokens=WRITTEN_TOKENS)

    def write(ids: torch.Tensor) -> list[int]:
        row = Row(ids[0].tolist(), [2], Chooser(decoding), NoText())
        with torch.inference_mode():
            for _ in write_batch(engine, [row], decoding, "cpu", lambda logits: None):
                pass
        return row.tokens

    return write


def theirs(folder: Path, dtype: torch.dtype) -> Write:
    """Return transformers' generate."""
    from transformers import T5Gemma2ForConditionalGeneration

    model = T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    # Without an end token, both generate the same number of tokens.
    model.generation_config.eos_token_id = None

    def write(ids: torch.Tensor) -> list[int]:
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITTEN_TOKENS, do_sample=False
            )
        return found[0, 1:].tolist()

    return write


def measure(name: str, ours: Write, theirs: Write, rounds: int) -> None:
    """Run both in turn, after one round to warm up, and print medians."""
    for count in PROMPT_TOKENS:
        ids = torch.randint(3, 500, (1, count), generator=torch.Generator().manual_seed(0))
        seconds: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            times = []
            for write in (ours, theirs):
                start = time.process_time()
                found = write(ids)
                times.append(time.process_time() - start)
                if len(found) != WRITTEN_TOKENS:
                    raise SystemExit(f"{len(found)} tokens were written, expected {WRITTEN_TOKENS}")
            seconds.append((times[0], times[1]))
        measured = seconds[1:]
        first, second = (statistics.median(column) for column in zip(*measured, strict=True))
        ratio = statistics.median(mine / other for mine, other in measured)
        print(
            f"{name}, {count} tokens in, {WRITTEN_TOKENS} written: t5g2 generate {first:.3f} s, transformers "
            f"{second:.3f} s, ratio {ratio:.2f} (medians of {rounds} rounds, {torch.get_num_threads()} threads)",
            flush=True,
        )


if __name__ == "__main__":
    main()
