"""The results of the ablations as a table in Markdown and as curves; see run.py.

    python examples/ablation/report.py OUT/results.json OUT

draws and writes them again.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""By model: `parameters` by part, and `held_out`, what was found after so many steps."""


def last(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was found after the last step."""
    found: Mapping[str, Any] = result["held_out"][max(result["held_out"], key=int)]
    return found


def table(results: Results) -> str:
    """Parameters, and held-out losses after the last step, in nats for each label."""
    tasks = list(last(next(iter(results.values())))["tasks"])
    parts = ("embedding", "encoder", "decoder", "total")
    rows = [["model", *parts, "loss", *tasks, "encoder hidden", "encoder's worth"]]
    for name, result in results.items():
        found, parameters = last(result), result["parameters"]
        losses = [found["loss"], *(found["tasks"][task] for task in tasks), found["hidden_loss"]]
        rows.append([name, *(f"{parameters[part]:,}" for part in parts), *(f"{loss:.3f}" for loss in losses),
                     f"{found['gain']:+.3f}"])  # fmt: skip
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(results: Results, path: Path) -> None:
    """The held-out loss, and what the encoder is worth, over the steps; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    # Without a salt the names of its elements are random, and without a date it has today's.
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
