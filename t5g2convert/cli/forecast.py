"""What `t5g2 adapt --dry-run` shows: a run that was not started."""

from typing import TYPE_CHECKING

from t5g2convert.cli.console import console, print_notes, size_text, table

if TYPE_CHECKING:
    from t5g2convert.adaptation.train.forecast import Forecast


def print_forecast(forecast: "Forecast") -> None:
    """A table of the tasks, and lines of what a step and the whole run are."""
    out = console()
    tasks = table("task", "of a block", "raw tokens", "encoder", "labels", "sentinels", right=(1, 2, 3, 4, 5))
    for task in forecast.tasks:
        counts = (task.weight, task.raw, task.encoder, task.labels, task.sentinels)
        tasks.add_row(task.name, *(f"{count:,}" for count in counts))
    images = f", {forecast.image_steps:,} of them of documents with images" if forecast.image_steps else ""
    lines = {"steps": f"{forecast.steps:,} of {forecast.samples:,} samples{images}"}
    if forecast.tasks:
        out.print(tasks)
        lines["text"] = f"{forecast.corpus:,} tokens, read {forecast.epochs:.3g} times"
    lines["sentinels"] = "none" if forecast.sentinels is None else "ids {:,} down to {:,}".format(*forecast.sentinels)
    if forecast.operations is not None:
        lines["a step"] = f"{forecast.operations:.2e} operations of matrix products (estimate)"
    held = forecast.memory
    parts = {
        "weights, gradients and moments": held.states,
        "gathered": held.gathered,
        "inputs of layers": held.inputs,
        "softmax": held.softmax,
    }
    told = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    lines["a device"] = f"{size_text(held.total)} and the work of one layer (estimate, bfloat16, no teacher): {told}"
    for name, line in lines.items():
        out.print(f"{name:<10} {line}", soft_wrap=True)
    print_notes(forecast.notes)
