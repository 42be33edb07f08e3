"""Measure the reference encoder-decoder against transformers, on the same weights and inputs, alternating in one run.

    python examples/benchmark_forward.py [270m] [--rounds 7] [--dtypes float32 bfloat16] [--folder DIR]

All implementations load the same T5Gemma 2 of real shape with seeded random weights. The script measures one pass with
512 tokens in the encoder and 64 in the decoder, and the greedy generation of 64 tokens after 512. It prints medians
over the rounds: seconds, and the ratio to transformers' sdpa in the same round. OMP_NUM_THREADS sets the number of
threads for all.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_sources import make_source

from t5g2convert import convert
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.generation.engines import ReferenceEngine
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference

ENCODER_TOKENS, DECODER_TOKENS, WRITTEN_TOKENS = 512, 64, 64
OURS, YARDSTICK, EAGER = "t5g2 reference", "transformers, sdpa", "transformers, eager"


def main() -> None:
    """Measure the requested dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="270m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, output = Path(folder) / "source", Path(folder) / "output"
        source.mkdir()
        make_source(arguments.size, str(source))
        convert(source, output, flush=False)
        for name in arguments.dtypes:
            dtype = getattr(torch, name)
            ids = torch.randint(3, 500, (1, ENCODER_TOKENS), generator=torch.Generator().manual_seed(0))
            written = ids[:, :DECODER_TOKENS]
            passes, writers = ours(output, dtype, ids, written)
            for kernel, label in (("sdpa", YARDSTICK), ("eager", EAGER)):
                theirs = transformers_model(output, dtype, kernel, ids, written)
                passes[label], writers[label] = theirs
            check_equal({label: run() for label, run in writers.items()})
            for title, runs in (
                (f"{ENCODER_TOKENS} tokens in, {DECODER_TOKENS} out, one pass", passes),
                (f"{ENCODER_TOKENS} tokens in, {WRITTEN_TOKENS} written greedily", writers),
            ):
                report(f"{arguments.size}-{arguments.size}, {name}: {title}", runs, arguments.rounds)


def ours(
    folder: Path, dtype: torch.dtype, ids: torch.Tensor, written: torch.Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Return two functions of the reference: a pass, and greedy generation."""
    model = T5Gemma2Reference(open_checkpoint(folder), dtype=dtype, resident=True, kernel="sdpa")
    kept, written_kept = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(written, dtype=torch.bool)

    def one_pass() -> torch.Tensor:
        return model.decoder.logits(model.decode(written, written_kept, model.encode(ids, kept), kept))

    def write() -> list[int]:
        step, tokens = ReferenceEngine(model).start(ids, kept, room=WRITTEN_TOKENS), [2]
        with torch.inference_mode():
            for _ in range(WRITTEN_TOKENS):
                tokens.append(int(step(torch.tensor([tokens[-1:]])).argmax()))
        return tokens[1:]

    return {OURS: one_pass}, {OURS: write}


def transformers_model(
    folder: Path, dtype: torch.dtype, kernel: str, ids: torch.Tensor, written: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return two functions of transformers with one kind of attention: a pass, and greedy generation."""
    from transformers import T5Gemma2ForConditionalGeneration

    model = T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=kernel).eval()
    # Without an end token, all implementations generate the same number of tokens.
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)

    def one_pass() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits

    def write() -> list[int]:
        with torch.inference_mode():
            found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=WRITTEN_TOKENS, do_sample=False)
        return found[0, 1:].tolist()

    return one_pass, write


def check_equal(texts: dict[str, list[int]]) -> None:
    """Report where generated tokens differ; ties may break differently in bfloat16."""
    for label, text in texts.items():
        if len(text) != WRITTEN_TOKENS:
            raise SystemExit(f"{label} wrote {len(text)} tokens, expected {WRITTEN_TOKENS}")
        same = next((at for at, pair in enumerate(zip(text, texts[OURS], strict=True)) if pair[0] != pair[1]), None)
        if same is not None:
            print(f"{label} writes another token than {OURS} from step {same} on")


def report(title: str, runs: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Run all functions in turn, after one round to warm up, and print medians."""
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for number in range(rounds + 1):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[label].append(time.perf_counter() - start)
    print(f"\n{title}; medians of {rounds} rounds, {torch.get_num_threads()} threads")
    for label, times in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, seconds[YARDSTICK], strict=True))
        print(f"{label:24}{statistics.median(times):8.3f} s{ratio:8.2f} times {YARDSTICK}", flush=True)


if __name__ == "__main__":
    main()
