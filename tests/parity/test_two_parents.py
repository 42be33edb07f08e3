"""Verification of models with layer selections, two parents, or the other parent's table."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from t5g2convert import Report, UsageError, convert, verify
from t5g2convert.checkpoint.families.gemma3 import Gemma3, read_gemma3
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.parity.checks.config import expected_config
from t5g2convert.parity.source_models import StackSettings
from tests.conftest import TwinFolder
from tests.parity.mutations import (
    TABLE,
    Bench,
    Document,
    MakeBench,
    Tally,
    Tensors,
    check_of,
    close,
    departs,
    exchange,
    layer_names,
    message_of,
)

CUT = {"encoder_layers": [0, 2, 4, 5, 8, 10, 12], "decoder_layers": [1, 4, 5, 9, 11]}
"""Of text-13: both stacks have a full layer, where Gemma 3's own pattern would have another, or none."""

Edit = Callable[[Document], object]


def failed(report: Report) -> set[str]:
    return {check.name for check in report.failed}


def options_are(**options: Any) -> Edit:
    return lambda manifest: manifest.update(options=options)


@pytest.fixture
def cut(bench: MakeBench) -> Bench:
    """Return a conversion with seven and five of thirteen layers."""
    return bench("text-13", **CUT)


@pytest.fixture(params=["source", "decoder-from"])
def paired(request: pytest.FixtureRequest, bench: MakeBench, twin_folder: TwinFolder) -> tuple[Bench, Path, str]:
    """Return a conversion with another parent for the decoder, that parent, and the table's owner."""
    other = twin_folder("text-unlike-7")
    return bench("text-8", decoder_from=other, embedding_from=request.param), other, request.param


# Sound conversions


def test_a_cut_model_is_compared_with_its_own_layers(cut: Bench) -> None:
    report = cut.judge()
    assert report.passed
    assert "13 layers: 1, 4, 5, 9, 11" in "\n".join(report.remarks)
    figures = {name: check_of(report, name).figures for name in ("encoder_parity", "decoder_parity")}
    for (name, figure), depth in zip(figures.items(), (7, 5), strict=True):
        assert figure is not None, name
        assert [drift.layer for drift in figure.drifts] == [
            "embed_tokens",
            *(f"layers.{number}" for number in range(depth)),
            "norm",
        ]
        assert figure.max_abs == 0


def test_layers_that_no_stack_uses_are_counted(cut: Bench) -> None:
    # Layers 3, 6 and 7, with 13 tensors each.
    assert check_of(cut.judge(), "provenance").detail.endswith("; 39 were dropped, as declared")


def test_the_other_parent_is_computed_with_the_target_table(paired: tuple[Bench, Path, str]) -> None:
    made, other, table = paired
    report = made.judge(decoder_from=other)
    assert report.passed, report.failed
    owners = {"source": ("decoder's parent", "source"), "decoder-from": ("source", "decoder's parent")}[table]
    assert f"the {owners[0]} is computed with the {owners[1]}'s embedding table, as in the target" in (report.remarks)
    detail = check_of(report, "provenance").detail
    assert "are the source's byte for byte" in detail
    assert "are the decoder's parent's byte for byte" in detail


def test_equal_layers_of_one_parent_are_computed_once(bench: MakeBench) -> None:
    progress: dict[bool, list[str]] = {}
    for alike in (True, False):
        made = bench("text-8", encoder_layers="first:4", decoder_layers="first:4" if alike else "first:3")
        progress[alike] = []
        assert made.judge(progress=progress[alike].append).passed
        shutil.rmtree(made.folder)
        shutil.rmtree(made.folder.with_name("converted"))
    layers = {alike: [line for line in lines if line.startswith("layer ")] for alike, lines in progress.items()}
    assert layers[True] == [f"layer {number} of 4" for number in range(1, 5)]
    assert layers[False] == [
        *(f"layer {number} of 3 of the decoder" for number in range(1, 4)),
        *(f"layer {number} of 4 of the encoder" for number in range(1, 5)),
    ]


# With and without the other parent


def test_without_the_decoders_parent_verification_is_refused(paired: tuple[Bench, Path, str]) -> None:
    made, other, _ = paired
    with pytest.raises(UsageError, match="--decoder-from"):
        made.judge()
    with pytest.raises(UsageError, match="need --source"):
        verify(made.folder, decoder_from=other, record=False)


