"""`t5g2 merge`."""

from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.adaptation.merge import MergeOptions
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.cli.options import with_options
from t5g2convert.printable import printable


@with_options
def merge(
    model: Annotated[Path, typer.Argument(help="The T5Gemma 2 folder that the adapter was trained on.")],
    adapter: Annotated[
        Path, typer.Argument(help="The folder that peft saved: adapter_config.json, adapter_model.safetensors.")
    ],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    options: MergeOptions,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Merge a LoRA adapter of peft into the weights of a T5Gemma 2. Everything else is copied byte for byte."""
    from t5g2convert.adaptation.merge import merge_adapter

    done = merge_adapter(model, adapter, output, options)
    if as_json:
        emit_json(done.to_json())
        return
    out, written = console(), done.conversion
    out.print(parameter_table(written.parameters))
    ranks = f"rank {done.ranks[0]}" if len(done.ranks) == 1 else f"ranks {done.ranks[0]} to {done.ranks[-1]}"
    out.print(
        f"merged {done.targets} tensors ({ranks}) and copied {written.tensors - done.targets}, "
        f"{size_text(written.nbytes)} in {len(written.shards)} file(s), to {printable(str(written.output))}",
        soft_wrap=True,
    )
    print_notes(written.notes)
