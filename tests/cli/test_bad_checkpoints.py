"""Bad inputs on the command line: exit code, one error with advice, and no files left."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import convert
from t5g2convert.checkpoint.families.config_section import KNOWN_MODELS
from t5g2convert.cli.demo import build_demo_source
from tests.cli.commandline import CommandLine, Result

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
SHARDS: Final = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")
UP: Final = "language_model.model.layers.0.mlp.up_proj.weight"
EMBEDDING: Final = "language_model.model.embed_tokens.weight"

Damage = Callable[[Path], object]
Fields = dict[str, Any]


@pytest.fixture
def t5g2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys)


@pytest.fixture(scope="module")
def sound_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a conversion of the undamaged demo source; do not change it."""
    folder = tmp_path_factory.mktemp("sound")
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "out", flush=False)
    return folder / "out"


def commands(source: Path, output: Path, sound: Path) -> dict[str, list[str | Path]]:
    """Return every command that reads a source."""
    text = source.parent / "text.txt"
    text.write_text("a text to be read")
    return {
        "inspect": ["inspect", source],
        "plan": ["plan", source],
        "check": ["mappings", "check", "gemma3", "--against", source],
        "convert": ["convert", source, output],
        "convert-verify": ["convert", source, output, "--verify"],
        "verify": ["verify", sound, "--source", source],
        "compare": ["compare", source, sound, "--text", text],
    }


ALL: Final = ("inspect", "plan", "check", "convert", "convert-verify", "verify", "compare")
JUDGING: Final = ("plan", "check", "convert", "convert-verify", "verify")
"""The commands that refuse what `inspect` describes."""


def refusals(
    t5g2: CommandLine, source: Path, sound: Path, names: tuple[str, ...] | None = None, *, lines: int | None = 1
) -> list[Result]:
    """Run all commands on a bad source; each must exit with code 3 and change nothing."""
    output = source.parent / "out"
    before = {path.name: path.read_bytes() for path in sound.iterdir()}
    results = []
    chosen = commands(source, output, sound)
    there = sorted(path.name for path in source.parent.iterdir())
    for name in names or chosen:
        result = t5g2(*chosen[name])
        assert result.code == 3, (name, result)
        assert result.out == "", name
        assert result.err.startswith("t5g2: "), name
        assert lines is None or result.err.count("\n") == lines, (name, result.err)
        assert sorted(path.name for path in source.parent.iterdir()) == there, name
        results.append(result)
    assert {path.name: path.read_bytes() for path in sound.iterdir()} == before
    return results


