"""Measure how fast UL2 samples are made from texts, on one core.

    python examples/benchmark_ul2.py [512 4096 16384] [--rounds 7] [--tokens 4000000]

A sample is made as in training: its task and its stretch of text from the schedule, its generator, the span corruption.
The text is random tokens in memory. A row is for one budget, the same for the encoder's input and for the labels. It
shows how many sentinels a sample may need, and medians over the rounds: microseconds a sample, millions of raw tokens a
second, and millions of output tokens a second, encoder's input and labels together. Processor time is measured, so
that other processes on the machine have little effect.
"""

import argparse
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.ul2.corruption import Frame, corrupt, longest, needed_sentinels
from t5g2convert.adaptation.ul2.mixture import read_mixture
from t5g2convert.adaptation.ul2.sampler import Sampler
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.adaptation.ul2.texts import Chunks

VOCABULARY, RESERVED = 262_144, frozenset({0, 1, 2, 255_999, 256_000, 256_001})
FRAME = Frame(encoder_bos=2, encoder_eos=None, eos=1)
CORPUS_TOKENS = 16_000_000


def main() -> None:
    """Measure the requested budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", nargs="*", type=int, default=[512, 4096, 16_384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="raw tokens of a round, about")
    arguments = parser.parse_args()
    corpus = np.random.default_rng(0).integers(3, 255_999, CORPUS_TOKENS, dtype=np.uint32)
    print(f"one core, processor time, medians of {arguments.rounds} rounds")
    print(f"{'budget':>8}{'sentinels':>12}{'us/sample':>12}{'M raw/s':>10}{'M out/s':>10}")
    for budget in arguments.budgets:
        measure(budget, corpus, arguments.rounds, arguments.tokens)


def measure(budget: int, corpus: NDArray[np.uint32], rounds: int, tokens: int) -> None:
    """Print the row of a budget, after a round to warm up."""
    mixture = read_mixture()
    raw_lengths = tuple(longest(task, FRAME, encoder=budget, decoder=budget) for task in mixture.tasks)
    needed = needed_sentinels(mixture, raw_lengths)
    sentinels = Sentinels.of(vocabulary=VOCABULARY, reserved=RESERVED, needed=needed)
    chunks = Chunks(mixture, raw_lengths, corpus.size, seed=0)
    schedule = Sampler(mixture, raw_lengths, [chunks], seed=0)
    samples = max(1, tokens // chunks.chunk) * mixture.block
    rows = []
    for number in range(rounds + 1):
        raw = out = 0
        began = time.process_time()
        for i in range(number * samples, (number + 1) * samples):
            task, (_, start, stop) = schedule.task(i), schedule.text(i)
            text = corpus[start:stop]
            example = corrupt(text, mixture.tasks[task], sentinels, FRAME, schedule.rng(i), index=task)
            raw, out = raw + stop - start, out + example.encoder.size + example.labels.size
        seconds = time.process_time() - began
        rows.append((seconds / samples * 1e6, raw / seconds / 1e6, out / seconds / 1e6))
    micros, raw_rate, out_rate = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    print(f"{budget:8}{needed:12}{micros:12.0f}{raw_rate:10.1f}{out_rate:10.1f}", flush=True)


if __name__ == "__main__":
    main()
