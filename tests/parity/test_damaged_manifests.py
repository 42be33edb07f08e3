"""V2: damage with t5g2.json unchanged, false fields in it, and files that no conversion writes; nothing may pass."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import convert
from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, encode_json, read_manifest, seal
from t5g2convert.mapping.library import find_map
from t5g2convert.parity.checks.integrity import judge_integrity
from t5g2convert.parity.verify import verify
from t5g2convert.version import __version__
from tests.conftest import TwinFolder
from tests.models.twins import BY_NAME, write_twin
from tests.parity.mutations import (
    MINIMA,
    PARITIES,
    Bench,
    Document,
    MakeBench,
    Tally,
    check_of,
    close,
    departs,
    flip_sign,
    message_of,
    parent_of,
    put,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_source")]


# Naive damage


@pytest.mark.parametrize("name", ["images-8", "text-float32"])
def test_V2_any_byte_of_any_file(name: str, bench: MakeBench, without_use: None) -> None:
    made = bench(name)
    verify(made.folder, made.source, record=True)
    recorded = (made.folder / MANIFEST_FILE).read_bytes()
    assert b'"verification"' in recorded
    files, tally, chance = read_manifest(made.folder).files, Tally(), random.Random(name)
    for file, sound in {**made.sound, f"{MANIFEST_FILE} with a verification": recorded}.items():
        path = made.folder / file.split()[0]
        weights = path.suffix == ".safetensors"
        header = 8 + int.from_bytes(sound[:8], "little") if weights else 0
        for number in range(20 if weights else 9):
            # Half of the changes to a file of weights are in its header.
            at = chance.randrange(header if weights and number % 2 else len(sound))
            damaged = bytearray(sound)
            damaged[at] = (damaged[at] + chance.randrange(1, 256)) % 256
            path.write_bytes(damaged)
            report = made.judged()
            tally.add(f"{file}[{at}] = {damaged[at]}", report)
            assert path.name in message_of(check_of(report, "integrity")), (at, damaged[at])
        if path.name == MANIFEST_FILE:
            continue
        for _ in range(150):
            at, damaged = chance.randrange(len(sound)), bytearray(sound)
            damaged[at] ^= chance.randrange(1, 256)
            path.write_bytes(damaged)
            assert judge_integrity(made.folder, files).offenders == (f"{file} has a different sha256",)
        made.restore()
    assert set(tally.caught) >= {"integrity"}
    assert tally.caught["integrity"] == tally.tried
    close(tally, f"one byte, {name}")


def test_any_byte_of_a_resealed_header_or_config(bench: MakeBench, without_use: None) -> None:
    made, tally, chance = bench("text-float32"), Tally(), random.Random(8)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        sound = made.sound[file]
        start, stop = 0, len(sound)
        if file == "model.safetensors":
            start, stop = 8, 8 + int.from_bytes(sound[:8], "little")
        for _ in range(30):
            at, damaged = chance.randrange(start, stop), bytearray(sound)
            # Digits become digits, so many of the changes stay readable.
            damaged[at] = chance.choice(b"0123456789") if chr(sound[at]).isdigit() else chance.randrange(256)
            if meaning(damaged[start:stop]) == meaning(sound[start:stop]):
                continue
            (made.folder / file).write_bytes(damaged)
            tally.add(f"{file}[{at}] = {damaged[at]}", made.resealed())
    assert tally.caught["integrity"] == 0
    close(tally, "one byte, sealed")


def meaning(text: bytes) -> object:
    """Return the parsed JSON: spaces between its parts do not matter."""
    try:
        return json.loads(text)
    except ValueError:
        return bytes(text)


# The manifest, and other sources

FALSE_FIELDS: dict[str, tuple[Callable[[Document], object], str]] = {
    "total": (lambda it: it["parameters"].update(total=1), "parameters"),
    "a part": (lambda it: it["parameters"].update(decoder=it["parameters"]["decoder"] + 1), "parameters"),
    "no parameters": (lambda it: it.pop("parameters"), "parameters"),
    "dropped more": (lambda it: it["dropped"].append({"name": "lm_head.weight", "because": "tied"}), "dropped"),
    "dropped none": (lambda it: it.pop("dropped"), "dropped"),
    "source weights": (
        lambda it: it["source"]["files"]["model.safetensors"].update(sha256="c" * 64),
        "records sha256 cccc",
    ),
    "source weights unhashed": (
        lambda it: it["source"]["files"]["model.safetensors"].update(sha256=None),
        "records no sha256",
    ),
    "source weights odd": (lambda it: it["source"]["files"]["model.safetensors"].update(sha256="c0ffee"), "source"),
    "the map's sha256": (lambda it: it["mapping"].update(sha256="d" * 64), "mapping gemma3 has sha256 dddd"),
    "the map's sha256 odd": (lambda it: it["mapping"].update(sha256="bad"), "mapping"),
    "another tool": (lambda it: it["tool"].update(name="mergekit"), "tool"),
    "no version": (lambda it: it["tool"].update(version="yesterday"), "tool"),
    "another map": (lambda it: it["mapping"].update(name="mine"), "mine"),
    "no map": (lambda it: it["mapping"].pop("name"), "mapping"),
    "no notes": (lambda it: it.pop("notes"), "notes"),
    "dtype": (lambda it: it.update(dtype="float32"), "dtype"),
    "no dtype": (lambda it: it.pop("dtype"), "dtype"),
    "source size": (lambda it: it["source"]["files"]["model.safetensors"].update(bytes=1), "sizes"),
    "source config": (lambda it: it["source"]["files"]["config.json"].update(sha256="0" * 64), "config.json"),
    "source file more": (lambda it: it["source"]["files"].update({"x": {"bytes": 1, "sha256": None}}), "x"),
    "source file less": (lambda it: it["source"]["files"].pop("config.json"), "model.safetensors"),
    "source files none": (lambda it: it["source"].update(files={}), "none"),
    "no source files": (lambda it: it["source"].pop("files"), "source"),
    "a factor past all numbers": (lambda it: it["options"].update(rope_scaling="linear:1e308"), "--rope-scaling"),
    "no changes": (lambda it: it.pop("changes"), "changes"),
    "one thing more": (lambda it: it.update(quantized="int4"), "quantized"),
}


def declared(name: str, before: Any, after: Any) -> Callable[[Document], object]:
    return lambda manifest: manifest["changes"].append({"field": name, "source": before, "target": after})


FALSE_FIELDS |= {
    f"declared: {name}": (declared(name, before, after), name)
    for name, before, after in (
        ("vocab_size", 300, 299),
        ("sliding_window", 5, 6),
        ("decoder.sliding_window", 5, 6),
        ("decoder.rms_norm_eps", 1e-5, 1e-6),
        ("hidden_size", 24, 24),
        ("dtype", "bfloat16", "float16"),
        ("dtype", "float32", "bfloat16"),
        ("image_token_index", 292, 293),
        ("encoder.vision_config.image_size", 56, 57),
        ("no_such_setting", 1, 2),
    )
}


def test_false_fields_in_the_manifest(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    for label, (change, named) in FALSE_FIELDS.items():
        made.reseal(change)
        report = made.judged()
        tally.add(label, report)
        # A missing field makes the manifest invalid; a wrong one makes it false.
        check = check_of(report, "provenance" if check_of(report, "integrity").passed else "integrity")
        assert not check.passed, label
        assert named in message_of(check), label
    # A change that is both made and declared is still not what this map does with this source.
    for path, before, after in (("decoder.sliding_window", 5, 6), ("decoder.rms_norm_eps", 1e-5, 0.1)):
        made.edit("config.json", partial(put, path=tuple(path.split(".")), value=after))
        made.reseal(declared(path, before, after))
        report = made.judged()
        tally.add(f"made and declared: {path}", report)
        assert {check.name for check in report.failed} == {"provenance"}
    close(tally, "manifest")


ODD: list[Any] = [
    None, True, 3, 1.5, "x", [], {}, [3], ["x"], [None], [{}], [[]], {"a": 1}, {"config.json": None},
    {"config.json": {}}, {"files": 3}, [{"field": "dtype"}], [{"field": None, "source": 1, "target": 1}],
    [{"field": ["dtype"], "source": 1, "target": 1}], [{"field": "dtype", "source": "bfloat16", "target": "int4"}],
    [{"field": "dtype", "source": "bfloat16", "target": None}], [{"field": "dtype", "source": 1, "target": ["x"]}],
    [{"field": "a.b.c", "source": 1, "target": 2}], [{"field": "decoder.layer_types.x", "source": 1, "target": 2}],
    [{"field": "encoder.text_config", "source": 1, "target": 2}], [{"field": "", "source": 1, "target": 2}],
    [{"field": "decoder.sliding_window", "source": "x", "target": None}],
]  # fmt: skip

JUDGED = (("mapping",), ("options",), ("source",), ("source", "files"), ("dtype",), ("parameters",), ("dropped",),
          ("changes",), ("tokens",), ("files",), ("format",), ("tool",), ("tool", "name"), ("tool", "version"),
          ("mapping", "sha256"), ("source", "files", "model.safetensors", "sha256"))  # fmt: skip
"""What the manifest says that can be judged."""


@pytest.mark.parametrize("path", JUDGED, ids=".".join)
def test_odd_types_in_the_manifest_fail_a_check(path: tuple[str, ...], bench: MakeBench, without_passes: None) -> None:
    made, crashes, survivors = bench("images-8"), [], []
    sound = parent_of(read_json_object(made.folder / MANIFEST_FILE), path)[path[-1]]
    for odd in ODD:
        if odd == sound:
            continue
        made.reseal(partial(put, path=path, value=odd))
        try:
            if made.judged().passed:
                survivors.append(odd)
        except Exception as error:  # noqa: BLE001 - nothing may be raised
            crashes.append((odd, f"{type(error).__name__}: {error}"))
    assert crashes == []
    assert survivors == []


@pytest.mark.parametrize("path", [("verification",), ("source", "layout")], ids=str)
def test_odd_types_in_unread_fields_do_no_harm(path: tuple[str, ...], bench: MakeBench, without_passes: None) -> None:
    made = bench("images-8")
    for odd in ODD:
        made.reseal(partial(put, path=path, value=odd))
        made.judged()


def test_another_version_of_the_tool_may_have_had_another_map(bench: MakeBench, without_use: None) -> None:
    """A folder of an older version is checked by its bytes; a later change of the map is not its fault."""
    made = bench("images-8")

    def by(version: str) -> Callable[[Document], object]:
        return lambda it: (it["tool"].update(version=version), it["mapping"].update(sha256="d" * 64))

    for version, newer in (("0.0.9", False), ("0.1.0.dev3", False), ("99.0", True)):
        if version == __version__:
            continue
        made.reseal(by(version))
        report = made.judged()
        assert report.passed, version
        assert any(
            "not checked: that it was made with mapping gemma3 of sha256 dddddddddddddddd" in it
            for it in report.remarks
        )
        assert any("which is newer than this" in it for it in report.remarks) == newer
        made.reseal(by(version))
        # A custom map is a file and has no versions.
        own = made.folder.parent / "gemma3.yaml"
        own.write_bytes(find_map("gemma3").path.read_bytes())
        assert "has sha256 dddd" in message_of(check_of(made.judged(mapping=str(own)), "provenance"))


def test_a_conversion_without_hashes_names_no_file(twin_folder: TwinFolder, tmp_path: Path, without_use: None) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", hashing=False)
    assert verify(tmp_path / "out", twin_folder("text-8"), record=False).passed


def test_a_source_with_the_same_tensors_in_another_file_is_reported(bench: MakeBench, tmp_path: Path) -> None:
    """All tensor bytes and sizes are equal; only the file differs."""
    made, copy = bench("images-8"), tmp_path / "copy"
    shutil.copytree(made.source, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 : 8 + length] = data[8 : 8 + length].replace(b'"format":"pt"', b'"format":"np"')
    (copy / "model.safetensors").write_bytes(data)
    report = verify(made.folder, copy, record=False)
    assert {check.name for check in report.failed} == {"provenance"}
    assert "for model.safetensors of the source, but it has" in message_of(check_of(report, "provenance"))


def another(source: Path, folder: Path, tensor: str | None = None, **settings: Any) -> Path:
    """Copy a source with one tensor or some settings changed."""
    shutil.copytree(source, folder)
    if tensor is not None:
        tensors = load_file(folder / "model.safetensors")
        flip_sign(tensors[tensor])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if settings:
        config = read_json_object(folder / "config.json")
        config["text_config"].update(settings)
        (folder / "config.json").write_bytes(encode_json(config))
    return folder


def test_another_source(bench: MakeBench, tmp_path: Path) -> None:
    made = bench("images-8")
    text = "language_model.model."
    one = another(made.source, tmp_path / "one", f"{text}layers.6.mlp.gate_proj.weight")
    report = verify(made.folder, one, record=False)
    assert "layers.6.mlp.gate_proj.weight" in message_of(check_of(report, "provenance"))
    for part in ("encoder", "decoder"):
        assert departs(report, f"{part}_parity") == f"{part} layers.6 (sliding_attention), mlp.gate_proj"
    for name, setting in (("window", {"sliding_window": 6}), ("eps", {"rms_norm_eps": 0.1})):
        report = verify(made.folder, another(made.source, tmp_path / name, **setting), record=False)
        assert {"provenance", "config", *PARITIES[1:]} <= {check.name for check in report.failed}
    # The same file sizes, but other values.
    namesake = tmp_path / "namesake"
    shutil.copytree(made.source, namesake)
    tensors = load_file(namesake / "model.safetensors")
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, namesake / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    report = verify(made.folder, namesake, record=False)
    assert {"provenance", *PARITIES} <= {check.name for check in report.failed}
    write_twin(BY_NAME["images-13"], tmp_path / "deeper")
    report = verify(made.folder, tmp_path / "deeper", record=False)
    assert {"provenance", "config", *PARITIES[1:]} <= {check.name for check in report.failed}


def test_a_map_with_the_name_of_the_shipped_one(twin_folder: TwinFolder, tmp_path: Path) -> None:
    """A map named gemma3 with two rows swapped: only the parity checks can find it."""
    mapping = tmp_path / "gemma3.yaml"
    text = find_map("gemma3").path.read_text()
    one, other = (
        '"model.decoder.layers.{layer}.mlp.gate_proj.weight"',
        '"model.decoder.layers.{layer}.mlp.up_proj.weight"',
    )
    mapping.write_text(text.replace(one, "@").replace(other, one).replace("@", other))
    convert(twin_folder("images-8"), tmp_path / "out", mapping=str(mapping))
    report = verify(tmp_path / "out", twin_folder("images-8"), record=False)
    assert {check.name for check in report.failed} == {"provenance", "decoder_parity"}
    report = verify(tmp_path / "out", twin_folder("images-8"), mapping=str(mapping), record=False)
    assert {check.name for check in report.failed} == {"decoder_parity"}
    assert departs(report, "decoder_parity") == "decoder layers.0 (sliding_attention), mlp.gate_proj"


# Files


def extra_file(name: str, contents: bytes = b"{}") -> Callable[[Bench], object]:
    return lambda made: (made.folder / name).write_bytes(contents)


def head_in_extra_file(made: Bench) -> None:
    zeros = torch.zeros_like(load_file(made.folder / "model.safetensors")["model.decoder.norm.weight"])
    save_file({"model.decoder.norm.weight": zeros}, made.folder / "model-00002-of-00002.safetensors", {"format": "pt"})


def in_two(made: Bench, first: str, second: str, metadata: object = None) -> None:
    """Split the weights into two files with these names, with an index."""
    path = made.folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    weight_map = {}
    for file, part in ((first, names[: len(names) // 2]), (second, names[len(names) // 2 :])):
        save_file({name: tensors[name] for name in part}, made.folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    total = sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": metadata or {"total_parameters": total, "total_size": size}, "weight_map": weight_map}
    if metadata == "none":
        del index["metadata"]
    (made.folder / INDEX_FILE).write_bytes(encode_json(index))


def with_format(metadata: dict[str, str] | None) -> Callable[[Bench], object]:
    def rewrite(made: Bench) -> None:
        path = made.folder / "model.safetensors"
        save_file(load_file(path), path, metadata)

    return rewrite


CUT = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

FOLDERS: dict[str, Callable[[Bench], object]] = {
    # transformers reads model.safetensors as the whole model and leaves the other half random.
    "a shard with the name of a whole model": lambda made: in_two(made, "model.safetensors", CUT[1]),
    # transformers unpickles any file not named .safetensors.
    "shards with other suffixes": lambda made: in_two(made, "model-1.bin", "model-2.bin"),
    # transformers fails with a KeyError or a TypeError.
    "an index without metadata": lambda made: in_two(made, *CUT, metadata="none"),
    "an index whose metadata are a string": lambda made: in_two(made, *CUT, metadata="x"),
    "an index with a wrong size": lambda made: in_two(made, *CUT, metadata={"total_parameters": 1, "total_size": 1}),
    # transformers before 5 refuses it.
    "weights without metadata": with_format(None),
    "weights of another framework": with_format({"format": "tf"}),
    # Loaders of every *.safetensors, such as mlx, would load it over the sound file.
    "weights beside the weights": head_in_extra_file,
    # transformers with peft silently applies an adapter that it finds.
    "an adapter": extra_file("adapter_config.json"),
    "pickled weights": extra_file("pytorch_model.bin"),
    "a stray index": extra_file(INDEX_FILE, b'{"weight_map": {"model.decoder.norm.weight": "gone.safetensors"}}'),
    "a chat template": extra_file("chat_template.jinja"),
    "a tokenizer that the source has not": extra_file("tokenizer.json"),
    "code": extra_file("modeling_t5gemma2.py"),
}


@pytest.mark.parametrize("label", FOLDERS)
def test_files_that_the_conversion_does_not_write(label: str, bench: MakeBench) -> None:
    made = bench("images-8")
    FOLDERS[label](made)
    assert not made.resealed().passed


def test_other_shard_boundaries_are_the_same_model(bench: MakeBench) -> None:
    """Other shard boundaries pass; otherwise the mutants above would be caught for the wrong reason."""
    made = bench("images-8")
    in_two(made, *CUT)
    assert made.resealed().passed


@pytest.mark.parametrize("name", ["../elsewhere.json", "a\0b", "", ".", "x" * 5000, "/dev/null"])
def test_invalid_file_names_in_the_manifest(name: str, bench: MakeBench) -> None:
    made = bench("text-float32")
    (made.folder.parent / "elsewhere.json").write_bytes(b"")
    made.reseal(lambda manifest: manifest["files"].update({name: {"bytes": 0, "sha256": None}}))
    assert not check_of(made.judged(), "integrity").passed


def test_a_file_name_that_is_not_utf8_is_reported(bench: MakeBench) -> None:
    made = bench("text-float32")
    try:
        (made.folder / os.fsdecode(b"\xff.json")).write_bytes(b"{}")
    except OSError:
        pytest.skip("the file system has no such names")
    report = verify(made.folder, made.source, record=True)
    assert not check_of(report, "integrity").passed
    assert not made.judged().passed


def test_a_manifest_that_cannot_be_written_again(bench: MakeBench) -> None:
    made = bench("text-float32")
    odd = made.sound[MANIFEST_FILE].replace(b'"notes": [', b'"notes": ["\\ud800", ')
    (made.folder / MANIFEST_FILE).write_bytes(odd)
    assert MANIFEST_FILE in message_of(check_of(made.judged(), "integrity"))


def mkfifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def in_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", MANIFEST_FILE])
@pytest.mark.parametrize(
    "trick",
    [mkfifo, in_a_folder, partial(link, target="/dev/zero"), partial(link, target="gone"), partial(link, target=".")],
    ids=["fifo", "folder", "endless", "dangling", "link to the folder"],
)
def test_special_files_fail(name: str, trick: Callable[[Path], None], bench: MakeBench) -> None:
    made = bench("text-float32")
    trick(made.folder / name)
    assert name in message_of(check_of(made.judged(), "integrity"))


def test_a_link_to_the_same_bytes_is_the_same_file(bench: MakeBench, tmp_path: Path) -> None:
    made = bench("text-float32")
    (tmp_path / "blob").write_bytes(made.sound["model.safetensors"])
    link(made.folder / "model.safetensors", str(tmp_path / "blob"))
    assert made.judged().passed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"vocab_size": 300,', b'"vocab_size": 300, "vocab_size": 300,'),
        (b'"dropout_rate": 0.0,', b'"dropout_rate": 0.5, "dr\\u006fpout_rate": 0.0,'),
        (b'"vocab_size": 300,', b'"vocab_size": NaN,'),
        (b'"vocab_size": 300,', b'"vocab_size": 1e999,'),
        (b'"vocab_size": 300,', b'"vocab_size": "300",'),
        (b"{", b"\xef\xbb\xbf{"),
        (b'"T5Gemma2ForConditionalGeneration"', b'"\\ud800"'),
        (b'"t5gemma2"', b'"\\ud800"'),
        (b'"gelu_pytorch_tanh"', b'"\\ud800"'),
        (b'"bfloat16"', b'"\\ud800"'),
        (b'"decoder": {', b'"decoder": null, "other": {'),
        (b'"decoder": {', b'"decoder": [], "other": {'),
    ],
)
def test_json_tricks(old: bytes, new: bytes, bench: MakeBench) -> None:
    made = bench("images-8")
    assert old in made.sound["config.json"]
    (made.folder / "config.json").write_bytes(made.sound["config.json"].replace(old, new, 1))
    assert not check_of(made.resealed(), "config").passed


def test_a_manifest_sealed_by_hand_is_a_manifest(bench: MakeBench) -> None:
    """A seal made by hand is valid; otherwise it alone would catch every mutant above."""
    made = bench("text-float32")
    made.reseal()
    assert (made.folder / MANIFEST_FILE).read_bytes() == made.sound[MANIFEST_FILE]
    document = read_json_object(made.folder / MANIFEST_FILE)
    assert seal(document) == made.sound[MANIFEST_FILE]
    made.edit(MANIFEST_FILE, lambda manifest: manifest.update(notes=[]))
    assert MANIFEST_FILE in message_of(check_of(made.judged(), "integrity"))


def test_hundreds_of_mutants_are_tried() -> None:
    """Every family asserts its own minimum and no survivor; this checks their sum."""
    print(f"\nmutants at least: {sum(MINIMA.values())} in {len(MINIMA)} families")
    assert sum(MINIMA.values()) >= 300
