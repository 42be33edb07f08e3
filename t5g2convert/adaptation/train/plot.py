"""The losses of a run as a picture: the same bytes for the same numbers."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.errors import OutputError

SMOOTHED: Final = 50
"""The line of a task has about so many points: each the mean, weighted by labels, of the steps around it."""


def plot_losses(steps: Sequence[Metrics], path: Path) -> None:
    """Draw the loss of each task over the steps, as SVG.

    Raises:
        OutputError: It cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Without a salt the names of its elements are random, and without a date it has today's.
    with matplotlib.rc_context(
        {"svg.hashsalt": "t5g2", "svg.fonttype": "none", "font.family": ["sans-serif"], "text.parse_math": False}
    ):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(name for step in steps for name in step.tasks):
            axes.plot(*_smoothed(steps, name), label=name, linewidth=1.5)
        axes.set(xlabel="step", ylabel="loss, nats for each label")
        axes.grid(alpha=0.3)
        if steps:
            axes.legend(frameon=False, ncols=2)
        try:
            drawn = BytesIO()
            figure.savefig(drawn, format="svg", metadata={"Date": None})
            replace_file(path, drawn.getvalue())
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=path) from error


def _smoothed(steps: Sequence[Metrics], name: str) -> tuple[list[float], list[float]]:
    """The middle of each group of steps, and a task's mean loss in it."""
    size = max(1, len(steps) // SMOOTHED)
    places, means = [], []
    for start in range(0, len(steps), size):
        group = [step for step in steps[start : start + size] if name in step.tasks]
        labels = sum(step.labels[name] for step in group)
        if labels:
            places.append(sum(step.step for step in group) / len(group))
            means.append(sum(step.tasks[name] * step.labels[name] for step in group) / labels)
    return places, means
