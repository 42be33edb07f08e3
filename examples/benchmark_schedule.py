"""The schedule of a training run over a billion tokens, simulated: useful work, documents in a step, time to start.

    python examples/benchmark_schedule.py [--tokens 1000000000] [--batch-tokens 4194304]

Useful is the share of the devices' operations that is neither padding nor waiting for the slowest device of a pass, by
the operations of the 270m-270m model. Documents are of 1,000 tokens; "singly" is how many there would be if every text
of a step were drawn by itself. Nothing is trained, and no data is written.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark_sources import CONFIGS, samples_of

from t5g2convert import plan
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.forecast import simulate
from t5g2convert.adaptation.ul2.dataset import UL2Dataset
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2, read_t5gemma2
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source

DOCUMENT = 1000
STEPS = 20


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**9)
    parser.add_argument("--batch-tokens", type=int, default=256 * 16_384)
    arguments = parser.parse_args()
    shapes = shapes_of_270m()
    print(f"{'length':>7} {'ranks':>6} {'useful':>8} {'passes':>7} {'documents':>10} {'singly':>8} {'seconds':>8}")
    for length in (1024, 4096, 16_384):
        started = time.perf_counter()
        samples = samples_of(shapes, arguments.tokens, length, arguments.batch_tokens, STEPS)
        settings = samples.settings
        samples.size(0, settings.samples)
        seconds = time.perf_counter() - started
        found, singly = documents(samples, arguments.tokens)
        for ranks in (1, 8, 64):
            schedule = simulate(samples, devices=ranks, loop=LoopConfig(), steps=STEPS)
            print(
                f"{length:>7,} {ranks:>6} {schedule.useful:>8.1%} {schedule.passes / schedule.steps:>7,.0f} "
                f"{found:>10,.0f} {singly:>8,.0f} {seconds:>8.3f}"
            )


def documents(samples: UL2Dataset, tokens: int) -> tuple[float, float]:
    """Return the documents that the texts of a step start in, on average; and if each were drawn by itself."""
    assert samples.sampler is not None
    count, total = samples.settings.samples, tokens // DOCUMENT
    found = [
        len({samples.sampler.text(step * count + number).start // DOCUMENT for number in range(count)})
        for step in range(STEPS)
    ]
    return sum(found) / STEPS, total * (1 - (1 - 1 / total) ** count)


def shapes_of_270m() -> T5Gemma2:
    """Return the shapes of t5gemma-2-270m-270m, from headers."""
    with TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        write_synthetic_source(source, find_map("gemma3").map, CONFIGS["270m"], seed=None)
        return read_t5gemma2(plan(source).config, Path("config.json"))


if __name__ == "__main__":
    main()
