"""V1: tensors, shards and names are damaged, and the manifest resealed; nothing may pass."""

import random
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import convert
from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.batches import BEYOND_WINDOW, token_batch
from t5g2convert.parity.verify import verify
from tests.conftest import TwinFolder
from tests.models.twins import BY_NAME
from tests.parity.mutations import (
    EOI,
    LAYER_ORDER,
    OPERATORS,
    PARITIES,
    PROJECTOR,
    TABLE,
    TOWER,
    Bench,
    Document,
    MakeBench,
    Tally,
    Tensors,
    check_of,
    close,
    departs,
    double,
    earliest,
    exchange,
    flip_exponent,
    flip_sign,
    layer_names,
    message_of,
    place_of,
    put_inf,
    put_nan,
    shift_rows,
    zero,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_source")]


@pytest.mark.parametrize("name", ["images-13", "images-8", "text-float32", "text-with-fill", "images-with-fill"])
def test_an_undamaged_model_passes(name: str, bench: MakeBench) -> None:
    made = bench(name)
    made.reseal()
    assert (made.folder / MANIFEST_FILE).read_bytes() == made.sound[MANIFEST_FILE]
    report = made.judged()
    assert report.passed, report.failed
    assert {check.name for check in report.checks} >= {"integrity", "provenance", "config", *PARITIES[1:], "runs"}


# Tensors


def judge_tensor(made: Bench, name: str, tally: Tally, label: str) -> None:
    """Expect provenance to name the tensor, and only its part's parity check its layer and module."""
    report = made.resealed()
    tally.add(f"{label} {name}", report)
    assert name in message_of(check_of(report, "provenance")), label
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
            # Seven and 13 (the tensors of a layer) are coprime: each tensor gets another change in every layer.
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
            assert f"{TABLE}[{row}, " in message_of(check_of(report, "provenance"))
            # An output row counts even if no input token uses it.
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
    assert name in message_of(check_of(report, "provenance")), label
    for parity in PARITIES[1:]:
        if name == EOI or label in ("zero", "shift_rows"):
            assert departs(report, parity).startswith("embed_tokens, at token"), label


@pytest.mark.parametrize("name", ["images-13", "text-with-fill", "text-float32"])
def test_every_wrong_end_of_image_vector(name: str, bench: MakeBench, without_use: None) -> None:
    made, twin = bench(name), BY_NAME[name]
    with made.tensors() as tensors:
        sound, table = tensors[EOI].clone(), tensors[TABLE].clone()
    if not twin.has_eoi:
        # Without the token the row is zeros that nothing reads; only its bytes show the damage.
        with made.tensors() as tensors:
            tensors[EOI][0] = 1.0
        report = made.resealed()
        assert f"{EOI}[0] is not zero" in message_of(check_of(report, "provenance"))
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
            # A large vocabulary is slow, and in eight elements both orders of rounding may agree.
            continue
        assert not torch.equal(vector, sound), label
        with made.tensors() as tensors:
            tensors[EOI].copy_(vector)
        judge_embedding(made, EOI, tally, label)
    tally.close(f"end-of-image vector, {name}", 2)


def test_swapped_tensors(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-8"), Tally()
    with made.tensors() as tensors:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    pairs = []
    for prefix in ("model.encoder.layers.2.", "model.decoder.layers.5.", f"{TOWER}encoder.layers.1."):
        names = [name for name in shapes if name.startswith(prefix) and not name.endswith("bias")]
        # Gate and up, keys and values, and norms: all swaps that a loader accepts.
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
        assert all(name in message_of(check_of(report, "provenance")) for name in pair)
        parity, place = place_of(earliest(list(pair)))
        found = departs(report, parity)
        before, _, after = place.partition("{kind}")
        assert found.startswith(before), pair
        assert found.endswith(after), pair
        assert {check.name for check in report.failed} == {"provenance", parity}, (pair, kinds.name)
    close(tally, "exchanged")


def test_swapped_layers(bench: MakeBench, without_use: None) -> None:
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


def test_swapped_stacks_have_the_same_bytes(bench: MakeBench) -> None:
    made = bench("images-8")
    with made.tensors() as tensors:
        for name in [name for name in tensors if name.startswith("model.decoder.")]:
            exchange(tensors, name, name.replace(".decoder.", ".encoder."))
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == made.sound
    assert made.judge().passed


def test_the_sign_of_a_zero_is_a_byte_of_the_source(twin_folder: TwinFolder, tmp_path: Path, without_use: None) -> None:
    """No forward pass sees this change: -0.0 and 0.0 are equal numbers."""
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
    assert f"{name}[0, 0] is not" in message_of(check_of(report, "provenance"))
    assert {check.name for check in report.failed} == {"provenance"}


@pytest.mark.parametrize("where", ["model.layers.3.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_both_models_is_not_equality(where: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(twin_folder("text-float32"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[where][:] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", allow_nonfinite=True)
    for tolerance in (0.0, 0.999):
        with pytest.raises(CheckpointError, match=r"own states after .* are not finite in float32") as caught:
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
    # The rows at the softmax slice boundaries, the image token's row, and the last row.
    for number, row in enumerate((16_383, 16_384, 256_001, last)):
        with made.tensors() as tensors:
            (put_inf, double, zero, flip_exponent)[number](tensors[TABLE][row])
        report = made.resealed()
        tally.add(f"row {row}", report)
        assert f"{TABLE}[{row}, " in message_of(check_of(report, "provenance"))
        assert departs(report, "decoder_parity").startswith("embed_tokens")
    with made.tensors() as tensors:
        fill = load_file(made.source / "model.safetensors")["language_model.model.embed_tokens.weight"][262_144:]
        tensors[TABLE][-64:] = fill
    report = made.resealed()
    tally.add("fill in place of the last rows", report)
    assert f"{TABLE}[262080, " in message_of(check_of(report, "provenance"))
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
        text = "\n".join(message_of(check) for check in report.failed)
        assert all(word in text for word in words), (label, text)

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
        assert named in message_of(check_of(report, "provenance")), label
        if "float" not in label and label != "integers":
            # The tensors implied by the config are computed without the map.
            assert named in message_of(check_of(report, "config")), label
    close(tally, "structure")
