"""V1 and V2: a saboteur tries to get a wrong checkpoint past `verify`.

Naive damage leaves t5g2.json as it was: `integrity` must name the file. A careful saboteur seals the manifest anew:
then provenance, config and the parities must find it, each on its own where it can.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import convert
from t5g2convert.checkpoint.folder import INDEX_FILE, Checkpoint, read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, encode_json, seal
from t5g2convert.conversion.plan import Plan
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.library import find_map
from t5g2convert.parity.inputs import BEYOND_WINDOW, token_batch
from t5g2convert.parity.integrity import judge_integrity
from t5g2convert.parity.provenance import replay
from t5g2convert.parity.report import Check
from t5g2convert.parity.verify import PARITIES, verify
from t5g2convert.reference.gemma3 import Gemma3Reference
from tests.conftest import TwinFolder
from tests.parity.mutations import (
    EOI,
    LAYER_ORDER,
    OPERATORS,
    PROJECTOR,
    TABLE,
    TOWER,
    Bench,
    Document,
    Tally,
    Tensors,
    check_of,
    departs,
    dotted,
    double,
    earliest,
    exchange,
    flip_exponent,
    flip_sign,
    layer_names,
    leaves,
    parent_of,
    place_of,
    plausible,
    put,
    put_inf,
    put_nan,
    setting_name,
    shift_rows,
    told,
    zero,
)
from tests.twins import BY_NAME, write_twin

MINIMA = {
    "one byte, images-8": 55,
    "one byte, text-float32": 55,
    "one byte, sealed": 60,
    "text layers, images-13": 80,
    "text layers, text-float32": 60,
    "vision, images-8": 70,
    "embedding": 25,
    "exchanged": 45,
    "fill": 5,
    "shards": 15,
    "structure": 20,
    "settings": 110,
    "settings that are computed with": 35,
    "settings missing": 100,
    "settings of a text-only target": 90,
    "manifest": 25,
}
"""Families of mutants, and how many of each must be tried at least; each family is a test of its own."""

MakeBench = Callable[..., Bench]


@pytest.fixture
def bench(twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path) -> MakeBench:
    def make(name: str, **options: Any) -> Bench:
        converted = converted_twin(name)
        if options:
            converted = tmp_path / "converted"
            convert(twin_folder(name), converted, **options)
        return Bench.of(twin_folder(name), converted, tmp_path / name)

    return make


@pytest.fixture(autouse=True)
def same_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small source the plan is made and the layers are read once, not for every mutant."""
    plans: dict[Path, Plan] = {}
    references: dict[object, Gemma3Reference] = {}

    def replayed(source: Path, manifest: Document, mapping: str | None) -> Plan:
        if manifest.get("changes") or mapping:
            return replay(source, manifest, mapping)
        if source not in plans:
            plans[source] = replay(source, {}, None)
        return plans[source]

    def opened(parent: Checkpoint, **options: Any) -> Gemma3Reference:
        if parent.nbytes > 1_000_000:
            return Gemma3Reference(parent, **options)
        key = (parent.path, *options.values())
        if key not in references:
            references[key] = Gemma3Reference(parent, resident=True, **options)
        return references[key]

    monkeypatch.setattr("t5g2convert.parity.verify.replay", replayed)
    monkeypatch.setattr("t5g2convert.parity.verify.Gemma3Reference", opened)


@pytest.fixture
def without_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """No help from the check that uses the model: what compares it with its source must suffice."""
    monkeypatch.setattr("t5g2convert.parity.verify.judge_runs", lambda *_, **__: Check("runs", True, "not made"))


