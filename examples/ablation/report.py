"""The results of the ablations as Markdown tables and as curves; see run.py.

    python examples/ablation/report.py OUT/results.json OUT

rewrites both.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""For each model, `parameters` by part, and `runs`, which have the evaluations by step under `held_out`, by seed."""


def table(results: Results) -> str:
    """Return two tables: parameters by part, and held-out losses of the first and last step in nats per label.

    Losses are means over the seeds; of several seeds, the standard error follows.
    """
    parts = ("embedding", "encoder", "decoder", "total")
    sizes = [[name, *(f"{result['parameters'][part]:,}" for part in parts)] for name, result in results.items()]
    ends = {name: [_ends(run["held_out"]) for run in result["runs"].values()] for name, result in results.items()}
    every = list(dict.fromkeys(task for runs in ends.values() for _, last in runs for task in last["tasks"]))
    losses = []
    for name, runs in ends.items():
        columns = [[end[key] for end in each] for each in zip(*runs, strict=True) for key in ("loss", "hidden_loss")]
        columns.append([last["gain"] for _, last in runs])
        columns += [[last["tasks"].get(task, math.nan) for _, last in runs] for task in every]
        losses.append([name, *map(_mean, columns)])
    heads = ["model", "start", "start, hidden", "end", "end, hidden", "worth of the encoder", *every]
    return f"{rows(['model', *parts], sizes)}\n{rows(heads, losses)}"


def _ends(held_out: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the first and the last evaluation."""
    first, last = min(held_out, key=int), max(held_out, key=int)
    return held_out[first], held_out[last]


def _mean(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if math.isnan(mean):
        return "-"
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean:.3f}{error}"


def rows(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table with numbers in all columns except the first."""
    marks = ["---"] + ["---:"] * (len(columns) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, marks, *lines))


def draw(results: Results, path: Path) -> None:
    """Draw held-out losses and the encoder's worth over the steps, a line a seed; equal numbers give equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    # By default the names of elements have a random salt, and the file has today's date.
    with matplotlib.rc_context({"svg.hashsalt": "t5g2", "svg.fonttype": "none", "font.family": ["sans-serif"]}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        losses, gains = figure.subplots(1, 2)
        for number, (name, result) in enumerate(results.items()):
            for once, run in enumerate(result["runs"].values()):
                found = sorted((int(step), values) for step, values in run["held_out"].items())
                steps = [step for step, _ in found]
                line = {"color": f"C{number}", "label": "" if once else name, "marker": "o", "markersize": 3}
                losses.plot(steps, [values["loss"] for _, values in found], **line)
                gains.plot(steps, [values["gain"] for _, values in found], **line)
        losses.set(xlabel="step", ylabel="held-out loss, nats for each label")
        gains.set(xlabel="step", ylabel="loss with the encoder hidden, minus loss with it")
        gains.axhline(0, color="gray", linewidth=0.8)
        for axes in (losses, gains):
            axes.grid(alpha=0.3)
        losses.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    (Path(sys.argv[2]) / "table.md").write_text(table(read))
    draw(read, Path(sys.argv[2]) / "ablation.svg")
