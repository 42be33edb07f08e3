"""A decoder from another parent, layer selections, the other table: plan and output."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t5g2convert import CheckpointError, MappingError, OutputError, UsageError, convert, plan
from tests.conftest import TwinFolder
from tests.models.twins import IMAGE_SPELLINGS, TEXT_SPELLINGS, respell

TABLE = "model.encoder.embed_tokens.weight"
EOI = "model.encoder.embed_tokens.eoi_embedding"
Tensors = dict[str, Tensor]


def tensors(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "t5g2.json").read_text()))


def edited(folder: Path, copy: Path, change: Callable[[Tensors], object]) -> Path:
    """Copy a checkpoint with other tensors."""
    shutil.copytree(folder, copy)
    held = load_file(copy / "model.safetensors")
    change(held)
    save_file(held, copy / "model.safetensors", {"format": "pt"})
    return copy


def fresh(folder: Path, copy: Path, **settings: Any) -> Path:
    """Copy a checkpoint with other text settings."""
    shutil.copytree(folder, copy)
    document = config(copy)
    document.get("text_config", document).update(settings)
    (copy / "config.json").write_text(json.dumps(document))
    return copy


# Layers


@pytest.mark.parametrize("spec", ["0:13:4", "0,4,8,12", [0, 4, 8, 12], range(0, 13, 4)], ids=str)
def test_layer_i_of_a_stack_is_the_ith_selected_layer(
    spec: Any, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    done = convert(twin_folder("text-13"), tmp_path / "out", decoder_layers=spec)
    found, whole = tensors(tmp_path / "out"), tensors(converted_twin("text-13"))
    for name, tensor in found.items():
        start, layer, rest = name.partition("model.decoder.layers.")
        if not layer:
            assert torch.equal(tensor, whole[name]), name
            continue
        number, _, rest = rest.partition(".")
        assert torch.equal(tensor, whole[f"{start}{layer}{4 * int(number)}.{rest}"]), name
    assert sum(name.startswith("model.decoder.layers.") for name in found) == 4 * 13
    settings, sound = config(tmp_path / "out"), config(converted_twin("text-13"))
    assert settings["decoder"]["num_hidden_layers"] == 4
    kinds = sound["decoder"]["layer_types"]
    assert settings["decoder"]["layer_types"] == [kinds[number] for number in (0, 4, 8, 12)]
    assert settings["encoder"] == sound["encoder"]
    assert manifest(tmp_path / "out")["options"] == {"decoder_layers": [0, 4, 8, 12]}
    assert done.parameters["decoder"] < done.parameters["encoder"]


def test_kinds_go_with_their_layers(twin_folder: TwinFolder) -> None:
    made = plan(twin_folder("text-13"), encoder_layers="5:7", decoder_layers="0,5,11")
    full, sliding = "full_attention", "sliding_attention"
    assert made.config["encoder"]["text_config"]["layer_types"] == [full, sliding]
    assert made.config["decoder"]["layer_types"] == [sliding, full, full]


def test_all_layers_are_not_recorded_as_a_selection(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("text-8"), tmp_path / "out", encoder_layers="first:8", decoder_layers=list(range(8)))
    one, two = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "out", converted_twin("text-8"))
    )
    assert one == two


def test_unused_layers_are_dropped_by_name_and_counted(twin_folder: TwinFolder) -> None:
    made = plan(twin_folder("text-8"), encoder_layers="first:6", decoder_layers="0:8:3")
    assert {drop.name.split(".")[2] for drop in made.dropped} == {"7"}
    assert {drop.because for drop in made.dropped} == {"no stack takes layer 7"}
    assert len(made.dropped) == 13
    assert "13 source tensor(s) are not used: the target has no place for them" in made.notes
    assert "the encoder takes 6 of its parent's 8 layers: 0, 1, 2, 3, 4, 5" in made.notes
    assert "the decoder takes 3 of its parent's 8 layers: 0, 3, 6" in made.notes
    # One layer of full attention is in the encoder, none in the decoder.
    found = [note for note in made.notes if "full-attention" in note]
    assert found == [
        "--decoder-layers 0:8:3 keeps no full-attention layer: each layer of the decoder sees only 7 tokens; "
        "0,3,5 keeps 1"
    ]


def test_the_selection_that_a_note_names_keeps_full_attention(twin_folder: TwinFolder) -> None:
    made = plan(twin_folder("text-13"), decoder_layers="0:13:2")
    (found,) = [note for note in made.notes if "full-attention" in note]
    assert found.startswith("--decoder-layers 0:13:2 keeps no full-attention layer")
    selection = found.rpartition("; ")[2].partition(" keeps ")[0]
    after = plan(twin_folder("text-13"), decoder_layers=selection)
    assert after.config["decoder"]["layer_types"].count("full_attention") == int(found.rpartition(" ")[2])
    assert not any("full-attention" in note for note in after.notes)


@pytest.mark.parametrize("options", [{"decoder_layers": "1:8:2"}, {"encoder_layers": "first:6"}])
def test_a_stack_that_lacks_layers_must_be_trained(options: dict[str, Any], twin_folder: TwinFolder) -> None:
    assert sum("must be trained before use" in note for note in plan(twin_folder("text-8"), **options).notes) == 1
    assert not any("must be trained before use" in note for note in plan(twin_folder("text-8")).notes)


def test_a_source_is_whole_whatever_is_taken_of_it(twin_folder: TwinFolder, tmp_path: Path) -> None:
    lacking = edited(
        twin_folder("text-8"), tmp_path / "lacking", lambda held: held.pop("model.layers.7.mlp.up_proj.weight")
    )
    stranger = edited(
        twin_folder("text-8"), tmp_path / "more", lambda held: held.update({"model.layers.8.x": torch.zeros(2)})
    )
    for folder, says in ((lacking, "missing: model.layers.7.mlp.up_proj"), (stranger, "unused: model.layers.8.x")):
        with pytest.raises(CheckpointError) as caught:
            plan(folder, encoder_layers="first:3", decoder_layers="first:3")
        assert any(says in detail for detail in caught.value.details)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_layer_that_the_parent_lacks_is_refused(part: str, twin_folder: TwinFolder) -> None:
    for spec in ("first:9", "7:9", [8]):
        with pytest.raises(MappingError, match=f"--{part}-layers takes layer 8, the {part}'s parent has 8 layers"):
            plan(twin_folder("text-8"), **{f"{part}_layers": spec})  # type: ignore[arg-type]
    # The depth is that of the decoder's own parent.
    if part == "decoder":
        with pytest.raises(MappingError, match="takes layer 7, the decoder's parent has 7 layers"):
            plan(twin_folder("text-8"), decoder_from=twin_folder("text-unlike-7"), decoder_layers="0,7")


# Another parent


@pytest.mark.parametrize("table", ["source", "decoder-from"])
def test_each_part_is_its_own_parents(
    table: str, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    convert(twin_folder("images-8"), tmp_path / "out", decoder_from=twin_folder("text-unlike-7"), embedding_from=table)
    found = tensors(tmp_path / "out")
    source, other = tensors(converted_twin("images-8")), tensors(converted_twin("text-unlike-7"))
    for name, tensor in found.items():
        if name == EOI:
            continue
        own = other if name.startswith("model.decoder.") or (name == TABLE and table != "source") else source
        assert torch.equal(tensor, own[name]), name
    # The end-of-image token is the source's; its row is from the chosen table.
    assert torch.equal(found[EOI], found[TABLE][291] * torch.tensor(24**0.5).to(torch.bfloat16))
    settings = config(tmp_path / "out")
    assert settings["encoder"] == config(converted_twin("images-8"))["encoder"]
    assert settings["decoder"] == config(converted_twin("text-unlike-7"))["decoder"]


def test_start_and_end_tokens_are_the_decoders(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    for folder, name in ((source, "text-8"), (other, "text-unlike-7")):
        shutil.copytree(twin_folder(name), folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"added": name}))
        (folder / "chat_template.jinja").write_text(name)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106, 7]}))
    convert(source, tmp_path / "out", decoder_from=other)
    settings = config(tmp_path / "out")
    assert settings["eos_token_id"] == settings["decoder"]["eos_token_id"] == [1, 106]
    assert settings["encoder"]["text_config"]["eos_token_id"] == 1
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 106, 7], "pad_token_id": 0}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added"] == "text-8"
    assert (tmp_path / "out/chat_template.jinja").read_text() == "text-8"


def test_the_end_tokens_of_the_source_are_its_own(twin_folder: TwinFolder, tmp_path: Path) -> None:
    """The source's generation_config.json does not replace a missing one of the decoder's parent."""
    shutil.copytree(twin_folder("text-8"), tmp_path / "source")
    (tmp_path / "source/generation_config.json").write_text(json.dumps({"eos_token_id": [1, 99]}))
    shutil.copytree(twin_folder("text-unlike-7"), tmp_path / "other")
    (tmp_path / "other/generation_config.json").unlink()
    made = plan(tmp_path / "source", decoder_from=tmp_path / "other")
    assert made.generation_config is not None
    assert made.generation_config["eos_token_id"] == [1, 106]


def test_plan_and_manifest_name_both(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, other = twin_folder("text-8"), tmp_path / "other"
    respell(twin_folder("images-13"), other, IMAGE_SPELLINGS["hub"])
    made = plan(source, decoder_from=other, decoder_layers="first:2")
    document = made.to_json()
    assert document["sources"]["source"] == {"name": "text-8", "family": "gemma3_text", "layout": {"text": "model."}}
    assert document["sources"]["decoder_from"]["name"] == "other"
    assert document["sources"]["decoder_from"]["family"] == "gemma3"
    assert document["sources"]["decoder_from"]["layout"]["text"] == "language_model.model."
    origins = {item["part"]: item["from"] for item in document["tensors"] if item["from"] is not None}
    assert origins["decoder"].startswith("decoder_from/language_model.model.")
    assert origins["encoder"].startswith("model.")
    convert(source, tmp_path / "out", decoder_from=other, decoder_layers="first:2")
    found = manifest(tmp_path / "out")
    assert found["options"] == {"decoder_layers": [0, 1]}
    assert found["decoder_from"]["family"] == "gemma3"
    assert found["decoder_from"]["files"].keys() == {"model.safetensors", "config.json"}
    assert all(len(facts["sha256"]) == 64 for facts in found["decoder_from"]["files"].values())
    assert str(tmp_path) not in (tmp_path / "out/t5g2.json").read_text()


def test_of_a_sharded_parent_only_the_files_with_its_layers_are_read(twin_folder: TwinFolder) -> None:
    made = plan(twin_folder("text-8"), decoder_from=twin_folder("text-sharded"), decoder_layers="2:3")
    read = set(made.reads["decoder_from"])
    assert 0 < len(read) < len(list(twin_folder("text-sharded").glob("*.safetensors")))
    # 13 of the layer, and the last norm.
    assert "14 tensors are the decoder's parent's; its other 92 are not used" in made.notes


def test_a_table_that_is_not_taken_is_dropped(twin_folder: TwinFolder) -> None:
    made = plan(twin_folder("text-8"), decoder_from=twin_folder("text-sharded"), embedding_from="decoder-from")
    (drop,) = made.dropped
    assert (drop.name, drop.because) == (
        "model.embed_tokens.weight",
        "the embedding table is the decoder's parent's",
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parents_of_two_dtypes_are_kept_or_cast(dtype: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    options: dict[str, Any] = {"decoder_from": twin_folder("text-float32")}
    kept = plan(twin_folder("text-8"), **options)
    assert {tensor.part: tensor.dtype for tensor in kept.tensors} | {} == {
        "embedding": "BF16", "encoder": "BF16", "decoder": "F32", "vision": "F32", "projector": "F32",
    }  # fmt: skip
    assert any("several dtypes" in note for note in kept.notes)
    convert(twin_folder("text-8"), tmp_path / "out", dtype=dtype, **options)
    found = tensors(tmp_path / "out")
    assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}
    name = "layers.3.mlp.up_proj.weight"
    given = tensors(twin_folder("text-float32"))[f"model.{name}"]
    assert torch.equal(found[f"model.decoder.{name}"], given.to(getattr(torch, dtype)))


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
def test_the_same_pair_twice_gives_the_same_bytes(
    max_shard_bytes: int, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        convert(
            twin_folder("text-8"),
            tmp_path / name,
            decoder_from=twin_folder("text-sharded"),
            decoder_layers="0:8:2",
            max_shard_bytes=max_shard_bytes,
        )
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


# What does not fit


@pytest.mark.parametrize(
    ("source", "other", "says"),
    [
        ("text-8", "donor-wide", "it has hidden_size 32, not 24"),
        (
            "text-8",
            "text-real-vocabulary",
            "it has hidden_size 8, not 24, rows of the embedding table 262144, not 300",
        ),
    ],
)
def test_a_parent_of_another_width_or_vocabulary_is_refused(
    source: str, other: str, says: str, twin_folder: TwinFolder
) -> None:
    with pytest.raises(MappingError) as caught:
        plan(twin_folder(source), decoder_from=twin_folder(other))
    assert says in str(caught.value)
    assert "--decoder-from" in str(caught.value)


@pytest.mark.parametrize("table", ["source", "decoder-from"])
@pytest.mark.parametrize(
    ("source", "other"),
    [("text-with-fill", "text-real-vocabulary"), ("text-real-vocabulary", "images-with-fill")],
)
def test_tables_of_equal_rows_behind_the_cut_fit(
    source: str, other: str, table: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    made = plan(twin_folder(source), decoder_from=twin_folder(other), embedding_from=table)
    shape = next(tensor.shape for tensor in made.tensors if tensor.name == TABLE)
    assert shape == (262_144, 8)
    cut = any(change.field == "vocab_size" for change in made.changes)
    assert cut is ("fill" in (source if table == "source" else other))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_extracted_part_has_no_other_parent_and_no_selection(part: str, converted_twin: TwinFolder) -> None:
    whole = converted_twin("text-8")
    for options in ({"decoder_from": converted_twin("text-sharded")}, {f"{part}_layers": "first:2"}):
        with pytest.raises(MappingError, match=r"cannot be used with mapping|applies only to decoder-only"):
            plan(whole, part=part, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decoder_layers": "first:2"}, "--decoder-layers cannot be used with mapping 'gemma2'"),
        ({"encoder_layers": "first:2"}, "--encoder-layers cannot be used with mapping 'gemma2'"),
        ({"decoder_from": "gemma2-7-untied"}, "--decoder-from cannot be used with mapping 'gemma2'"),
    ],
)
def test_a_map_that_gives_both_stacks_the_sources_settings_refuses_others(
    options: dict[str, Any], says: str, twin_folder: TwinFolder
) -> None:
    given = {name: twin_folder(value) if name == "decoder_from" else value for name, value in options.items()}
    with pytest.raises(MappingError, match=says):
        plan(twin_folder("gemma2-5"), **given)  # type: ignore[arg-type]


def test_a_setting_that_the_target_has_once_is_the_same_in_both(twin_folder: TwinFolder, tmp_path: Path) -> None:
    other = fresh(twin_folder("text-8"), tmp_path / "other", attention_dropout=0.1)
    with pytest.raises(MappingError, match=r"it has attention_dropout 0.1, not 0.0"):
        plan(twin_folder("text-8"), decoder_from=other)


def test_the_decoders_parent_is_a_closed_world_too(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = twin_folder("text-8")
    stranger = edited(
        source, tmp_path / "stranger", lambda held: held.update({"model.layers.0.lora_A.weight": torch.zeros(2)})
    )
    with pytest.raises(CheckpointError) as caught:
        plan(source, decoder_from=stranger)
    assert caught.value.where == str(stranger)
    assert "unused: model.layers.0.lora_A.weight" in caught.value.details
    biased = fresh(source, tmp_path / "biased", attention_bias=True)
    with pytest.raises(CheckpointError, match="attention_bias is True") as caught:
        plan(source, decoder_from=biased)
    assert caught.value.where == str(biased / "config.json")
    other = fresh(source, tmp_path / "other", model_type="llama")
    with pytest.raises(MappingError, match="converts gemma3, gemma3_text") as caught:
        plan(source, decoder_from=other)
    assert caught.value.where == str(other)


@pytest.mark.parametrize("table", ["source", "decoder-from"])
def test_an_untied_parent_of_the_decoder_is_refused(table: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    respell(twin_folder("text-float32"), tmp_path / "tied", TEXT_SPELLINGS["with-head"])
    untied = edited(tmp_path / "tied", tmp_path / "untied", lambda held: held["lm_head.weight"][0].add_(1))
    source = twin_folder("text-8")
    done = convert(source, tmp_path / "out", decoder_from=tmp_path / "tied", embedding_from=table)
    found = (
        "decoder_from/lm_head.weight is dropped: the softmax is tied to embed_tokens; it must equal "
        "decoder_from/model.embed_tokens.weight, which convert checks before writing"
    )
    assert found in done.notes
    assert "decoder_from/lm_head.weight" in {drop["name"] for drop in manifest(tmp_path / "out")["dropped"]}
    with pytest.raises(
        CheckpointError, match=r"differs from decoder_from/model\.embed_tokens\.weight at \[0, 0\]"
    ) as caught:
        convert(source, tmp_path / "none", decoder_from=untied, embedding_from=table)
    assert caught.value.where == "tensor decoder_from/lm_head.weight"
    assert not (tmp_path / "none").exists()


def test_values_that_are_not_finite_are_reported_with_their_parent(twin_folder: TwinFolder, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    other = edited(twin_folder("text-8"), tmp_path / "other", lambda held: held[name][1].fill_(torch.nan))
    with pytest.raises(CheckpointError) as caught:
        convert(twin_folder("text-8"), tmp_path / "out", decoder_from=other)
    assert caught.value.details == (f"decoder_from/{name}[1, 0] is NaN",)
    convert(twin_folder("text-8"), tmp_path / "out", decoder_from=other, decoder_layers="first:2")


def test_a_preset_is_for_both_stacks_as_they_are(demo_source: Path, tmp_path: Path) -> None:
    from t5g2convert.mapping.library import find_map

    text = find_map("gemma3").path.read_text()
    asked = re.compile(r"requires:\n      hidden_size: 640\n.*?    settings", re.DOTALL)
    (tmp_path / "mine.yaml").write_text(asked.sub("requires: {num_hidden_layers: 8}\n    settings", text))
    options: dict[str, Any] = {"mapping": str(tmp_path / "mine.yaml"), "preset": "t5gemma-2-270m-270m"}
    assert plan(demo_source, **options).config["decoder"]["rope_parameters"]["full_attention"]["factor"] == 8.0
    with pytest.raises(MappingError, match="requires num_hidden_layers 8, but the decoder has 4"):
        plan(demo_source, decoder_layers="first:4", **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"embedding_from": "decoder-from"}, "pass the decoder's parent with --decoder-from"),
        ({"decoder_from": "x", "embedding_from": "both"}, "embedding_from: Input should be 'source' or 'decoder-from'"),
        ({"decoder_layers": "3"}, "first:3 for the first 3 layers"),
        ({"encoder_layers": ""}, "--encoder-layers"),
    ],
)
def test_an_option_without_meaning_is_refused_before_anything_is_read(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan("nowhere", **options)
    assert says in str(caught.value)


def test_the_output_may_not_be_inside_the_decoders_parent(twin_folder: TwinFolder) -> None:
    other = twin_folder("text-sharded")
    with pytest.raises(OutputError, match="lies inside the source folder"):
        convert(twin_folder("text-8"), other / "out", decoder_from=other)


# Resuming


@pytest.mark.parametrize(
    "changed",
    [
        {"decoder_layers": "0,2,5"},
        {"encoder_layers": "first:7"},
        {"decoder_from": "text-float32"},
        {"embedding_from": "decoder-from"},
        {"decoder_from": None, "embedding_from": "source"},
    ],
    ids=str,
)
def test_a_run_with_other_layers_or_parents_does_not_resume(
    changed: dict[str, Any], twin_folder: TwinFolder, tmp_path: Path
) -> None:
    def run(name: str, judge: Callable[[Path], None] | None = None, **more: Any) -> tuple[str, ...]:
        options: dict[str, Any] = {
            "decoder_from": "text-sharded", "decoder_layers": "0,2,4", "encoder_layers": "first:6", **more,
        }  # fmt: skip
        if options["decoder_from"] is not None:
            options["decoder_from"] = twin_folder(options["decoder_from"])
        return convert(
            twin_folder("text-8"), tmp_path / name, max_shard_bytes=20_000, resume=True, judge=judge, **options
        ).kept

    def stop(_: Path) -> None:
        raise OutputError("the disk fails")

    for name in ("same", "other"):
        with pytest.raises(OutputError, match="the disk fails"):
            run(name, stop)
    assert len(run("same")) > 3
    assert run("other", **changed) == ()
    run("fresh", **changed)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("other", "fresh"))
    assert one == two


def test_parents_whose_tokens_have_other_names_are_refused(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    for folder in (source, other):
        shutil.copytree(twin_folder("text-8"), folder)
    for folder, prefix in ((source, "a"), (other, "b")):
        vocabulary = {f"{prefix}{number}": number for number in range(300)}
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": vocabulary}}))
    with pytest.raises(MappingError, match="300 of 300 tokens have another name in the decoder's parent's tokenizer"):
        plan(source, decoder_from=other)
    (other / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert not any("not checked: " in note for note in plan(source, decoder_from=other).notes)
    (other / "tokenizer.json").unlink()
    assert any("not checked: " in note for note in plan(source, decoder_from=other).notes)