def read_single(source: Path) -> tuple[dict[str, Fields], bytes]:
    data = (source / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_single(source: Path, header: dict[str, Fields], body: bytes) -> None:
    text = json.dumps(header).encode()
    (source / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + body)


def edited(change: Callable[[dict[str, Fields]], object], tail: bytes = b"", cut: int = 0) -> Damage:
    """Return damage to the header, and perhaps the end, of the only weight file."""

    def damage(source: Path) -> None:
        header, body = read_single(source)
        change(header)
        write_single(source, header, body[: len(body) - cut] + tail)

    return damage


def replaced(content: bytes) -> Damage:
    return lambda source: (source / SINGLE).write_bytes(content)


def entry(name: str, **fields: Any) -> Callable[[dict[str, Fields]], object]:
    return lambda header: header[name].update(fields)


def shifted(by: int) -> Callable[[dict[str, Fields]], None]:
    def change(header: dict[str, Fields]) -> None:
        header[UP]["data_offsets"] = [at + by for at in header[UP]["data_offsets"]]

    return change


DEEP: Final = b"[" * 200_000
BROKEN: Final[dict[str, tuple[Damage, str]]] = {
    "empty": (replaced(b""), "is 0 bytes long, too short"),
    "seven-bytes": (replaced(b"1234567"), "is 7 bytes long, too short"),
    "length-over-file": (replaced(struct.pack("<Q", 500) + b"{}"), "expected 508 bytes for the header, found 10"),
    "over-100-MB": (replaced(struct.pack("<Q", 100_000_001) + b"{}"), "a header of 100000001 bytes"),
    "2-to-63": (replaced(struct.pack("<Q", 2**63) + b"{}"), f"a header of {2**63} bytes"),
    "bad-json": (replaced(struct.pack("<Q", 5) + b'{"a":'), "the header is not valid JSON"),
    "bad-utf8": (replaced(struct.pack("<Q", 9) + b'{"\xff": 1} '), "the header is not valid JSON"),
    "json-list": (replaced(struct.pack("<Q", 2) + b"[]"), "the header is a JSON list, expected an object"),
    "deep": (replaced(struct.pack("<Q", len(DEEP)) + DEEP), "the header is nested too deeply"),
    "overlap": (edited(shifted(-2)), "overlaps the tensor before it"),
    "hole": (edited(shifted(2)), "leaves a gap before it"),
    "trailing": (edited(lambda header: None, tail=b"123"), "3 bytes follow the last tensor, expected none"),
    "truncated": (edited(lambda header: None, cut=10), "(download again)"),
    "past-the-end": (edited(lambda header: None, cut=100_000), "(download again)"),
    "shape-against-offsets": (edited(entry(UP, shape=[96, 47])), f"'{UP}': BF16 of shape [96, 47] takes 9024 bytes"),
    "overflow": (edited(entry(UP, shape=[2**62, 2**62])), f"'{UP}'"),
    "past-64-bits": (edited(entry(UP, shape=[2**64, 0])), "does not fit into 64 bits"),
    "negative-shape": (edited(entry(UP, shape=[-96, 48])), "is not a list of sizes"),
    "unknown-dtype": (edited(entry(UP, dtype="BF17")), "unknown dtype 'BF17'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_I1_a_broken_file_is_refused_by_every_command(
    case: str, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    damage, says = BROKEN[case]
    damage(demo_source)
    for result in refusals(t5g2, demo_source, sound_output):
        assert f"{demo_source / SINGLE}: " in result.err
        assert says in result.err


def test_I1_a_truncated_download_reads_as_one(t5g2: CommandLine, demo_source: Path, sound_output: Path) -> None:
    size = (demo_source / SINGLE).stat().st_size
    os.truncate(demo_source / SINGLE, size - 10)
    for result in refusals(t5g2, demo_source, sound_output):
        assert result.err.endswith(f"{SINGLE}: expected {size} bytes, found {size - 10} (download again)\n")


def twice(source: Path) -> None:
    header, body = read_single(source)
    text = json.dumps(header)
    text = text[:-1] + f', "{UP}": {json.dumps(header[UP])}}}'
    (source / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)


LFS: Final = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 490610\n"
NOT_WEIGHTS: Final[dict[str, tuple[Damage, list[str]]]] = {
    "twice": (twice, [f"names '{UP}' twice"]),
    "git-lfs": (replaced(LFS), ["is a git-lfs pointer", "(run: git lfs pull)"]),
    "html": (replaced(b"<!DOCTYPE html><html>401</html>"), ["is an HTML page", "(download the file again)"]),
}


@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_I2_every_command_names_what_replaces_the_weights(
    case: str, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    damage, says = NOT_WEIGHTS[case]
    damage(demo_source)
    for result in refusals(t5g2, demo_source, sound_output):
        assert str(demo_source / SINGLE) in result.err
        assert [words for words in says if words not in result.err] == []


def in_two_shards(source: Path) -> dict[str, str]:
    """Split the only file into two, write the index, and return it."""
    header, body = read_single(source)
    header.pop("__metadata__")
    names = sorted(header, key=lambda name: header[name]["data_offsets"][0])
    index: dict[str, str] = {}
    for shard, part in zip(SHARDS, (names[:10], names[10:]), strict=True):
        first = header[part[0]]["data_offsets"][0]
        fields = {
            name: {**header[name], "data_offsets": [at - first for at in header[name]["data_offsets"]]} for name in part
        }
        write_single(source, fields, body[first : header[part[-1]]["data_offsets"][1]])
        (source / SINGLE).rename(source / shard)
        index |= dict.fromkeys(part, shard)
    write_index(source, index)
    return index


def write_index(source: Path, index: dict[str, Any]) -> None:
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def stale_index(source: Path, index: dict[str, str]) -> None:
    write_index(source, {**{name: shard for name, shard in index.items() if name != UP}, "gone.weight": SHARDS[0]})


def single_next_to_shards(source: Path, index: dict[str, str]) -> None:
    shutil.copy(source / SHARDS[0], source / SINGLE)


def same_in_two(source: Path, index: dict[str, str]) -> None:
    shutil.copy(source / SHARDS[0], source / SHARDS[1])


DISAGREEING: Final[dict[str, tuple[Callable[[Path, dict[str, str]], object], list[str]]]] = {
    "missing-shard": (lambda source, index: (source / SHARDS[1]).unlink(), [f"{SHARDS[1]}: is missing"]),
    "both-directions": (stale_index, ["no shard holds", "1 tensor(s): gone.weight", "the index lacks", UP]),
    "two-shards": (same_in_two, [SHARDS[0], SHARDS[1], "is in"]),
    "single-and-index": (single_next_to_shards, [SINGLE, SHARDS[0], "(remove the outdated ones)"]),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_I3_files_that_disagree_are_refused_by_every_command(
    case: str, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    damage, says = DISAGREEING[case]
    damage(demo_source, in_two_shards(demo_source))
    for result in refusals(t5g2, demo_source, sound_output):
        assert str(demo_source) in result.err
        assert [words for words in says if words not in result.err] == []


@pytest.mark.parametrize("target", ["../../x", "/etc/passwd", "..\\x", "x\0y", 3, "linked/x.safetensors"], ids=ascii)
def test_I4_an_index_that_leaves_the_folder_is_refused_by_every_command(
    target: Any, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    index = in_two_shards(demo_source)
    (demo_source / "linked").symlink_to("/tmp")
    write_index(demo_source, {**index, UP: target})
    for result in refusals(t5g2, demo_source, sound_output):
        assert f"{demo_source / INDEX}: " in result.err
        assert "expected the name of a file next to the index" in result.err


@pytest.mark.parametrize("layers", [7, 9])
def test_I5_a_depth_that_is_not_the_tensors_is_refused_by_every_command(
    layers: int, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    set_text(demo_source, num_hidden_layers=layers)
    what = "unused" if layers == 7 else "missing"
    for result in refusals(t5g2, demo_source, sound_output, JUDGING, lines=14):
        assert f": 13 {what}\n" in result.err
        assert f"  {what}: language_model.model.layers.{min(layers, 8)}.mlp.up_proj.weight" in result.err


def set_text(source: Path, **values: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= values
    (source / "config.json").write_text(json.dumps(config))


def test_I6_an_untied_head_is_refused_by_every_command(
    t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    header, body = read_single(demo_source)
    start, end = header[EMBEDDING]["data_offsets"]
    size = len(body)
    header["lm_head.weight"] = {**header[EMBEDDING], "data_offsets": [size, size + end - start]}
    write_single(demo_source, header, body + body[start : end - 1] + b"\x41")
    for result in refusals(t5g2, demo_source, sound_output, ("convert", "convert-verify")):
        assert "tensor lm_head.weight: differs from language_model.model.embed_tokens.weight at [" in result.err
        assert "untied" in result.err
    write_single(demo_source, header, body + body[start:end])
    result = t5g2("convert", demo_source, demo_source.parent / "tied", "--verify")
    assert result.code == 0
    assert "note: lm_head.weight is dropped: " in result.err


KINDS: Final = {
    "lora_A": ("LoRA", "merge", "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"),
    "SCB": ("quantised", "dequantise", "language_model.model.layers.0.mlp.up_proj.SCB"),
    "qweight": ("quantised", "dequantise", "language_model.model.layers.0.mlp.up_proj.qweight"),
    "_scale_inv": ("quantised", "dequantise", "language_model.model.layers.0.mlp.up_proj.weight_scale_inv"),
    "absmax": ("quantised", "dequantise", "language_model.model.layers.0.mlp.up_proj.weight.absmax"),
    "_orig_mod": ("torch.compile", "unwrapped", "_orig_mod.language_model.model.norm.weight"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_I7_every_command_names_what_was_done_to_a_checkpoint(
    kind: str, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    what, first, name = KINDS[kind]
    header, body = read_single(demo_source)
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    write_single(demo_source, header, body + bytes(4))
    for result in refusals(t5g2, demo_source, sound_output, JUDGING, lines=2):
        line = result.err.splitlines()[0]
        assert [words for words in (name, what, first) if words not in line] == []


def test_I7_a_fully_compiled_checkpoint_is_recognized(t5g2: CommandLine, demo_source: Path, sound_output: Path) -> None:
    header, body = read_single(demo_source)
    header.pop("__metadata__")
    write_single(demo_source, {f"_orig_mod.{name}": fields for name, fields in header.items()}, body)
    for result in refusals(t5g2, demo_source, sound_output, ("inspect", *JUDGING)):
        assert "torch.compile" in result.err
        assert "unwrapped" in result.err


@pytest.mark.parametrize("model_type", sorted(KNOWN_MODELS.keys() - {"gemma2"}))
def test_I10_every_command_names_another_family(
    model_type: str, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    config = json.loads((demo_source / "config.json").read_text()) | {"model_type": model_type}
    (demo_source / "config.json").write_text(json.dumps(config))
    # An encoder-decoder can be inspected; this one is not, and gets another message.
    encoder_decoder = model_type.startswith(("t5gemma", "t5g2"))
    names = [name for name in ALL if name != "check" and not (name == "inspect" and encoder_decoder)]
    for result in refusals(t5g2, demo_source, sound_output, tuple(names)):
        assert f"model_type '{model_type}' ({KNOWN_MODELS[model_type]})" in result.err
        assert f"{demo_source / 'config.json'}: " in result.err


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3n", "gemma4", "t5gemma2"])
def test_I10_another_family_is_named_with_a_given_mapping(
    model_type: str, t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    config = json.loads((demo_source / "config.json").read_text()) | {"model_type": model_type}
    (demo_source / "config.json").write_text(json.dumps(config))
    for arguments in (
        ["plan", demo_source, "--mapping", "gemma3"],
        ["convert", demo_source, tmp_path / "out", "--mapping", "gemma3"],
        ["mappings", "check", "gemma3", "--against", demo_source],
    ):
        result = t5g2(*arguments)
        assert result.code == 4, "the map is not for this model"
        assert result.err.count("\n") == 1
        assert KNOWN_MODELS[model_type] in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "config.json: is missing"),
        (lambda path: path.write_text("{"), "config.json: is not valid JSON"),
        (lambda path: path.write_text("[]"), "config.json: is a JSON list, expected an object"),
        (lambda path: path.write_text("{}"), "config.json: a config without model_type"),
    ],
    ids=["missing", "no-json", "list", "empty"],
)
def test_I10_an_invalid_config_is_refused_by_every_command(
    damage: Damage, says: str, t5g2: CommandLine, demo_source: Path, sound_output: Path
) -> None:
    damage(demo_source / "config.json")
    for result in refusals(t5g2, demo_source, sound_output, tuple(name for name in ALL if name != "check")):
        assert says in result.err


class Payload:
    """Create a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


PICKLES: Final = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin", "optimizer.bin")


@pytest.mark.slow
def test_I11_no_command_unpickles_anything(
    t5g2: CommandLine, demo_source: Path, sound_output: Path, tmp_path: Path
) -> None:
    canary, proof = tmp_path / "canary", tmp_path / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.is_dir(), "the payload works"
    proof.rmdir()
    source = shutil.copytree(demo_source, tmp_path / "only-pickles")
    (source / SINGLE).unlink()
    target = shutil.copytree(sound_output, tmp_path / "pickled-output")
    (target / SINGLE).unlink()
    for folder in (source, target, demo_source):
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    for result in refusals(t5g2, source, sound_output):
        assert "never unpickled" in result.err
        assert "(load it in transformers and call save_pretrained)" in result.err
    text = tmp_path / "text.txt"
    assert t5g2("generate", target, "--prompt", "x").code == 3
    assert t5g2("compare", demo_source, target, "--text", text).code == 3
    assert t5g2("verify", target, "--source", demo_source).code == 6
    # Next to safetensors they are ignored and not copied.
    for arguments in commands(demo_source, tmp_path / "out", sound_output).values():
        if arguments[0] != "convert":
            assert t5g2(*arguments).code == 0
    assert t5g2("convert", demo_source, tmp_path / "out", "--verify").code == 0
    assert t5g2("generate", tmp_path / "out", "--prompt", "x", "--max-new-tokens", "2").code == 0
    assert not set(PICKLES) & {path.name for path in (tmp_path / "out").iterdir()}
    # As weights, and as every other input file.
    for name in (SINGLE, "config.json", "tokenizer.json"):
        (demo_source / name).write_bytes(pickle.dumps(Payload(canary)))
        t5g2("convert", demo_source, tmp_path / "again", "--verify")
        t5g2("generate", demo_source, "--prompt", "x")
    assert not canary.exists()
