"""`t5g2 probe-sentinels`."""

from typing import TYPE_CHECKING, Annotated

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes, table
from t5g2convert.errors import VerificationError

if TYPE_CHECKING:
    from t5g2convert.adaptation.sentinel_probe import Probe

SHOWN_RANGES = 40
"""Maximum number of ranges to print; `--json` lists all."""


def probe_sentinels(
    gemma3: Annotated[str, typer.Argument(help="A Gemma 3 folder, or a model on the Hub: org/name[@revision].")],
    t5gemma2: Annotated[str, typer.Argument(help="A T5Gemma 2 trained from it: a folder or model.")],
    factor: Annotated[
        float,
        typer.Option(
            "--factor",
            help="A row moved if its distance exceeds this multiple of the 10% quantile, and the next gap. Not "
            "established; our default.",
            min=0,
        ),
    ] = 10.0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the unused rows of the embedding that moved between two checkpoints: the sentinels of a training.

    Exits with 6 where the distances do not tell used rows from unused ones, as after training a small vocabulary.
    """
    from t5g2convert.adaptation.sentinel_probe import probe

    found = probe(gemma3, t5gemma2, factor=factor)
    if as_json:
        emit_json(found.to_json())
    else:
        _print(found)
    if not found.premise.holds:
        if as_json:
            raise typer.Exit(VerificationError.exit_code)
        raise VerificationError(f"no answer: {found.premise.reason}", where=t5gemma2)


def _print(found: "Probe") -> None:
    out = console()
    moved = "" if found.moved is None else f", {found.moved:,} moved"
    lines = [
        f"{found.compared:,} of {found.rows:,} rows compared; {found.equal:,} are exactly equal{moved}",
        f"distance of a row: 10% quantile {found.still:.3g}, median {found.median:.3g}, largest "
        f"{found.largest:.3g}; moved is more than {found.threshold:.3g}",
    ]
    premise = found.premise
    if premise.ordinary:
        lines.append(
            f"text: {premise.text_rows:,} of {premise.ordinary:,} rows of ordinary tokens moved most, median "
            f"{premise.text:.3g}"
        )
    if premise.holds:
        lines.append(f"used rows differ from unused ones: {premise.reason}")
    for line in lines:
        out.print(line, soft_wrap=True)
    if found.ranges:
        shown = table("ids that moved", "count", "median distance", "largest", "known as", right=(1, 2, 3))
        for item in found.ranges[:SHOWN_RANGES]:
            ids = str(item.last) if item.count == 1 else f"{item.last} down to {item.first}"
            shown.add_row(ids, f"{item.count:,}", f"{item.median:.3g}", f"{item.largest:.3g}", item.known or "")
        out.print(shown)
    if len(found.ranges) > SHOWN_RANGES:
        out.print(f"and {len(found.ranges) - SHOWN_RANGES:,} more ranges; --json lists all")
    print_notes(found.notes)
