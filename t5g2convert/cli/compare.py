"""`t5g2 compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, table
from t5g2convert.cli.options import with_options
from t5g2convert.cli.verify import shown_progress
from t5g2convert.errors import VerificationError
from t5g2convert.parity.options import CompareOptions

if TYPE_CHECKING:
    from t5g2convert.parity.compare import Comparison


@with_options
def compare(
    gemma3: Annotated[str, typer.Argument(help="A Gemma 3 folder, or a model on the Hub: org/name[@revision].")],
    t5gemma2: Annotated[Path, typer.Argument(help="The fine-tuned T5Gemma 2 folder.")],
    *,
    text: Annotated[Path, typer.Option("--text", help="The text file to read, with T5GEMMA2's tokenizer.")],
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Exit 6 if the decoder's mean KL (in nats) is larger.", min=0)
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option("--min-agreement", help="Exit 6 if the decoder's top-1 agreement is smaller.", min=0, max=1),
    ] = None,
    options: CompareOptions,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how far a trained T5Gemma 2 has moved from its Gemma 3; the options make it a gate for CI."""
    from t5g2convert.parity.compare import compare as measure

    with shown_progress() as progress:
        found = measure(gemma3, t5gemma2, text, **dict(options.replace(progress=progress)))
    if as_json:
        emit_json(found.to_json())
    else:
        _print(found)
    alone = found.decoder_alone
    # `not <=` rather than `>`: NaN fails the gate too.
    failed = []
    if max_kl is not None and not alone.kl <= max_kl:
        failed.append(f"the decoder's KL is {alone.kl:.4g}, more than {max_kl:g}")
    if min_agreement is not None and not alone.agreement >= min_agreement:
        failed.append(f"the decoder's top-1 agreement is {alone.agreement:.4f}, less than {min_agreement:g}")
    if failed:
        if as_json:
            raise typer.Exit(VerificationError.exit_code)
        raise VerificationError("; ".join(failed), where=t5gemma2)


def _print(found: "Comparison") -> None:
    out = console()
    shown = table("T5Gemma 2 reads", "tokens", "KL, nats", "top-1", "perplexity", "Gemma 3's", right=(1, 2, 3, 4, 5))
    for name, reading in (
        ("the text in the decoder alone", found.decoder_alone),
        ("the first half in the encoder", found.prefix_in_encoder),
    ):
        shown.add_row(
            name,
            str(reading.tokens),
            f"{reading.kl:.4g}",
            f"{reading.agreement:.2%}",
            f"{reading.t5gemma2_perplexity:.4g}",
            f"{reading.gemma3_perplexity:.4g}",
        )
    out.print(shown)
    drifts = table("decoder alone", "largest difference", "of the largest value", right=(1, 2))
    for drift in found.drifts:
        drifts.add_row(drift.layer, f"{drift.max_abs:.3g}", f"{drift.relative:.2%}")
    out.print(drifts)
