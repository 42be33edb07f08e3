"""Sources as users have them: without their tower, with buffers, heads and stale indices. Each is converted, judged by
our own passes and by transformers; and what is left behind by a drop can be nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, MappingError, convert, inspect, plan, verify
from t5g2convert.mapping.library import find_map
from tests.conftest import TwinFolder
from tests.interop.judge import judge
from tests.models.twins import IMAGE_SPELLINGS, Tensors, respell

Change = Callable[[Tensors], Tensors]

HEADS = ["score.weight", "v_head.summary.weight", "v_head.summary.bias", "qa_outputs.bias", "pre_classifier.weight"]


def changed(source: Path, target: Path, change: Change) -> Path:
    """Copy a single-file twin with other tensors."""
    respell(source, target, change)
    return target


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def without_tower(tensors: Tensors) -> Tensors:
    """Write a model with images as mlx-lm keeps it."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}


def with_zeros(*names: str) -> Change:
    return lambda tensors: {**tensors, **{name: torch.zeros(3) for name in names}}


def as_text_model(folder: Path, target: Path) -> Path:
    """Write the same text model as transformers saves one without images."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], "architectures": ["Gemma3ForCausalLM"], "dtype": config["dtype"]}
    (target / "config.json").write_text(json.dumps(text))
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    save_file(plain, target / "model.safetensors", {"format": "pt"})
    return target


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def assert_sound(source: Path, output: Path, **others: Any) -> None:
    """Require that every check passes with tolerance 0."""
    report = verify(output, source, record=False, **others)
    assert report.passed, [check for check in report.checks if not check.passed]


# A model with images without its tower


@pytest.mark.parametrize("vision_config", [True, False], ids=["vision-config-left", "no-vision-config"])
@pytest.mark.parametrize("name", ["images-8", "images-float32", "images-with-fill"])
def test_I23_a_text_stack_saved_as_gemma3_is_converted(
    name: str, vision_config: bool, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = changed(twin_folder(name), tmp_path / "source", without_tower)
    if not vision_config:
        edit_config(source, lambda config: config.pop("vision_config"))
    done = convert(source, tmp_path / "out")
    (note,) = (note for note in done.notes if "it has no vision tower tensors" in note)
    assert "--vision-from" in note
    manifest = json.loads((tmp_path / "out/t5g2.json").read_text())
    assert manifest["source"]["family"] == "gemma3"
    assert_sound(source, tmp_path / "out")
    judgement = judge(as_text_model(source, tmp_path / "text"), tmp_path / "out", torch.float32)
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)
    assert any("no vision tower tensors" in note for note in inspect(source).notes)


def test_the_head_that_mlx_writes_is_dropped(twin_folder: TwinFolder, tmp_path: Path) -> None:
    def headed(tensors: Tensors) -> Tensors:
        text = without_tower(tensors)
        return {**text, "language_model.lm_head.weight": text["language_model.model.embed_tokens.weight"].clone()}

    source = changed(twin_folder("images-8"), tmp_path / "source", headed)
    edit_config(source, lambda config: config.pop("vision_config"))
    convert(source, tmp_path / "out")
    assert_sound(source, tmp_path / "out")


@pytest.mark.parametrize("donor", ["images-13", "donor-wide"])
def test_a_towerless_source_is_given_a_tower(donor: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = changed(twin_folder("images-8"), tmp_path / "source", without_tower)
    done = convert(source, tmp_path / "out", vision_from=twin_folder(donor))
    assert not [note for note in done.notes if "no vision tower tensors" in note]
    assert_sound(source, tmp_path / "out", vision_from=twin_folder(donor))


def test_a_donor_that_marks_images_with_other_tokens_is_refused(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = changed(twin_folder("images-8"), tmp_path / "source", without_tower)
    edit_config(source, lambda config: config.update(eoi_token_index=17))
    with pytest.raises(MappingError, match="eoi_token_index is 291, the source's 17"):
        plan(source, vision_from=twin_folder("images-13"))


def test_a_model_without_tower_is_not_a_donor(twin_folder: TwinFolder, tmp_path: Path) -> None:
    donor = changed(twin_folder("images-8"), tmp_path / "donor", without_tower)
    with pytest.raises(MappingError, match="has no vision tower"):
        plan(twin_folder("text-8"), vision_from=donor)


@pytest.mark.parametrize(
    "kept", ["vision_tower.post_layernorm.bias", "multi_modal_projector.mm_soft_emb_norm.weight", "vision_tower."]
)
@pytest.mark.parametrize("spelling", ["transformers-5.6", "raw-state-dict", "hub"])
def test_I23_a_partial_tower_is_not_ignored(kept: str, spelling: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    respell(twin_folder("images-8"), tmp_path / "spelled", IMAGE_SPELLINGS[spelling])
    kept = kept.replace("vision_tower.", "vision_tower.vision_model.") if spelling != "transformers-5.6" else kept

    def strip(tensors: Tensors) -> Tensors:
        return {
            name: tensor
            for name, tensor in tensors.items()
            if not ("vision_tower" in name or "projector" in name) or kept in name
        }

    source = changed(tmp_path / "spelled", tmp_path / "source", strip)
    with pytest.raises(CheckpointError, match=r"do not match mapping|holds no (vision|projector) tensors"):
        plan(source)
    edit_config(source, lambda config: config.pop("vision_config"))
    with pytest.raises(CheckpointError, match="vision_config is missing"):
        plan(source)


def test_a_tower_under_unknown_names_is_left_over_and_named(twin_folder: TwinFolder, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {name.replace("vision_tower.", "v.").replace("multi_modal_projector.", "mm."): tensor
                for name, tensor in tensors.items()}  # fmt: skip

    source = changed(twin_folder("images-8"), tmp_path / "source", rename)
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert "unused: v.embeddings.patch_embedding.weight" in caught.value.details


def test_a_cap_that_only_one_of_both_classes_reads_is_refused(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = changed(twin_folder("images-8"), tmp_path / "source", without_tower)
    edit_config(source, lambda config: config["text_config"].update(final_logit_softcapping=30.0))
    with pytest.raises(CheckpointError, match=r"final_logit_softcapping is 30\.0: the multimodal class ignores it"):
        plan(source)


def test_a_conversion_without_the_tower_is_not_one_of_the_source_with_it(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    whole = twin_folder("images-8")
    towerless = changed(whole, tmp_path / "source", without_tower)
    convert(towerless, tmp_path / "out")
    failed = {check.name for check in verify(tmp_path / "out", whole, record=False).failed}
    assert {"provenance", "config", "vision_parity"} <= failed
    failed = {check.name for check in verify(converted_twin("images-8"), towerless, record=False).failed}
    assert {"provenance", "config"} <= failed


# Buffers


BUFFERS = [
    name
    for drop in find_map("gemma3").map.drop
    for name in drop.patterns
    if drop.because.startswith("a buffer") and "{vision}" not in name
]


@pytest.mark.parametrize("pattern", BUFFERS)
def test_I21_a_buffer_is_dropped_whatever_it_holds(pattern: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    names = [pattern.replace("{text}", "model.").replace("{layer}", layer) for layer in ("0", "7")]
    source = changed(twin_folder("text-8"), tmp_path / "source", with_zeros(*names))
    made = plan(source)
    assert {drop.name for drop in made.dropped} == {*names}
    (note,) = (note for note in made.notes if "dropped" in note)
    assert note.endswith("a buffer that follows from config.json, which loaders compute anew")


@pytest.mark.parametrize("spelling", IMAGE_SPELLINGS)
def test_buffers_are_dropped_in_every_spelling_and_the_rest_is_the_same(
    spelling: str, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    respell(twin_folder("images-8"), tmp_path / "spelled", IMAGE_SPELLINGS[spelling])

    def buffered(tensors: Tensors) -> Tensors:
        table = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        text = table.removesuffix("embed_tokens.weight")
        patch = next(name for name in tensors if name.endswith("patch_embedding.bias"))
        vision = patch.removesuffix("patch_embedding.bias")
        return {
            **tensors,
            f"{text}rotary_emb.inv_freq": torch.ones(5),
            f"{text}rotary_emb_local.inv_freq": torch.ones(5),
            f"{text}embed_tokens.embed_scale": torch.tensor(4.875),
            f"{vision}position_ids": torch.arange(16)[None],
        }

    source = changed(tmp_path / "spelled", tmp_path / "source", buffered)
    convert(source, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(converted_twin("images-8"))
    assert_sound(source, tmp_path / "out")


def test_a_buffer_of_a_layer_too_many_is_refused(twin_folder: TwinFolder, tmp_path: Path) -> None:
    name = "model.layers.8.self_attn.rotary_emb.inv_freq"
    source = changed(twin_folder("text-8"), tmp_path / "source", with_zeros(name))
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert caught.value.details == (f"unused: {name}",)


def test_buffers_of_gemma_2_are_dropped(twin_folder: TwinFolder, tmp_path: Path) -> None:
    names = ["model.layers.4.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    source = changed(twin_folder("gemma2-5"), tmp_path / "source", with_zeros(*names))
    convert(source, tmp_path / "out")
    assert_sound(source, tmp_path / "out")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_buffers_of_t5gemma2_are_dropped_where_a_part_is_taken_out(
    part: str, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    names = [
        "model.encoder.rotary_emb.full_attention_inv_freq",
        "model.encoder.embed_tokens.embed_scale",
        "model.encoder.vision_tower.vision_model.embeddings.position_ids",
        "model.decoder.rotary_emb.sliding_attention_original_inv_freq",
        "model.decoder.embed_tokens.embed_scale",
    ]
    source = changed(converted_twin("images-8"), tmp_path / "source", with_zeros(*names))
    made = plan(source, part=part)
    assert {drop.name for drop in made.dropped} >= {*names}
    convert(source, tmp_path / "out", part=part)
    assert_sound(source, tmp_path / "out")


# Heads for other tasks


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("twin", ["text-8", "gemma2-5"])
def test_I22_a_head_is_refused_with_the_option_that_drops_it(
    name: str, twin: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = changed(twin_folder(twin), tmp_path / "source", with_zeros(name))
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"{name} is a head for ")
    assert "--drop-heads drops it" in caught.value.hint
    (detail,) = caught.value.details
    assert detail.startswith(f"unused: {name} (a head for ")
    made = plan(source, drop_heads=True)
    assert made.options == {"drop_heads": True}
    (note,) = (note for note in made.notes if name in note)
    assert note.endswith("as --drop-heads requests")


def test_a_reward_model_is_converted_without_its_head(twin_folder: TwinFolder, tmp_path: Path) -> None:
    from transformers import Gemma3TextForSequenceClassification

    model = Gemma3TextForSequenceClassification.from_pretrained(twin_folder("text-8"), num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    with pytest.raises(CheckpointError, match="1 unused"):
        convert(tmp_path / "reward", tmp_path / "out")
    convert(tmp_path / "reward", tmp_path / "out", drop_heads=True)
    assert_sound(tmp_path / "reward", tmp_path / "out")
    judgement = judge(twin_folder("text-8"), tmp_path / "out", torch.float32)
    assert (judgement.complaints, judgement.decoder, judgement.encoder) == ([], 0.0, 0.0)


def test_a_dropped_head_must_be_in_the_manifest(twin_folder: TwinFolder, tmp_path: Path) -> None:
    from t5g2convert.checkpoint.manifest import MANIFEST_FILE, seal

    source = changed(twin_folder("text-8"), tmp_path / "source", with_zeros("score.weight"))
    convert(source, tmp_path / "out", drop_heads=True, sliding_window=9)
    path = tmp_path / "out" / MANIFEST_FILE
    sound = json.loads(path.read_text())
    for options in ({}, {"sliding_window": 9}):
        path.write_bytes(seal({**{key: sound[key] for key in sound if key != "sha256"}, "options": options}))
        failed = {check.name: check for check in verify(tmp_path / "out", source, record=False).failed}
        assert "provenance" in failed
    assert "drop_heads" in failed["provenance"].detail


@pytest.mark.parametrize("role", ["decoder_from", "vision_from"])
def test_a_head_of_another_checkpoint_needs_the_option_too(role: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    base = "text-unlike-7" if role == "decoder_from" else "images-13"
    other = changed(twin_folder(base), tmp_path / "other", with_zeros("score.weight"))
    with pytest.raises(CheckpointError, match="1 unused"):
        plan(twin_folder("text-8"), **{role: other})
    convert(twin_folder("text-8"), tmp_path / "out", drop_heads=True, **{role: other})
    manifest = json.loads((tmp_path / "out/t5g2.json").read_text())
    assert manifest["options"]["drop_heads"] is True
    assert f"{role}/score.weight" in {drop["name"] for drop in manifest["dropped"]}
    assert_sound(twin_folder("text-8"), tmp_path / "out", **{role: other})


def test_an_option_without_a_head_is_noted_and_not_recorded(twin_folder: TwinFolder) -> None:
    made = plan(twin_folder("text-8"), drop_heads=True)
    assert made.options == {}
    assert "--drop-heads has no effect: the source has no such tensor" in made.notes


def test_a_map_without_optional_drops_refuses_the_option(converted_twin: TwinFolder) -> None:
    with pytest.raises(MappingError, match="--drop-heads cannot be used with mapping 't5gemma2-encoder'"):
        plan(converted_twin("text-8"), part="encoder", drop_heads=True)


# An index that names missing tensors


def indexed(source: Path, target: Path, *unheld: str) -> Path:
    shutil.copytree(source, target)
    held = dict.fromkeys(load_file(target / "model.safetensors"), "model.safetensors")
    index = {"metadata": {}, "weight_map": held | dict.fromkeys(unheld, "model.safetensors")}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.rotary_emb.inv_freq", "model.embed_tokens.embed_scale", "score.weight"]
)
def test_I3_an_index_may_name_what_would_be_dropped(name: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = indexed(twin_folder("text-8"), tmp_path / "source", name)
    done = convert(source, tmp_path / "out")
    (note,) = (note for note in done.notes if "no shard holds" in note)
    assert note.startswith(f"model.safetensors.index.json names {name}, which no shard holds")
    assert_sound(source, tmp_path / "out")
    assert not [note for note in inspect(source).notes if "no shard holds" in note]


@pytest.mark.parametrize(
    "names", [("model.layers.8.mlp.up_proj.weight",), ("lm_head.weight", "other.weight"), ("vision_tower.a.weight",)]
)
def test_I3_an_index_may_name_nothing_else(names: tuple[str, ...], twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = indexed(twin_folder("text-8"), tmp_path / "source", *names)
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert caught.value.message == f"no shard holds 1 tensor(s): {names[-1]}"
    assert caught.value.where == str(source / "model.safetensors.index.json")
    assert any("no shard holds" in note for note in inspect(source).notes)


def test_an_untied_head_is_not_one_that_would_be_dropped(twin_folder: TwinFolder, tmp_path: Path) -> None:
    def strip(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    bare = changed(twin_folder("gemma2-untied-float32"), tmp_path / "bare", strip)
    with pytest.raises(CheckpointError, match=r"no shard holds 1 tensor\(s\): lm_head.weight"):
        plan(indexed(bare, tmp_path / "source", "lm_head.weight"))


def test_a_converted_folder_whose_index_names_more_is_refused(converted_twin: TwinFolder, tmp_path: Path) -> None:
    output = indexed(converted_twin("text-8"), tmp_path / "out", "lm_head.weight")
    failed = {check.name for check in verify(output, record=False).failed}
    assert "config" in failed
