"""Hints that name a command or option are listed here, name existing ones, and are followed where quick.

A new hint of that kind fails `test_every_hint_is_listed` until it has a line in `HINTS`; one that can be followed in
this process gets a test below.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest
from safetensors.torch import load_file, save_file

import t5g2convert
from t5g2convert.cli.command import load
from t5g2convert.cli.main import COMMANDS
from tests.cli.commandline import CommandLine, Result
from tests.conftest import TwinFolder
from tests.models.overflowing import make_overflow

PACKAGE: Final = Path(t5g2convert.__file__).parent
PLANNED: Final = ("plan", "convert")
WRITTEN: Final = ("convert", "extract")

HINTS: Final[dict[str, tuple[str, ...]]] = {
    "--no-export leaves the checkpoints alone": ("adapt",),
    "--last {} takes all": ("average",),
    "pass the trained model with --model": ("average",),
    "pass the trained T5Gemma 2 with --model": ("average",),
    "move it away; or t5g2 average {} OUTPUT --last 1 writes the model elsewhere": ("average",),
    "t5g2 verify {} --source {} shows how far it moved": ("verify",),
    "pass the adapter with --adapter": ("verify",),
    "t5g2 merge MODEL RUN/adapter OUTPUT makes a model of it": ("merge",),
    "choose another folder for --out": ("demo",),
    "--split takes one of {}": ("pack",),
    "--subset takes one of {}": ("pack",),
    "pass such a folder, without t5g2.json, and the T5Gemma 2 it was trained from as --source": ("verify",),
    "--source is the T5Gemma 2 that was trained; use --frozen for parts that were not": ("verify",),
    "for a model that was trained elsewhere, pass the T5Gemma 2 it was trained from with --source": ("card", "upload"),
    "pass the T5Gemma 2 it was trained from as --source": ("card", "upload"),
    "extract its encoder with t5g2 extract START ENCODER --part encoder, and pass ENCODER": ("extract",),
    "omit --source": ("card", "upload"),
    "omit --devices and --nodes, or make them match": ("adapt",),
    "t5g2 convert --rope-scaling {} makes one": ("convert",),
    "t5g2 pack writes one": ("pack",),
    "pass --recompute none": ("adapt",),
    "pass --attention dense": ("adapt",),
    "pass --no-encoder-bos": ("adapt",),
    "pack more text, or reduce --encoder-length and --decoder-length": ("adapt",),
    "omit --image-every": ("adapt",),
    "t5g2 adapt trains on texts": ("adapt",),
    "pass --eval DATA or --eval-pairs N": ("finetune",),
    "use --eval and --eval-samples of the first start, or move the file away": ("adapt", "finetune"),
    "give the task a longer mean_span or a lower rate, or use --documents packed": ("adapt",),
    "remove it: t5g2 adapt --resume then continues from the checkpoint before": ("adapt",),
    "--resume continues a run that stopped": ("adapt",),
    "--skip-nonfinite N makes no update in up to N such steps; --resume --skip-steps {}-{} passes over its data; with "
    "--resume --change a lower --lr holds from the newest checkpoint on, and with --from STEP from an earlier one": (
        "adapt",
    ),
    "--from STEP goes back to an earlier checkpoint": ("adapt",),
    "reduce --workers; {}": ("adapt",),
    "{}, or --devices 1": ("adapt",),
    "--change lets it hold from the newest checkpoint on": ("adapt",),
    "pack again with fewer --workers": ("pack",),
    "pack again without --resume": ("pack",),
    "continue with the same, or pack again without --resume": ("pack",),
    "what was packed is kept; --resume continues it with the same options and any --skip-bad": ("pack",),
    "--skip-bad 1 packs the others": ("pack",),
    "--truncate skip leaves such pairs out, --truncate input cuts inputs": ("pack",),
    "mend them, or skip up to N with --skip-bad N{}": ("pack",),
    "repeat the command with --resume to continue from the last checkpoint, if any": ("adapt",),
    "--projector zeros or aligned": PLANNED,
    "use --projector zeros, which does not need a common vocabulary": PLANNED,
    "run again with --debug and report the output": ("*",),
    "see {} --help": ("*",),
    "convert a Gemma 3 with t5g2 convert first": ("convert",),
    "pass the decoder's parent with --decoder-from": PLANNED,
    "pass the donor of the tower with --vision-from": PLANNED,
    "use --rope-scaling and --sliding-window instead": PLANNED,
    "try a larger --ridge, for example {}": PLANNED,
    "try --ridge 1e-6": PLANNED,
    "use a map that moves the token elsewhere (--mapping)": PLANNED,
    "--keep-rows keeps them": PLANNED,
    "save it with the tokenizers library, or use a map that moves the token elsewhere (--mapping)": PLANNED,
    "--overwrite replaces it": (*WRITTEN, "average", "merge"),
    "choose another folder; --overwrite replaces only an output of t5g2": (*WRITTEN, "average", "merge", "pack"),
    "finished shards are kept; continue with --resume": ("convert",),
    "--allow-nonfinite copies them unchanged": WRITTEN,
    "to compare it with a Gemma 3, use t5g2 compare": ("compare",),
    "t5g2 upload {} {}": ("upload",),
    " --source-card {}": ("upload",),
    # huggingface_hub's own command.
    "HF_HUB_OFFLINE=0 hf download {} {} --revision {}": (),
    "fix them, or use --card replace": ("upload",),
    "use --card replace for a new card, or --card keep to leave it": ("upload",),
    "delete them on the Hub, or choose another name or --revision": ("upload",),
    "compute with --dtype float32": ("verify", "generate", "compare"),
    "pass --prompt TEXT or --prompts FILE": ("generate",),
    "pass the text with --decoder-prompt": ("generate",),
    "add --temperature 1 to sample": ("generate",),
    "omit --chat": ("generate",),
    "omit --chat or --image": ("generate",),
}
"""By its text, {} for what is filled in, the commands that end with it, or that it names; * is every command."""

OPTION: Final = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMAND: Final = re.compile(r"\bt5g2 ([a-z]+)")


def texts(node: ast.expr) -> Iterator[str]:
    """Return the texts that an expression may evaluate to."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from (text for branch in (node.body, node.orelse) for text in texts(branch))
    elif isinstance(node, ast.BoolOp):
        yield from (text for value in node.values for text in texts(value))
    elif isinstance(node, ast.BinOp):
        yield from (text for side in (node.left, node.right) for text in texts(side))
    elif isinstance(node, ast.Tuple):
        yield from (text for value in node.elts for text in texts(value))