def test_another_parent_of_the_decoder_does_not_pass(paired: tuple[Bench, Path, str], twin_folder: TwinFolder) -> None:
    made, _, _ = paired
    for name in ("text-sharded", "text-13", "images-8"):
        report = made.judge(decoder_from=twin_folder(name))
        assert {"provenance", "config", "decoder_parity"} <= failed(report), name


def test_source_and_decoders_parent_cannot_be_swapped(paired: tuple[Bench, Path, str]) -> None:
    made, other, _ = paired
    report = verify(made.folder, other, decoder_from=made.source, record=False)
    assert {"provenance", "config", "decoder_parity", "encoder_parity"} <= failed(report)


def test_decoder_from_is_refused_for_a_single_parent(bench: MakeBench, twin_folder: TwinFolder) -> None:
    made = bench("text-8")
    # Even if it is the source again.
    for other in (twin_folder("text-sharded"), made.source):
        with pytest.raises(UsageError, match="its decoder is not from another checkpoint"):
            made.judge(decoder_from=other)


# Damage to the layers


def move(tensors: Tensors, part: str, layers: list[int], to: list[int]) -> None:
    """Move layers of a stack."""
    names = {number: layer_names(tensors, f"model.{part}.", number) for number in layers}
    kept = {
        (number, name): tensors[f"model.{part}.layers.{number}.{name}"].clone()
        for number, own in names.items()
        for name in own
    }
    for number, target in zip(layers, to, strict=True):
        for name in names[number]:
            tensors[f"model.{part}.layers.{target}.{name}"].copy_(kept[number, name])


@pytest.mark.slow
def test_V2_moved_layers_of_a_selection(cut: Bench) -> None:
    tally = Tally()
    for part, numbers in (("encoder", CUT["encoder_layers"]), ("decoder", CUT["decoder_layers"])):
        depth = len(numbers)
        swaps = [[one, other] for one in range(depth) for other in range(one + 1, depth)]
        for layers, to in [*((pair, pair[::-1]) for pair in swaps), (list(range(depth)), [*range(1, depth), 0])]:
            with cut.tensors() as tensors:
                move(tensors, part, layers, to)
            report = cut.resealed()
            tally.add(f"{part} {layers} to {to}", report)
            assert failed(report) == {"provenance", f"{part}_parity"}
            first = min(layers)
            own = "" if numbers[first] == first else f", the parent's layers.{numbers[first]}"
            assert departs(report, f"{part}_parity").startswith(f"{part} layers.{first} (")
            assert f"_attention{own})," in departs(report, f"{part}_parity")
    close(tally, "pairings, layers")


@pytest.mark.parametrize("shift", [-1, 1])
def test_V2_a_shifted_selection(shift: int, cut: Bench, tmp_path: Path) -> None:
    """Use the layers before or after those in the manifest, with their kinds."""
    shifted = [layer + shift for layer in CUT["decoder_layers"]]
    convert(cut.source, tmp_path / "shifted", encoder_layers=CUT["encoder_layers"], decoder_layers=shifted)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tmp_path / "shifted" / name, cut.folder / name)
    report = cut.resealed()
    assert failed(report) == {"provenance", "config", "decoder_parity"}
    assert departs(report, "decoder_parity").startswith("decoder layers.0 (sliding_attention, the parent's layers.1)")


def test_V2_kinds_that_did_not_move_with_their_layers(cut: Bench) -> None:
    """Apply Gemma 3's own pattern to the remaining layers."""
    for part, first in (("encoder", 3), ("decoder", 2)):

        def forget(config: Document, part: str = part) -> None:
            stack = config["encoder"]["text_config"] if part == "encoder" else config["decoder"]
            pattern = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(13)]
            assert stack["layer_types"] != pattern[: stack["num_hidden_layers"]]
            stack["layer_types"] = pattern[: stack["num_hidden_layers"]]

        cut.edit("config.json", forget)
        report = cut.resealed()
        assert {"config", f"{part}_parity"} <= failed(report)
        assert "layer_types" in message_of(check_of(report, "config"))
        assert departs(report, f"{part}_parity").startswith(f"{part} layers.{first} (sliding_attention")