@pytest.fixture
def without_passes(without_use: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No help from the parities either."""
    sound = [Check(name, True, "not made") for name in PARITIES]
    monkeypatch.setattr("t5g2convert.parity.verify.judge_text", lambda *_, **__: sound[1:])
    monkeypatch.setattr("t5g2convert.parity.verify.judge_vision", lambda *_, **__: (sound[0], torch.zeros(1, 4, 24)))


def close(tally: Tally, family: str) -> None:
    tally.close(family, MINIMA[family])


@pytest.mark.parametrize("name", ["images-13", "images-8", "text-float32", "text-with-fill", "images-with-fill"])
def test_without_sabotage_all_is_well(name: str, bench: MakeBench) -> None:
    made = bench(name)
    made.reseal()
    assert (made.folder / MANIFEST_FILE).read_bytes() == made.sound[MANIFEST_FILE]
    report = made.judged()
    assert report.passed, report.failed
    assert {check.name for check in report.checks} >= {"integrity", "provenance", "config", *PARITIES[1:], "runs"}


# Naive damage


@pytest.mark.parametrize("name", ["images-8", "text-float32"])
def test_V2_any_byte_of_any_file(name: str, bench: MakeBench, without_use: None) -> None:
    made = bench(name)
    verify(made.folder, made.source, record=True)
    recorded = (made.folder / MANIFEST_FILE).read_bytes()
    assert b'"verification"' in recorded
    manifest, tally, chance = json.loads(recorded), Tally(), random.Random(name)
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
            assert path.name in told(check_of(report, "integrity")), (at, damaged[at])
        if path.name == MANIFEST_FILE:
            continue
        for _ in range(150):
            at, damaged = chance.randrange(len(sound)), bytearray(sound)
            damaged[at] ^= chance.randrange(1, 256)
            path.write_bytes(damaged)
            assert judge_integrity(made.folder, manifest).offenders == (f"{file} has another sha256",)
        made.restore()
    assert set(tally.caught) >= {"integrity"}
    assert tally.caught["integrity"] == tally.tried
    close(tally, f"one byte, {name}")


def test_any_byte_of_a_header_or_config_that_is_sealed(bench: MakeBench, without_use: None) -> None:
    made, tally, chance = bench("text-float32"), Tally(), random.Random(8)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        sound = made.sound[file]
        start, stop = 0, len(sound)
        if file == "model.safetensors":
            start, stop = 8, 8 + int.from_bytes(sound[:8], "little")
        for _ in range(30):
            at, damaged = chance.randrange(start, stop), bytearray(sound)
            # Digits become digits, so that many of the changes can be read.
            damaged[at] = chance.choice(b"0123456789") if chr(sound[at]).isdigit() else chance.randrange(256)
            if meaning(damaged[start:stop]) == meaning(sound[start:stop]):
                continue
            (made.folder / file).write_bytes(damaged)
            tally.add(f"{file}[{at}] = {damaged[at]}", made.resealed())
    assert tally.caught["integrity"] == 0
    close(tally, "one byte, sealed")


def meaning(text: bytes) -> object:
    """What JSON says: spaces between its parts are nothing."""
    try:
        return json.loads(text)
    except ValueError:
        return bytes(text)


# Tensors


def judge_tensor(made: Bench, name: str, tally: Tally, label: str) -> None:
    """One changed tensor: provenance names it, and the parity of its part alone names its layer and its module."""
    report = made.resealed()
    tally.add(f"{label} {name}", report)
    assert name in told(check_of(report, "provenance")), label
    parity, place = place_of(name)
    kinds = read_json_object(made.folder / "config.json")["decoder"]["layer_types"]
    kind = kinds[int(name.split(".")[3])] if "layers." in name and "vision" not in name else ""
    assert departs(report, parity).startswith(place.format(kind=kind)), (label, name)
    assert {check.name for check in report.failed} == {"provenance", parity}, (label, name)


@pytest.mark.parametrize("name", ["images-13", "text-float32"])
def test_every_tensor_of_first_middle_and_last_layers(name: str, bench: MakeBench, without_use: None) -> None:
    made, tally, number = bench(name), Tally(), 0
    depth = int(BY_NAME[name].text["num_hidden_layers"])
    for part in ("encoder", "decoder"):
        names = [f"model.{part}.layers.{at}.{module}.weight" for at in (0, 5, depth - 1) for module in LAYER_ORDER]
        for tensor in (*names, f"model.{part}.norm.weight"):
            # Seven is prime to the 13 tensors of a layer: each tensor gets another change in every layer.
            operator = OPERATORS[number % 7]
            number += 1
            with made.tensors() as tensors:
                operator(tensors[tensor])
            judge_tensor(made, tensor, tally, operator.__name__)
    assert tally.caught["provenance"] == tally.caught["parity"] == tally.tried
    close(tally, f"text layers, {name}")


def test_every_tensor_of_the_vision_tower(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    with made.tensors() as tensors:
        names = [name for name in tensors if name.startswith((TOWER, PROJECTOR)) and ".layers.1." not in name]
    for number, tensor in enumerate(names):
        for operator in (OPERATORS[number % 7], OPERATORS[(number + 3) % 7]):
            with made.tensors() as tensors:
                operator(tensors[tensor])
            judge_tensor(made, tensor, tally, operator.__name__)
    assert tally.caught["provenance"] == tally.caught["vision_parity"] == tally.tried
    close(tally, "vision, images-8")


def test_the_embedding(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    twin = BY_NAME["images-8"]
    window = int(twin.text["sliding_window"])
    image_token = twin.tokens["image_token_index"]
    batch = token_batch(twin.vocab, window + BEYOND_WINDOW, never={twin.eoi, image_token}, placed=twin.eoi)
    read = {int(token) for token in batch.ids_BT[batch.kept_BT]} - {twin.eoi}
    unread = set(range(twin.vocab)) - read
    chance = random.Random(5)
    rows = [min(read), max(read), *chance.sample(sorted(read), 3)]
    rows += [0, twin.vocab - 1, twin.eoi, image_token, *chance.sample(sorted(unread), 3)]
    for number, row in enumerate(rows):
        for operator in (OPERATORS[number % 6], double):
            with made.tensors() as tensors:
                operator(tensors[TABLE][row])
            report = made.resealed()
            tally.add(f"{operator.__name__} of row {row}", report)
            assert f"{TABLE}[{row}, " in told(check_of(report, "provenance"))
            # A row that no token of the input is still one of the softmax.
            place = "embed_tokens, at token" if row in read else "embed_tokens as the softmax"
            assert departs(report, "decoder_parity").startswith(place), row
            assert {check.name for check in report.failed} >= {"provenance", "decoder_parity"}
    for operator in (zero, shift_rows, flip_exponent, put_nan):
        for name in (TABLE, EOI):
            with made.tensors() as tensors:
                operator(tensors[name])
            judge_embedding(made, name, tally, operator.__name__)
    close(tally, "embedding")


def judge_embedding(made: Bench, name: str, tally: Tally, label: str) -> None:
    report = made.resealed()
    tally.add(f"{label} {name}", report)
    assert name in told(check_of(report, "provenance")), label
    for parity in PARITIES[1:]:
        if name == EOI or label in ("zero", "shift_rows"):
            assert departs(report, parity).startswith("embed_tokens, at token"), label


@pytest.mark.parametrize("name", ["images-13", "text-with-fill", "text-float32"])
def test_the_end_of_image_vector_in_every_wrong_way(name: str, bench: MakeBench, without_use: None) -> None:
    made, twin = bench(name), BY_NAME[name]
    with made.tensors() as tensors:
        sound, table = tensors[EOI].clone(), tensors[TABLE].clone()
    if not twin.has_eoi:
        # No such token: zeros, which nothing reads, so that its bytes are the only witness.
        with made.tensors() as tensors:
            tensors[EOI][0] = 1.0
        report = made.resealed()
        assert f"{EOI}[0] is not zero" in told(check_of(report, "provenance"))
        assert {check.name for check in report.failed} == {"provenance"}
        return
    width = table.shape[1]
    row = table[twin.eoi]
    wrong = {
        "unscaled": row,
        "scaled before it was rounded": (row.float() * width**0.5).to(table.dtype),
        "scaled by the width": row * width,
        "of the token before": table[twin.eoi - 1] * torch.tensor(width**0.5).to(table.dtype),
        "in halves": sound / 2,
        "zeros": torch.zeros_like(sound),
    }
    tally = Tally()
    for label, vector in wrong.items():
        if name == "text-with-fill" and label not in ("unscaled", "zeros"):
            # A large vocabulary takes its time; in eight elements the two orders of rounding need not differ.
            continue
        assert not torch.equal(vector, sound), label
        with made.tensors() as tensors:
            tensors[EOI].copy_(vector)
        judge_embedding(made, EOI, tally, label)
    tally.close(f"end-of-image vector, {name}", 2)


def test_tensors_that_change_places(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    with made.tensors() as tensors:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    pairs = []
    for prefix in ("model.encoder.layers.2.", "model.decoder.layers.5.", f"{TOWER}encoder.layers.1."):
        names = [name for name in shapes if name.startswith(prefix) and not name.endswith("bias")]
        # Gate and up, keys and values, norms among each other: all that a loader would not refuse.
        pairs += [pair for pair in combinations(names, 2) if shapes[pair[0]] == shapes[pair[1]]]
    pairs += [
        (f"model.{part}.layers.0.{module}.weight", f"model.{part}.layers.{other}.{module}.weight")
        for part, other in (("encoder", 4), ("decoder", 7))
        for module in LAYER_ORDER[::2]
    ]
    kinds = BY_NAME["images-8"]
    for pair in pairs:
        with made.tensors() as tensors:
            exchange(tensors, *pair)
        report = made.resealed()
        tally.add(" and ".join(pair), report)
        assert all(name in told(check_of(report, "provenance")) for name in pair)
        parity, place = place_of(earliest(list(pair)))
        found = departs(report, parity)
        before, _, after = place.partition("{kind}")
        assert found.startswith(before), pair
        assert found.endswith(after), pair
        assert {check.name for check in report.failed} == {"provenance", parity}, (pair, kinds.name)
    close(tally, "exchanged")


def test_whole_layers_that_change_places(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    for one, further in ((0, 1), (2, 5), (6, 7)):
        for part in ("encoder", "decoder"):
            with made.tensors() as tensors:
                for name in layer_names(tensors, f"model.{part}.", one):
                    exchange(tensors, f"model.{part}.layers.{one}.{name}", f"model.{part}.layers.{further}.{name}")
            report = made.resealed()
            tally.add(f"{part} {one} and {further}", report)
            place = f"{part} layers.{one} (sliding_attention), pre_self_attn_layernorm"
            assert departs(report, f"{part}_parity") == place
        with made.tensors() as tensors:
            for name in layer_names(tensors, "model.encoder.", one):
                exchange(tensors, f"model.encoder.layers.{one}.{name}", f"model.decoder.layers.{further}.{name}")
        report = made.resealed()
        tally.add(f"encoder {one} and decoder {further}", report)
        assert departs(report, "encoder_parity").startswith(f"encoder layers.{one} ")
        assert departs(report, "decoder_parity").startswith(f"decoder layers.{further} ")
    tally.close("layers", 9)


def test_stacks_that_change_places_are_the_same_bytes(bench: MakeBench) -> None:
    made = bench("images-8")
    with made.tensors() as tensors:
        for name in [name for name in tensors if name.startswith("model.decoder.")]:
            exchange(tensors, name, name.replace(".decoder.", ".encoder."))
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == made.sound
    assert made.judge().passed


def test_the_sign_of_a_zero_is_a_byte_of_the_source(twin_folder: TwinFolder, tmp_path: Path, without_use: None) -> None:
    """The one change of a tensor that no pass can see: -0.0 and 0.0 are equal numbers."""
    source = tmp_path / "source"
    shutil.copytree(twin_folder("text-float32"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 0.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out")
    made = Bench.of(source, tmp_path / "out", tmp_path / "bench")
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    with made.tensors() as tensors:
        tensors[name][0, 0] = -0.0
    report = made.resealed()
    assert f"{name}[0, 0] is not" in told(check_of(report, "provenance"))
    assert {check.name for check in report.failed} == {"provenance"}


@pytest.mark.parametrize("where", ["model.layers.3.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_what_is_no_number_on_both_sides_is_no_equality(where: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(twin_folder("text-float32"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[where][:] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out")
    for tolerance in (0.0, 0.999):
        with pytest.raises(CheckpointError, match="states are not finite in float32") as caught:
            verify(tmp_path / "out", source, tolerance=tolerance)
        assert caught.value.where == str(source)


def test_a_large_tolerance_excuses_no_byte(bench: MakeBench) -> None:
    made = bench("text-float32")
    with made.tensors() as tensors:
        flip_sign(tensors["model.decoder.layers.3.self_attn.q_proj.weight"])
    report = made.resealed(tolerance=0.999)
    assert {check.name for check in report.failed} == {"provenance"}


# Rows of fill, shards, structure


def test_rows_of_a_table_with_fill(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-with-fill"), Tally()
    last = 262_143
    # The rows beside the slices of the softmax, that of an image token, the last.
    for number, row in enumerate((16_383, 16_384, 256_001, last)):
        with made.tensors() as tensors:
            (put_inf, double, zero, flip_exponent)[number](tensors[TABLE][row])
        report = made.resealed()
        tally.add(f"row {row}", report)
        assert f"{TABLE}[{row}, " in told(check_of(report, "provenance"))
        assert departs(report, "decoder_parity").startswith("embed_tokens")
    with made.tensors() as tensors:
        fill = load_file(made.source / "model.safetensors")["language_model.model.embed_tokens.weight"][262_144:]
        tensors[TABLE][-64:] = fill
    report = made.resealed()
    tally.add("fill in place of the last rows", report)
    assert f"{TABLE}[262080, " in told(check_of(report, "provenance"))
    assert not check_of(report, "decoder_parity").passed
    close(tally, "fill")


def shard_of(made: Bench, tensor: str) -> Path:
    return made.folder / str(read_json_object(made.folder / INDEX_FILE)["weight_map"][tensor])


def test_shards_and_their_index(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-sharded", max_shard_bytes=20_000), Tally()
    index = made.folder / INDEX_FILE
    norm, table = "model.decoder.norm.weight", TABLE
    shards = sorted(made.folder.glob("*.safetensors"))
    assert len(shards) > 5

    def judge(label: str, *words: str) -> None:
        report = made.resealed()
        tally.add(label, report)
        said = "\n".join(told(check) for check in report.failed)
        assert all(word in said for word in words), (label, said)

    def weight_map(document: Document) -> Document:
        mapped = document["weight_map"]
        assert isinstance(mapped, dict)
        return mapped

    for name in (norm, table, EOI, f"{TOWER}post_layernorm.bias", "model.encoder.layers.7.mlp.down_proj.weight"):
        with made.tensors() as tensors:
            flip_sign(tensors[name])
        judge(f"sign in {name}", name, "is not ")
    with made.tensors() as tensors:
        one, other = "model.encoder.layers.0.mlp.up_proj.weight", "model.decoder.layers.7.mlp.up_proj.weight"
        assert shard_of(made, one) != shard_of(made, other)
        exchange(tensors, one, other)
    judge("tensors of two shards exchanged", one)
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)
    judge("shards exchanged", "another shard than the index says")
    shards[3].write_bytes(shards[2].read_bytes())
    judge("a shard twice", "is in")
    shards[4].unlink()
    shards[4].symlink_to(shards[5].name)
    judge("a shard that is a link to another", "is in")
    shards[1].unlink()
    judge("a shard missing", shards[1].name)
    made.edit(INDEX_FILE, lambda document: weight_map(document).update({norm: shards[0].name}))
    judge("the index points to a wrong shard", norm)
    made.edit(INDEX_FILE, lambda document: weight_map(document).pop(norm))
    judge("the index lacks a tensor", norm)
    made.edit(INDEX_FILE, lambda document: weight_map(document).update({"lm_head.weight": shards[0].name}))
    judge("the index has one too many", "lm_head.weight")
    made.edit(INDEX_FILE, lambda document: weight_map(document).update({norm: f"../{shards[0].name}"}))
    judge("the index leaves the folder", norm)
    index.write_text('{"weight_map": []}')
    judge("an index of nothing", "weight_map")
    index.unlink()
    judge("no index", INDEX_FILE)
    save_file(load_file(shards[0]), made.folder / "model.safetensors", {"format": "pt"})
    judge("a single file beside the shards", "model.safetensors")
    close(tally, "shards")


Rewrite = Callable[[Tensors], object]


def with_name(old: str, new: str) -> Rewrite:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def with_copy(old: str, new: str) -> Rewrite:
    return lambda tensors: tensors.update({new: tensors[old].clone()})


def with_form(name: str, form: Callable[[torch.Tensor], torch.Tensor]) -> Rewrite:
    return lambda tensors: tensors.update({name: form(tensors[name]).contiguous()})


def without(name: str) -> Rewrite:
    return lambda tensors: tensors.pop(name)


LAYER = "model.decoder.layers.3."
UP, Q_NORM = f"{LAYER}mlp.up_proj.weight", f"{LAYER}self_attn.q_norm.weight"

STRUCTURE: dict[str, tuple[Rewrite, str]] = {
    "no projection": (without(UP), UP),
    "no norm": (without("model.encoder.norm.weight"), "model.encoder.norm.weight"),
    "no table": (without(TABLE), TABLE),
    "no end-of-image vector": (without(EOI), EOI),
    "no bias of the tower": (without(f"{TOWER}post_layernorm.bias"), f"{TOWER}post_layernorm.bias"),
    "tied head": (with_copy(TABLE, "lm_head.out_proj.weight"), "lm_head.out_proj.weight"),
    "old tied head": (with_copy(TABLE, "lm_head.weight"), "lm_head.weight"),
    "tied decoder table": (with_copy(TABLE, "model.decoder.embed_tokens.weight"), "model.decoder.embed_tokens.weight"),
    "one layer more": (with_copy(UP, UP.replace("layers.3", "layers.8")), UP.replace("layers.3", "layers.8")),
    "bias": (with_copy(Q_NORM, f"{LAYER}self_attn.q_proj.bias"), f"{LAYER}self_attn.q_proj.bias"),
    "rotary buffer": (with_copy(Q_NORM, "model.decoder.rotary_emb.inv_freq"), "model.decoder.rotary_emb.inv_freq"),
    "Gemma's name": (with_name(f"{LAYER}pre_self_attn_layernorm.weight", f"{LAYER}input_layernorm.weight"), "input_"),
    "T5Gemma's name": (with_name(TABLE, "model.shared.weight"), "model.shared.weight"),
    "module's name": (
        with_name("model.encoder.norm.weight", "model.encoder.text_model.norm.weight"),
        "model.encoder.text_model.norm.weight",
    ),
    "newer name": (
        with_name(f"{TOWER}post_layernorm.bias", "model.encoder.vision_tower.post_layernorm.bias"),
        "model.encoder.vision_tower.post_layernorm.bias",
    ),
    "upper case": (with_name(UP, UP.replace("mlp", "MLP")), "MLP"),
    "float32": (with_form(UP, lambda tensor: tensor.float()), UP),
    "float16": (with_form(EOI, lambda tensor: tensor.half()), EOI),
    "float64": (with_form(Q_NORM, lambda tensor: tensor.double()), Q_NORM),
    "integers": (with_form(Q_NORM, lambda tensor: tensor.view(torch.int16)), Q_NORM),
    "matrix as vector": (with_form(UP, lambda tensor: tensor.flatten()), UP),
    "vector as matrix": (with_form(Q_NORM, lambda tensor: tensor[None]), Q_NORM),
    "transposed": (with_form(UP, lambda tensor: tensor.T), UP),
    "row less": (with_form(TABLE, lambda tensor: tensor[:-1]), TABLE),
    "row more": (with_form(TABLE, lambda tensor: torch.cat((tensor, tensor[:1]))), TABLE),
    "nothing": (with_form(Q_NORM, lambda tensor: tensor[:0]), Q_NORM),
    "all float32": (lambda tensors: tensors.update({name: tensors[name].float() for name in tensors}), TABLE),
}


def test_other_names_dtypes_and_shapes(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    path = made.folder / "model.safetensors"
    for label, (rewrite, named) in STRUCTURE.items():
        tensors = load_file(path)
        rewrite(tensors)
        save_file(tensors, path, {"format": "pt"})
        report = made.resealed()
        tally.add(label, report)
        assert named in told(check_of(report, "provenance")), label
        if "float" not in label and label != "integers":
            # The list of tensors that a config implies stands apart from the map.
            assert named in told(check_of(report, "config")), label
    close(tally, "structure")


# Settings

UNSEEN = {
    # Nothing that either model computes.
    **dict.fromkeys(
        ("architectures", "is_encoder_decoder", "tie_word_embeddings", "model_type", "use_cache", "vision_use_head",
         "max_position_embeddings", "initializer_range"),
        "no part of what is computed",
    ),
    **dict.fromkeys(("attention_dropout", "dropout_rate", "classifier_dropout_rate"), "only in training"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "where writing starts and ends"),
    "boi_token_index": "a token like any other",
    "image_token_index": "the inputs are made with the target's own; nothing reads the encoder's",
    "encoder.text_config.final_logit_softcapping": "an encoder has no logits",
    "eoi_token_index": "read in the encoder's section alone",
    "vocab_size": "read in both stacks",
    "decoder.vocab_size": "both tables are read as far as the decoder says; one row more or less changes no value",
    "encoder.vision_config.layer_norm_eps": "two millionths and one are the same in bfloat16",
    "encoder.vision_config.image_size": "the same number of patches: the pixels are made for the source's tower",
    "decoder.rope_parameters.full_attention.rope_type": "a linear factor of 1 and none are one function",
    "encoder.text_config.rope_parameters.full_attention.rope_type": "the same",
    "decoder.rope_parameters.sliding_attention.rope_type": "the same: the factor that it lacks is 1",
    "encoder.text_config.rope_parameters.sliding_attention.rope_type": "the same",
    "encoder.text_config.vocab_size": "the decoder's bounds the softmax, both the inputs",
    "encoder.mm_tokens_per_image": "the root of 5 is rounded to that of 4; the check that uses the model sees it",
    "dtype": "what is not computed with is not compared",
}  # fmt: skip
"""Settings, by their last name or whole path, of which a change can stay unseen by the parities, and why."""


def says(check: Check, name: str) -> bool:
    """Whether a check names a setting: by its path, or by its section and itself."""
    section, _, last = name.rpartition(".")
    return not check.passed and (name in told(check) or (f"{section}." in told(check) and last in told(check)))


def seen_by_parity(report: Any) -> bool:
    return any(check.name in PARITIES for check in report.failed)


def test_every_setting_is_judged(bench: MakeBench, without_use: None) -> None:
    made, tally, unseen = bench("images-8"), Tally(), set()
    for file in ("config.json", "generation_config.json"):
        for path, value in list(leaves(read_json_object(made.folder / file))):
            name, changed = setting_name(path), plausible(path, value)
            made.edit(file, partial(put, path=path, value=changed))
            report = made.resealed()
            tally.add(f"{file}: {name} = {changed!r}", report)
            assert says(check_of(report, "config"), name), (name, changed)
            # Where the folder cannot even be read, there is no pass to see anything.
            if not seen_by_parity(report) and "provenance" not in report.skipped:
                unseen.add(name)
    assert tally.caught["config"] == tally.tried
    surprising = {name for name in unseen if name not in UNSEEN and name.rpartition(".")[2] not in UNSEEN}
    assert surprising == set()
    close(tally, "settings")


def test_every_setting_of_a_text_only_target_is_judged(bench: MakeBench, without_passes: None) -> None:
    made, tally = bench("text-float32"), Tally()
    for path, value in list(leaves(read_json_object(made.folder / "config.json"))):
        made.edit("config.json", partial(put, path=path, value=plausible(path, value)))
        report = made.resealed()
        tally.add(f"{setting_name(path)} = {plausible(path, value)!r}", report)
        assert says(check_of(report, "config"), setting_name(path)), setting_name(path)
    assert tally.caught["config"] == tally.tried
    close(tally, "settings of a text-only target")


def test_every_setting_must_be_there(bench: MakeBench, without_passes: None) -> None:
    made, tally = bench("images-8"), Tally()
    for file in ("config.json", "generation_config.json"):
        for path, _ in list(leaves(read_json_object(made.folder / file))):
            made.edit(file, lambda document, path=path: parent_of(document, path).pop(path[-1]))
            report = made.resealed()
            name = setting_name(path)
            tally.add(f"without {name}", report)
            # What cannot be read at all is named by the section that holds it.
            named = name if "rope_theta" not in name else name.partition(".full")[0].partition(".sliding")[0]
            assert named in told(check_of(report, "config")), name
    assert tally.caught["config"] == tally.tried
    close(tally, "settings missing")


@pytest.mark.parametrize("section", ["", "encoder", "encoder.text_config", "encoder.vision_config", "decoder"])
def test_settings_of_other_models_are_strangers(section: str, bench: MakeBench, without_passes: None) -> None:
    made, keys = bench("images-8"), tuple(section.split(".")) if section else ()
    strangers: Document = {
        "use_bidirectional_attention": True, "quantization_config": {"quant_method": "bitsandbytes"},
        "auto_map": {"AutoModel": "modeling.Model"}, "rope_scaling": {"type": "yarn"}, "torch_dtype": "float16",
        "_attn_implementation": "sdpa", "sliding_window_pattern": 2, "empty": {}, "none": None,
    }  # fmt: skip
    if section:
        strangers["dtype"] = "bfloat16"
    for key, value in strangers.items():
        made.edit("config.json", partial(put, path=(*keys, key), value=value))
        check = check_of(made.resealed(), "config")
        assert not check.passed
        assert ".".join((*keys, key)) in told(check)


COMPUTED: list[tuple[str, Any, str]] = [
    ("sliding_window", 8, "layers.0 (sliding_attention), self_attn (windows, RoPE, scale, softcap or heads)"),
    ("sliding_window", 6, "layers.0 (sliding_attention), self_attn (windows, RoPE, scale, softcap or heads)"),
    ("layer_types.1", "full_attention", "layers.1 (full_attention), self_attn (windows"),
    ("layer_types.11", "sliding_attention", "layers.11 (sliding_attention), self_attn (windows"),
    ("rope_parameters.full_attention.rope_theta", 1e4, "layers.5 (full_attention), self_attn (windows"),
    ("rope_parameters.full_attention.factor", 4.0, "layers.5 (full_attention), self_attn (windows"),
    ("rope_parameters.full_attention.factor", 1.0, "layers.5 (full_attention), self_attn (windows"),
    ("rope_parameters.full_attention.rope_type", "default", "layers.5 (full_attention), self_attn (windows"),
    ("rope_parameters.sliding_attention.rope_theta", 1e6, "layers.0 (sliding_attention), self_attn (windows"),
    ("rms_norm_eps", 0.1, "layers.0 (sliding_attention), pre_self_attn_layernorm"),
    ("query_pre_attn_scalar", 10, "layers.0 (sliding_attention), self_attn (windows"),
    ("attn_logit_softcapping", 3.0, "layers.0 (sliding_attention), self_attn (windows"),
    # An activation is no module: the projection behind it is the first that differs.
    ("hidden_activation", "silu", "layers.0 (sliding_attention), mlp.down_proj"),
    ("hidden_activation", "gelu", "layers.0 (sliding_attention), mlp.down_proj"),
]
"""Settings of a stack that decide what it computes, and where that must be found."""

SHAPED: list[tuple[str, Any]] = [
    ("num_attention_heads", 2), ("num_key_value_heads", 4), ("head_dim", 20), ("intermediate_size", 20),
    ("attention_bias", True),
]  # fmt: skip
"""Settings of a stack that decide which tensors it has; the parity cannot be computed then."""

OF_IMAGES: list[tuple[str, Any, str]] = [
    ("encoder.vision_config.layer_norm_eps", 0.1, "departs at encoder.layers.0, layer_norm1"),
    ("encoder.vision_config.hidden_act", "silu", "departs at encoder.layers.0, mlp.fc2"),
    (
        "encoder.vision_config.num_attention_heads",
        4,
        "departs at encoder.layers.0, self_attn (windows, RoPE, scale, softcap or heads)",
    ),
    ("encoder.vision_config.patch_size", 7, "patch_embedding"),
    ("encoder.vision_config.num_hidden_layers", 2, "3 layers"),
    ("encoder.mm_tokens_per_image", 16, "shapes differ"),
]


def test_settings_that_are_computed_with_are_found_by_what_is_computed(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-13"), Tally()

    def judge(path: str, value: Any) -> Any:
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        made.edit("config.json", partial(put, path=keys, value=value))
        report = made.resealed()
        tally.add(f"{path} = {value!r}", report)
        assert setting_name(keys) in told(check_of(report, "config"))
        return report

    for stack, parity in (("encoder.text_config", "encoder_parity"), ("decoder", "decoder_parity")):
        for setting, value, place in COMPUTED:
            report = judge(f"{stack}.{setting}", value)
            assert departs(report, parity).startswith(f"{parity.removesuffix('_parity')} {place}"), setting
            assert {check.name for check in report.failed} == {"config", parity}, setting
        for setting, value in SHAPED:
            assert "layers.0." in check_of(judge(f"{stack}.{setting}", value), parity).detail, setting
    report = judge("decoder.final_logit_softcapping", 5.0)
    assert departs(report, "decoder_parity").startswith("embed_tokens as the softmax")
    report = judge("encoder.eoi_token_index", 290)
    for parity in PARITIES[1:]:
        assert departs(report, parity).startswith("embed_tokens, at token"), parity
    for path, value, said in OF_IMAGES:
        report = judge(path, value)
        assert said in check_of(report, "vision_parity").detail, path
    assert tally.caught["config"] == tally.caught["parity"] == tally.tried
    close(tally, "settings that are computed with")


# The manifest, and other sources

LIES: dict[str, tuple[Callable[[Document], object], str]] = {
    "total": (lambda it: it["parameters"].update(total=1), "parameters"),
    "a part": (lambda it: it["parameters"].update(decoder=it["parameters"]["decoder"] + 1), "parameters"),
    "no parameters": (lambda it: it.pop("parameters"), "parameters"),
    "dropped more": (lambda it: it["dropped"].append({"name": "lm_head.weight", "because": "tied"}), "dropped"),
    "dropped none": (lambda it: it.pop("dropped"), "dropped"),
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
    "no changes": (lambda it: it.pop("changes"), "changes"),
    "one thing more": (lambda it: it.update(quantized="int4"), "quantized"),
}


def declared(name: str, before: Any, after: Any) -> Callable[[Document], object]:
    return lambda manifest: manifest["changes"].append({"field": name, "source": before, "target": after})


LIES |= {
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


def test_lies_in_the_manifest(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    for label, (lie, named) in LIES.items():
        made.reseal(lie)
        report = made.judged()
        tally.add(label, report)
        # What is missing makes it no manifest; what is wrong makes it a lie.
        check = check_of(report, "provenance" if check_of(report, "integrity").passed else "integrity")
        assert not check.passed, label
        assert named in told(check), label
    # A change that was made as well as declared is no less a lie about what this map does of this source.
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

JUDGED = (("mapping",), ("source",), ("source", "files"), ("dtype",), ("parameters",), ("dropped",), ("changes",),
          ("files",), ("format",))  # fmt: skip
"""What the manifest says that can be judged. Names and hashes of tool, map and weights cannot: no reader needs them."""


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


@pytest.mark.parametrize("path", [("tool",), ("verification",), ("source", "layout"), ("mapping", "sha256")], ids=str)
def test_odd_types_where_nobody_looks_harm_nobody(
    path: tuple[str, ...], bench: MakeBench, without_passes: None
) -> None:
    made = bench("images-8")
    for odd in ODD:
        made.reseal(partial(put, path=path, value=odd))
        made.judged()


def another(source: Path, folder: Path, tensor: str | None = None, **settings: Any) -> Path:
    """A copy of a source with one tensor or some settings changed."""
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
    assert "layers.6.mlp.gate_proj.weight" in told(check_of(report, "provenance"))
    for part in ("encoder", "decoder"):
        assert departs(report, f"{part}_parity") == f"{part} layers.6 (sliding_attention), mlp.gate_proj"
    for name, setting in (("window", {"sliding_window": 6}), ("eps", {"rms_norm_eps": 0.1})):
        report = verify(made.folder, another(made.source, tmp_path / name, **setting), record=False)
        assert {"provenance", "config", *PARITIES[1:]} <= {check.name for check in report.failed}
    # Of the same shape to the last byte of its files' sizes, but for its numbers.
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


def test_a_namesake_of_the_shipped_map(twin_folder: TwinFolder, tmp_path: Path) -> None:
    """A map with two rows exchanged that calls itself gemma3: with it given, only the parities are left to object."""
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


# Beside the list


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("decoder.tie_word_embeddings", False),
        ("decoder.max_position_embeddings", 16),
        ("decoder.eos_token_id", 7),
        ("encoder.text_config.max_position_embeddings", 16),
        ("encoder.vision_config.attention_dropout", 0.5),
    ],
)
def test_a_name_with_dots_hides_no_setting(path: str, value: Any, bench: MakeBench) -> None:
    """Checks spell nested settings with dots; a setting whose own name has dots may not pass for a nested one."""
    made = bench("images-8")
    made.edit("config.json", partial(dotted, path=tuple(path.split(".")), value=value))
    assert not check_of(made.resealed(), "config").passed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vocab_size", 300.0),
        ("eos_token_id", 1.0),
        ("decoder.max_position_embeddings", 128.0),
        ("decoder.pad_token_id", 0.0),
        ("encoder.text_config.bos_token_id", 2.0),
    ],
)
def test_a_fraction_is_no_whole_number(path: str, value: Any, bench: MakeBench) -> None:
    """transformers refuses such a config: its fields are typed."""
    made = bench("images-8")
    made.edit("config.json", partial(put, path=tuple(path.split(".")), value=value))
    assert not made.resealed().passed


@pytest.mark.parametrize(
    "setting",
    ["query_pre_attn_scalar", "sliding_window", "hidden_size", "head_dim", "num_attention_heads", "intermediate_size"],
)
@pytest.mark.parametrize("number", [10**30, 10**400], ids=["1e30", "1e400"])
def test_numbers_that_no_machine_holds(setting: str, number: int, bench: MakeBench) -> None:
    made = bench("images-8")
    made.edit("config.json", partial(put, path=("decoder", setting), value=number))
    assert not check_of(made.resealed(), "config").passed


@pytest.mark.parametrize("path", [("encoder", "eoi_token_index"), ("image_token_index",)], ids=".".join)
def test_tokens_that_no_machine_holds(path: tuple[str, ...], bench: MakeBench) -> None:
    made = bench("images-8")
    made.edit("config.json", partial(put, path=path, value=10**30))
    assert not check_of(made.resealed(), "config").passed


@pytest.mark.parametrize("depth", [100, 500, 900, 5000])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_deep_setting_is_a_stranger(file: str, depth: int, bench: MakeBench) -> None:
    made = bench("images-8")
    nested = b'{"deep": ' + b"[" * depth + b"]" * depth + b", "
    (made.folder / file).write_bytes(made.sound[file].replace(b"{", nested, 1))
    assert not check_of(made.resealed(), "config").passed


def beside(name: str, contents: bytes = b"{}") -> Callable[[Bench], object]:
    return lambda made: (made.folder / name).write_bytes(contents)


def head_beside(made: Bench) -> None:
    zeros = torch.zeros_like(load_file(made.folder / "model.safetensors")["model.decoder.norm.weight"])
    save_file({"model.decoder.norm.weight": zeros}, made.folder / "model-00002-of-00002.safetensors", {"format": "pt"})


def in_two(made: Bench, first: str, second: str, metadata: object = None) -> None:
    """Cut the weights in two files of these names, with an index."""
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
    # transformers takes model.safetensors for the whole model, and leaves the other half random.
    "a shard with the name of a whole model": lambda made: in_two(made, "model.safetensors", CUT[1]),
    # transformers unpickles what is not called .safetensors.
    "shards with other suffixes": lambda made: in_two(made, "model-1.bin", "model-2.bin"),
    # transformers ends with a KeyError or a TypeError.
    "an index without metadata": lambda made: in_two(made, *CUT, metadata="none"),
    "an index whose metadata are a string": lambda made: in_two(made, *CUT, metadata="x"),
    "an index with a wrong size": lambda made: in_two(made, *CUT, metadata={"total_parameters": 1, "total_size": 1}),
    # transformers before 5 refuses it.
    "weights without metadata": with_format(None),
    "weights of another framework": with_format({"format": "tf"}),
    # Loaders that take every *.safetensors, mlx for one, would load it over the sound one.
    "weights beside the weights": head_beside,
    # transformers with peft puts an adapter that it finds on the model without a word.
    "an adapter": beside("adapter_config.json"),
    "pickled weights": beside("pytorch_model.bin"),
    "a stray index": beside(INDEX_FILE, b'{"weight_map": {"model.decoder.norm.weight": "gone.safetensors"}}'),
    "a chat template": beside("chat_template.jinja"),
    "a tokenizer that the source has not": beside("tokenizer.json"),
    "code": beside("modeling_t5gemma2.py"),
}


@pytest.mark.parametrize("label", FOLDERS)
def test_files_that_the_conversion_does_not_write(label: str, bench: MakeBench) -> None:
    made = bench("images-8")
    FOLDERS[label](made)
    assert not made.resealed().passed


def test_a_model_cut_in_two_otherwise_is_the_same_model(bench: MakeBench) -> None:
    """How the shards are cut is nobody's lie; otherwise the mutants above would be caught for nothing."""
    made = bench("images-8")
    in_two(made, *CUT)
    assert made.resealed().passed


@pytest.mark.parametrize("name", ["../elsewhere.json", "a\0b", "", ".", "x" * 5000, "/dev/null"])
def test_names_in_the_manifest_that_are_none(name: str, bench: MakeBench) -> None:
    made = bench("text-float32")
    (made.folder.parent / "elsewhere.json").write_bytes(b"")
    made.reseal(lambda manifest: manifest["files"].update({name: {"bytes": 0, "sha256": None}}))
    assert not check_of(made.judged(), "integrity").passed


def test_a_name_that_is_no_text_is_told(bench: MakeBench) -> None:
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
    assert MANIFEST_FILE in told(check_of(made.judged(), "integrity"))


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
def test_what_is_no_file(name: str, trick: Callable[[Path], None], bench: MakeBench) -> None:
    made = bench("text-float32")
    trick(made.folder / name)
    assert name in told(check_of(made.judged(), "integrity"))


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
    """The seal is what this module takes it for; otherwise every mutant above would be caught by it."""
    made = bench("text-float32")
    made.reseal()
    assert (made.folder / MANIFEST_FILE).read_bytes() == made.sound[MANIFEST_FILE]
    document = read_json_object(made.folder / MANIFEST_FILE)
    assert seal(document) == made.sound[MANIFEST_FILE]
    made.edit(MANIFEST_FILE, lambda manifest: manifest.update(notes=[]))
    assert MANIFEST_FILE in told(check_of(made.judged(), "integrity"))


def test_hundreds_of_mutants_are_tried() -> None:
    """Every family asserts its own minimum and that none survived: this is their sum, whoever ran them."""
    print(f"\nmutants at least: {sum(MINIMA.values())} in {len(MINIMA)} families")
    assert sum(MINIMA.values()) >= 300