def is_hint(name: str) -> bool:
    return name in ("hint", "advice", "again") or name.endswith("HINT")


def hints() -> dict[str, str]:
    """Return every hint that names a command or option, with its module."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            given: list[ast.expr] = []
            if isinstance(node, ast.Call):
                given = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [getattr(target, "id", getattr(target, "attr", "")) for target in targets]
                given = [node.value] * any(map(is_hint, names)) if node.value is not None else []
            for text in (text for value in given for text in texts(value)):
                if OPTION.search(text) or COMMAND.search(text):
                    found[text] = str(path.relative_to(PACKAGE))
    return found


def commands() -> dict[str, click.Command]:
    return {name: load(name) for name in COMMANDS}


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def test_every_hint_is_listed() -> None:
    assert {text: module for text, module in hints().items() if text not in HINTS} == {}


def test_every_listed_hint_exists() -> None:
    assert set(HINTS) - set(hints()) == set()


@pytest.mark.parametrize("text", HINTS)
def test_hints_name_existing_commands_and_options(text: str) -> None:
    known = commands()
    assert set(COMMAND.findall(text)) <= set(known)
    which = [name for name in known if name != "mappings"] if HINTS[text] == ("*",) else HINTS[text]
    for name in which:
        assert set(OPTION.findall(text)) <= options(known[name]), name


# Following hints: a command fails with a hint, and succeeds when run as the hint says.


def hinted(result: Result, hint: str) -> None:
    assert result.code not in (0, 1), result
    assert hint in result.err
    assert any(re.fullmatch(re.escape(text).replace(r"\{\}", ".+"), hint) for text in HINTS)


def followed(result: Result) -> None:
    assert result.code == 0, result.err


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_overwrite(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    command = ("convert", demo_source, tmp_path / "out")
    followed(t5g2(*command))
    hinted(t5g2(*command), "--overwrite replaces it")
    followed(t5g2(*command, "--overwrite"))


@pytest.mark.parametrize("command", WRITTEN)
def test_allow_nonfinite(command: str, t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    source, part = demo_source, ()
    if command == "extract":
        followed(t5g2("convert", demo_source, tmp_path / "whole"))
        source, part = tmp_path / "whole", ("--part", "encoder")  # type: ignore[assignment]
    with_nan(source)
    hinted(t5g2(command, source, tmp_path / "out", *part), "--allow-nonfinite copies them unchanged")
    followed(t5g2(command, source, tmp_path / "out", *part, "--allow-nonfinite"))


def test_drop_heads(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    path = demo_source / "model.safetensors"
    tensors = load_file(path)
    tensors["v_head.summary.weight"] = tensors["language_model.model.norm.weight"][None].clone()
    save_file(tensors, path, {"format": "pt"})
    refused = t5g2("plan", demo_source)
    assert (refused.code, "--drop-heads drops it" in refused.err) == (3, True)
    followed(t5g2("plan", demo_source, "--drop-heads"))
    followed(t5g2("convert", demo_source, tmp_path / "out", "--drop-heads", "--verify"))


def test_keep_rows(t5g2: CommandLine, twin_folder: TwinFolder) -> None:
    """A note: rows unknown to the tokenizer are cut if they look like random fill."""
    noted = t5g2("plan", twin_folder("images-with-fill"))
    assert (noted.code, "--keep-rows keeps them" in noted.err) == (0, True)
    kept = t5g2("plan", twin_folder("images-with-fill"), "--keep-rows")
    followed(kept)
    assert "all 262208 rows of the embedding table are kept" in kept.err


def test_projector(t5g2: CommandLine, twin_folder: TwinFolder) -> None:
    command = ("plan", twin_folder("text-8"), "--vision-from", twin_folder("donor-wide"))
    hinted(t5g2(*command, "--projector", "copy"), "--projector zeros or aligned")
    for projector in ("zeros", "aligned"):
        followed(t5g2(*command, "--projector", projector))


def test_ridge(t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path) -> None:
    """A donor with two equal columns in its embeddings determines no map."""
    shutil.copytree(twin_folder("donor-wide"), tmp_path / "donor")
    tensors = load_file(tmp_path / "donor/model.safetensors")
    table = tensors["language_model.model.embed_tokens.weight"]
    table[:, 1] = table[:, 0]
    save_file(tensors, tmp_path / "donor/model.safetensors", {"format": "pt"})
    command = ("convert", twin_folder("text-8"), tmp_path / "out", "--vision-from", tmp_path / "donor")
    command += ("--projector", "aligned")  # type: ignore[assignment]
    hinted(t5g2(*command), "try --ridge 1e-6")
    followed(t5g2(*command, "--ridge", "1e-6"))


def test_another_parent_and_a_donor(t5g2: CommandLine, twin_folder: TwinFolder) -> None:
    command = ("plan", twin_folder("text-8"))
    hinted(t5g2(*command, "--embedding-from", "decoder-from"), "pass the decoder's parent with --decoder-from")
    other = ("--decoder-from", twin_folder("text-unlike-7"))
    followed(t5g2(*command, "--embedding-from", "decoder-from", *other))
    hinted(t5g2(*command, "--projector", "zeros"), "pass the donor of the tower with --vision-from")
    followed(t5g2(*command, "--projector", "zeros", "--vision-from", twin_folder("donor-wide")))


def test_preset(t5g2: CommandLine, twin_folder: TwinFolder) -> None:
    command = ("plan", twin_folder("text-8"))
    hinted(t5g2(*command, "--preset", "t5gemma-2-270m-270m"), "use --rope-scaling and --sliding-window instead")
    followed(t5g2(*command, "--rope-scaling", "linear:8", "--sliding-window", "9"))


@pytest.mark.sampled
@pytest.mark.parametrize("command", ["verify", "generate", "compare"])
def test_dtype(command: str, t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    source = make_overflow(demo_source, tmp_path / "source")
    followed(t5g2("convert", source, tmp_path / "out", "--dtype", "float16"))
    (tmp_path / "text").write_text("one two three four five six seven eight nine ten")
    arguments = {
        "verify": (tmp_path / "out", "--source", source),
        "generate": (tmp_path / "out", "--prompt", "Tell me"),
        "compare": (source, tmp_path / "out", "--text", tmp_path / "text"),
    }[command]
    hinted(t5g2(command, *arguments), "compute with --dtype float32")
    followed(t5g2(command, *arguments, "--dtype", "float32"))


def test_verify_is_given_the_other_parent_or_not(t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path) -> None:
    """Both hints contain the whole option, so the test follows them verbatim."""
    source, other = twin_folder("text-8"), ("--decoder-from", twin_folder("text-unlike-7"))
    followed(t5g2("convert", source, tmp_path / "pair", *other))
    followed(t5g2("convert", source, tmp_path / "single"))
    refused = t5g2("verify", tmp_path / "pair", "--source", source)
    assert (refused.code, "pass that checkpoint with --decoder-from" in refused.err) == (2, True)
    followed(t5g2("verify", tmp_path / "pair", "--source", source, *other))
    refused = t5g2("verify", tmp_path / "single", "--source", source, *other)
    assert (refused.code, "omit --decoder-from" in refused.err) == (2, True)
    followed(t5g2("verify", tmp_path / "single", "--source", source))


def test_one_number_of_layers(t5g2: CommandLine, twin_folder: TwinFolder) -> None:
    command = ("plan", twin_folder("text-8"), "--decoder-layers")
    refused = t5g2(*command, "3")
    assert "first:3 for the first 3 layers, 3:4 for only this one" in refused.err
    for selection in ("first:3", "3:4"):
        followed(t5g2(*command, selection))


def test_help(t5g2: CommandLine) -> None:
    for command in commands():
        refused = t5g2(command, "--no-such-option")
        assert f"see t5g2 {command} --help" in refused.err
        followed(t5g2(command, "--help"))