# Damage of the wrong parent


@pytest.mark.sampled
@pytest.mark.parametrize("table", ["source", "decoder-from"])
def test_V2_a_decoder_of_the_wrong_parent(
    table: str, bench: MakeBench, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    other = twin_folder("text-sharded")
    made = bench("text-8", decoder_from=other, embedding_from=table)
    sources = load_file(converted_twin("text-8") / "model.safetensors")
    for layer in (*range(8), None):
        with made.tensors() as tensors:
            start = "model.decoder." if layer is None else f"model.decoder.layers.{layer}."
            for name in tensors:
                if name.startswith(start):
                    tensors[name].copy_(sources[name])
        report = made.resealed(decoder_from=other)
        assert failed(report) == {"provenance", "decoder_parity"}
        assert departs(report, "decoder_parity").startswith(f"decoder layers.{layer or 0} (")


def test_V2_a_table_of_the_wrong_parent(paired: tuple[Bench, Path, str]) -> None:
    made, other, table = paired
    wrong = other if table == "source" else made.source
    with made.tensors() as tensors:
        tensors[TABLE].copy_(load_file(wrong / "model.safetensors")["model.embed_tokens.weight"])
    report = made.resealed(decoder_from=other)
    assert failed(report) == {"provenance", "decoder_parity", "encoder_parity"}
    for part in ("encoder", "decoder"):
        assert departs(report, f"{part}_parity").startswith("embed_tokens")


def test_V2_a_few_rows_of_the_wrong_table(paired: tuple[Bench, Path, str]) -> None:
    made, other, table = paired
    wrong = other if table == "source" else made.source
    with made.tensors() as tensors:
        tensors[TABLE][7].copy_(load_file(wrong / "model.safetensors")["model.embed_tokens.weight"][7])
    report = made.resealed(decoder_from=other)
    assert {"provenance", "decoder_parity"} <= failed(report)
    assert f"{TABLE}[7, 0]" in message_of(check_of(report, "provenance"))


def test_V2_swapped_stacks(bench: MakeBench, twin_folder: TwinFolder) -> None:
    other = twin_folder("text-sharded")
    made = bench("text-8", decoder_from=other)
    with made.tensors() as tensors:
        for name in [name for name in tensors if name.startswith("model.decoder.")]:
            exchange(tensors, name, name.replace("model.decoder.", "model.encoder."))
    assert failed(made.resealed(decoder_from=other)) == {"provenance", "decoder_parity", "encoder_parity"}


# Settings


@pytest.mark.slow
def test_V2_a_setting_of_the_other_stack(paired: tuple[Bench, Path, str]) -> None:
    """Every setting that differs between the parents is wrong in the other stack."""
    made, other, _ = paired
    sound, tally = json.loads(made.sound["config.json"]), Tally()
    encoder, decoder = sound["encoder"]["text_config"], sound["decoder"]
    sizes = {"num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "num_hidden_layers"}
    differing = [name for name in decoder if name != "model_type" and encoder[name] != decoder[name]]
    assert {*sizes, "sliding_window", "rope_parameters", "rms_norm_eps", "eos_token_id"} <= {*differing}
    for part in ("encoder", "decoder"):
        for name in differing:

            def put(config: Document, part: str = part, name: str = name) -> None:
                stacks = {"encoder": config["encoder"]["text_config"], "decoder": config["decoder"]}
                other_part = "decoder" if part == "encoder" else "encoder"
                stacks[part][name] = stacks[other_part][name]

            made.edit("config.json", put)
            report = made.resealed(decoder_from=other)
            tally.add(f"{part} {name}", report)
            assert "config" in failed(report)
            if name in {"sliding_window", "rope_parameters", "rms_norm_eps", "query_pre_attn_scalar"}:
                assert f"{part}_parity" in failed(report), name
    close(tally, "pairings, settings")


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_V2_another_token_to_start_or_end_with(name: str, paired: tuple[Bench, Path, str]) -> None:
    made, other, _ = paired
    for file in ("config.json", "generation_config.json"):
        made.edit(file, lambda document: document.update({name: 77 if document[name] != [1, 106] else 1}))
        assert failed(made.resealed(decoder_from=other)) == {"config"}


# False manifests


FALSE_FIELDS: dict[str, tuple[Edit, set[str]]] = {
    "a layer that was not taken": (
        options_are(encoder_layers=CUT["encoder_layers"], decoder_layers=[1, 4, 5, 9, 10]),
        {"provenance", "decoder_parity"},
    ),
    "a full layer for a sliding one": (
        options_are(encoder_layers=CUT["encoder_layers"], decoder_layers=[1, 5, 6, 9, 11]),
        {"provenance", "config", "decoder_parity"},
    ),
    "a layer more": (
        options_are(encoder_layers=CUT["encoder_layers"], decoder_layers=[1, 4, 5, 9, 11, 12]),
        {"provenance", "config", "decoder_parity"},
    ),
    "a layer less": (
        options_are(encoder_layers=CUT["encoder_layers"], decoder_layers=[1, 4, 5, 9]),
        {"provenance", "config", "decoder_parity"},
    ),
    "the selections exchanged": (
        options_are(encoder_layers=CUT["decoder_layers"], decoder_layers=CUT["encoder_layers"]),
        {"provenance", "config", "decoder_parity", "encoder_parity"},
    ),
    "no selection of the encoder": (
        options_are(decoder_layers=CUT["decoder_layers"]),
        {"provenance", "config", "encoder_parity"},
    ),
    "no selection at all": (options_are(), {"provenance", "config", "decoder_parity", "encoder_parity"}),
    "another table": (
        lambda manifest: manifest.update(
            options={**CUT, "embedding_from": "decoder-from"}, decoder_from=manifest["source"]
        ),
        {"provenance"},
    ),
    "layers that were not left behind": (lambda manifest: manifest.update(dropped=[]), {"provenance"}),
    "a layer too many left behind": (
        lambda manifest: manifest["dropped"].append({"name": "model.layers.0.mlp.up_proj.weight", "because": ""}),
        {"provenance"},
    ),
}


@pytest.mark.parametrize("false_field", FALSE_FIELDS)
def test_V2_a_false_selection(false_field: str, cut: Bench) -> None:
    change, expected = FALSE_FIELDS[false_field]
    cut.reseal(change)
    report = cut.judge(decoder_from=cut.source) if false_field == "another table" else cut.judge()
    assert expected <= failed(report)
    assert "integrity" not in failed(report)


@pytest.mark.slow
def test_V2_false_fields_of_a_whole_conversion(bench: MakeBench, twin_folder: TwinFolder) -> None:
    made, other, tally = bench("text-8"), twin_folder("text-sharded"), Tally()
    for part in ("encoder", "decoder"):
        for layers in (list(range(7)), [7], list(range(0, 8, 2)), list(range(1, 8)), list(range(8))):
            made.reseal(options_are(**{f"{part}_layers": layers}))
            report = made.judged()
            tally.add(f"{part} {layers}", report)
            assert "provenance" in failed(report)
            if len(layers) < 8:
                assert {"config", f"{part}_parity"} <= failed(report)
    parent = read_json_object(made.folder / "t5g2.json")["source"]
    for options in ({}, {"embedding_from": "decoder-from"}):
        made.reseal(lambda manifest, options=options: manifest.update(decoder_from=parent, options=options))
        report = made.judged(decoder_from=other)
        tally.add(f"a decoder of another parent, {options}", report)
        assert {"provenance", "decoder_parity"} <= failed(report)
    close(tally, "pairings, lies")


def test_V2_a_manifest_that_hides_the_decoders_parent(paired: tuple[Bench, Path, str]) -> None:
    made, other, _ = paired
    made.reseal(lambda manifest: (manifest.pop("decoder_from"), manifest["options"].pop("embedding_from", None)))
    with pytest.raises(UsageError, match="its decoder is not from another checkpoint"):
        made.judge(decoder_from=other)
    assert {"provenance", "config", "decoder_parity"} <= failed(made.judge())


def test_V2_a_false_table_owner_in_the_manifest(paired: tuple[Bench, Path, str]) -> None:
    made, other, table = paired
    false_field = {} if table == "decoder-from" else {"embedding_from": "decoder-from"}
    made.reseal(options_are(**false_field))
    report = made.judge(decoder_from=other)
    assert failed(report) == {"provenance", "decoder_parity", "encoder_parity"}


@pytest.mark.sampled
@pytest.mark.parametrize(
    "false_field",
    [
        lambda parent: parent.update(family="gemma3"),
        lambda parent: parent["layout"].update(text="language_model.model."),
        lambda parent: parent["files"]["model.safetensors"].update(bytes=1),
        lambda parent: parent["files"].pop("model.safetensors"),
        lambda parent: parent["files"]["config.json"].update(sha256="0" * 64),
    ],
    ids=["family", "layout", "bytes", "file", "config"],
)
def test_V2_a_false_decoder_parent_in_the_manifest(false_field: Edit, paired: tuple[Bench, Path, str]) -> None:
    made, other, _ = paired
    made.reseal(lambda manifest: false_field(manifest["decoder_from"]))
    assert failed(made.judge(decoder_from=other)) == {"provenance"}


def test_layers_that_no_parent_has_fail_dependent_checks(cut: Bench) -> None:
    cut.reseal(options_are(**CUT | {"decoder_layers": [1, 4, 5, 9, 13]}))
    report = cut.judge()
    assert failed(report) == {"provenance", "config", "decoder_parity", "encoder_parity"}
    assert "takes layer 13, the decoder's parent has 13 layers" in check_of(report, "provenance").detail
    for name in ("config", "decoder_parity", "encoder_parity"):
        expected = "t5g2.json names layer 13, but the decoder's parent has 13 layers"
        assert check_of(report, name).detail == expected


@pytest.mark.parametrize("layers", [[], [2, 2], [3, 1], [-1], [True], "0:3", [0.5]], ids=str)
def test_impossible_layers_fail_integrity(layers: object, cut: Bench) -> None:
    cut.reseal(options_are(decoder_layers=layers))
    assert "integrity" in failed(cut.judge())


# The expected config alone


def gemma3(folder: Path) -> Gemma3:
    return read_gemma3(read_json_object(folder / "config.json"), folder)


def test_the_expected_config_takes_each_stack_from_its_parent(twin_folder: TwinFolder) -> None:
    source, other = gemma3(twin_folder("images-8")), gemma3(twin_folder("text-unlike-7"))
    expected = expected_config(source, {}, StackSettings(source.text, other.text, 300))
    encoder, decoder = expected["encoder"]["text_config"], expected["decoder"]
    assert (encoder["head_dim"], decoder["head_dim"]) == (10, 12)
    assert (encoder["sliding_window"], decoder["sliding_window"]) == (5, 9)
    assert (encoder["eos_token_id"], decoder["eos_token_id"], expected["eos_token_id"]) == (1, [1, 106], [1, 106])
    assert encoder["rope_parameters"]["full_attention"]["factor"] == 1.0
    assert decoder["rope_parameters"]["full_attention"]["factor"] == 8.0
    assert expected["image_token_index"] == 292


def test_the_row_count_is_that_of_the_chosen_table(twin_folder: TwinFolder) -> None:
    source = gemma3(twin_folder("text-8"))
    for rows, changes, expected in ((262_144, {}, 262_144), (262_208, {"vocab_size": 262_144}, 262_144)):
        config = expected_config(source, changes, replace(StackSettings(source.text, source.text, 300), rows=rows))
        stacks = config["encoder"]["text_config"], config["decoder"]
        assert [stack["vocab_size"] for stack in (config, *stacks)] == [expected] * 3


def test_parents_of_two_dtypes_are_compared_in_the_larger_ones_dtype(twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(twin_folder("text-8"), tmp_path / "pair", decoder_from=twin_folder("text-float32"))
    report = verify(tmp_path / "pair", twin_folder("text-8"), decoder_from=twin_folder("text-float32"), record=False)
    assert report.passed, report.failed
    assert report.dtype == "float32"
    options = {"encoder_layers": "first:1", "decoder_layers": "first:1", "vision_from": twin_folder("images-float32")}
    convert(twin_folder("text-8"), tmp_path / "tower", **options)
    report = verify(tmp_path / "tower", twin_folder("text-8"), vision_from=options["vision_from"], record=False)
    assert report.passed, report.failed
    assert report.dtype == "bfloat16"
