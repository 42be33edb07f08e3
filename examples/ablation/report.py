"""The results of the ablations as Markdown tables and as curves; see run.py.

    python examples/ablation/report.py OUT/results.json OUT

rewrites both.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""For each model, `parameters` by part, and `held_out`, the evaluations by step."""


def table(results: Results) -> str:
    """Return two tables: parameters by part, and held-out losses of the first and last step in nats per label."""
    parts = ("embedding", "encoder", "decoder", "total")
    sizes = [[name, *(f"{result['parameters'][part]:,}" for part in parts)] for name, result in results.items()]
    tasks, losses = [], []
    for name, result in results.items():
        first, last = (result["held_out"][choose(result["held_out"], key=int)] for choose in (min, max))
        tasks = list(last["tasks"])
        found = [first["loss"], first["hidden_loss"], last["loss"], last["hidden_loss"], last["gain"]]
        losses.append([name, *(f"{loss:.3f}" for loss in (*found, *(last["tasks"][task] for task in tasks)))])
    columns = ["model", "start", "start, hidden", "end", "end, hidden", "worth of the encoder", *tasks]
    return f"{rows(['model', *parts], sizes)}\n{rows(columns, losses)}"


def rows(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table with numbers in all columns except the first."""
    marks = ["---"] + ["---:"] * (len(columns) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, marks, *lines))


def draw(results: Results, path: Path) -> None:
    """Draw the held-out loss and the encoder's gain over the steps; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    # By default the names of elements have a random salt, and the file has today's date.
    with matplotlib.rc_context({"svg.hashsalt": "t5g2", "svg.fonttype": "none", "font.family": ["sans-serif"]}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        losses, gains = figure.subplots(1, 2)
        for name, result in results.items():
            found = sorted((int(step), values) for step, values in result["held_out"].items())
            steps = [step for step, _ in found]
            losses.plot(steps, [values["loss"] for _, values in found], label=name, marker="o", markersize=3)
            gains.plot(steps, [values["gain"] for _, values in found], label=name, marker="o", markersize=3)
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
