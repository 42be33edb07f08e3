"""`t5g2 demo`: the whole tool on a tiny model, without network."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from t5g2convert.cli.console import DebugOption, console, parameter_table, size_text
from t5g2convert.cli.verify import print_report, require_passed
from t5g2convert.errors import OutputError
from t5g2convert.printable import printable

DEMO_CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "dtype": "bfloat16",
    "boi_token_index": 253,
    "eoi_token_index": 254,
    "image_token_index": 255,
    "eos_token_id": 1,
    "mm_tokens_per_image": 4,
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 256,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "max_position_embeddings": 512,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
"""A Gemma 3 with images: seven sliding layers and one full layer, and two layers of SigLIP."""


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", help="Keep both models in this folder.", show_default="a temporary one")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Build a tiny Gemma 3 with images, convert it, verify it, generate with it. Takes seconds, without network."""
    from tempfile import TemporaryDirectory

    from t5g2convert.checkpoint.sources import Folders
    from t5g2convert.cli.plan import draw_plan
    from t5g2convert.conversion.convert import execute
    from t5g2convert.conversion.output.path_rules import check_target
    from t5g2convert.conversion.plan.builder import plan as make_plan
    from t5g2convert.mapping.inspection import inspect
    from t5g2convert.parity.verify import verify
    from t5g2convert.reference.generation.generator import generate

    screen = console()
    with ExitStack() as stack:
        folder = out if out is not None else Path(stack.enter_context(TemporaryDirectory(prefix="t5g2-demo-")))
        source, output = folder / "gemma3-tiny", folder / "t5gemma2-tiny"
        for kept in (source, output):
            _check_absent(kept)
        check_target(output, source, overwrite=False)
        build_demo_source(source)

        screen.print("1  A tiny multimodal Gemma 3 with seeded random weights", style="bold")
        parent = inspect(source)
        screen.print(f"   {len(parent.tensors)} tensors, {size_text(sum(parent.files.values()))}\n")
        screen.print(parameter_table(parent.parameters, title="Gemma 3"))

        plan = make_plan(source)
        screen.print("2  Which tensors go where", style="bold")
        screen.print("   the source is read once; tensors used by both stacks are written twice\n")
        screen.print(draw_plan(plan), soft_wrap=True)

        execute(plan, Folders(source), output)
        screen.print("3  The result", style="bold")
        child = inspect(output)
        screen.print(f"   {child.family}: {len(child.tensors)} tensors\n")
        screen.print(parameter_table(child.parameters, title="T5Gemma 2"))

        screen.print("4  The proof", style="bold")
        screen.print("   both models run side by side; decoder and encoder must match Gemma 3\n")
        report = verify(output, source)
        print_report(report, screen)
        require_passed(report, output)

        screen.print("5  It generates", style="bold")
        screen.print("   nonsense: the weights are random, and a new conversion has not learned to use its encoder\n")
        written = "".join(generate(output, "an encoder-decoder", max_new_tokens=24))
        screen.print(f"   {printable(written)}\n", soft_wrap=True)
        if out is not None:
            screen.print(f"kept in {printable(str(out))}", soft_wrap=True)
        screen.print("Your own:  t5g2 convert PATH/TO/gemma-3 OUTPUT", style="bold")


def _check_absent(folder: Path) -> None:
    """Refuse to write into a folder that is not empty.

    Raises:
        OutputError: The path is a folder that is not empty, a link, or not a folder.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise OutputError("exists and is not an empty folder", where=folder, hint="choose another folder for --out")


def build_demo_source(folder: Path) -> None:
    """Write the tiny Gemma 3 and its tokenizer.

    Raises:
        OutputError: The folder cannot be written.
    """
    from t5g2convert.mapping.library import find_map
    from t5g2convert.mapping.synthetic import write_synthetic_source

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_synthetic_source(folder, find_map("gemma3").map, DEMO_CONFIG, seed=0)
        (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(), ensure_ascii=False, indent=1) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=folder) from error


_SPECIAL: Final = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 253: "<start_of_image>", 254: "<end_of_image>",
                   255: "<image_soft_token>"}  # fmt: skip

_TOKENIZER_CONFIG: Final = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def _tokenizer() -> dict[str, Any]:
    """Return a BPE tokenizer of single characters with Gemma's space symbol, its special tokens and exactly 256 ids."""
    vocabulary = {token: number for number, token in _SPECIAL.items()}
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    free = [number for number in range(256) if number not in _SPECIAL]
    names = characters + [f"<unused{number}>" for number in range(len(free) - len(characters))]
    vocabulary |= dict(zip(names, free, strict=True))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in _SPECIAL.items()
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [],
        },
    }
