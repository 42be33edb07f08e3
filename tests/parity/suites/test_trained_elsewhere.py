"""A model fine-tuned with transformers is checked against its start; every lost or damaged part is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, UsageError, convert, verify
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.parity.reports.html import html
from t5g2convert.parity.reports.report import Check, Report, junit
from t5g2convert.parity.suites.selection import is_trained_elsewhere
from tests.parity.elsewhere import (
    CLASSES,
    DECODER,
    ENCODER,
    TABLE,
    TOWER,
    Tensors,
    change,
    copied,
    names,
    rewrite,
    step,
    train,
    write_start,
)

PARTS = ["vision", "projector", "embedding", "encoder", "decoder"]
ALL = ["tensors", "config", "tokenizer", *PARTS, "runs"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elsewhere")
    start = write_start(root)
    train(start, root / "trained")
    return root


@pytest.fixture(scope="module")
def start(scene: Path) -> Path:
    return scene / "start"


@pytest.fixture
def trained(scene: Path, tmp_path: Path) -> Path:
    """Return a sound fine-tuned model that the test may damage."""
    return copied(scene / "trained", tmp_path / "trained")


def failed(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.failed}


def message_of(report: Report, name: str) -> str:
    check = failed(report)[name]
    return "\n".join((check.detail, *check.offenders))


def test_a_sound_model_passes_and_reports_how_far_each_part_moved(start: Path, trained: Path) -> None:
    report = verify(trained, start)
    assert report.passed, report.failed
    assert report.complete
    assert [check.name for check in report.checks] == ALL
    assert report.skipped == {"integrity": "trained elsewhere: no t5g2.json records these files"}
    assert report.remarks[0].startswith("trained elsewhere")
    by_name = {check.name: check for check in report.checks}
    assert by_name["vision"].detail == "37 tensors are the start's, bit for bit"
    assert by_name["encoder"].detail == "105 of 105 tensors moved, by 1.00% of the start's length (cosine 1.00)"
    document = report.to_json()["checks"][ALL.index("decoder")]
    layers = {each["name"]: each for each in document["movements"]}
    assert layers["decoder.layers.3"]["unmoved"] == 0
    assert layers["decoder.layers.3"]["distance"] == pytest.approx(0.01, rel=0.05)
    assert not (trained / "t5g2.json").exists()
    assert "skipped" in junit(report)
    assert "how far" in html(report)


@pytest.mark.parametrize("kind", ["inner", "classifier"])
def test_other_model_classes_are_read(kind: str, start: Path, tmp_path: Path) -> None:
    report = verify(train(start, tmp_path / "out", kind=kind), start)
    assert report.passed, report.failed
    tensors = report.checks[0].detail
    assert ("a head that no other class loads" in tensors) == (kind == "classifier")


@pytest.mark.slow
def test_16_bits_shards_and_a_raw_state_dict_are_read(start: Path, tmp_path: Path) -> None:
    assert verify(train(start, tmp_path / "shards", dtype=torch.bfloat16, max_shard_size="100KB"), start).passed
    model = CLASSES["whole"].from_pretrained(start, dtype=torch.float32)
    step(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    raw = copied(tmp_path / "shards", tmp_path / "raw")
    for file in raw.glob("model*"):
        file.unlink()
    save_file(state, raw / "model.safetensors", {"format": "pt"})
    report = verify(raw, start)
    assert report.passed, report.failed
    assert "other names" in report.checks[0].detail
    state["lm_head.out_proj.weight"][7] += 1
    save_file(state, raw / "model.safetensors", {"format": "pt"})
    assert "lm_head.out_proj.weight is a tied copy" in message_of(verify(raw, start), "tensors")


def test_a_float32_start_trained_in_16_bits_and_saved_in_32_has_not_moved(start: Path, tmp_path: Path) -> None:
    wide = copied(start, tmp_path / "wide")
    (wide / "t5g2.json").unlink()
    rewrite(wide / "config.json", lambda config: config.update(dtype="float32"))
    change(wide, lambda tensors: tensors.update({name: each.float() * 1.0001 for name, each in tensors.items()}))
    saved = copied(wide, tmp_path / "saved")
    change(saved, lambda tensors: tensors.update({name: each.bfloat16().float() for name, each in tensors.items()}))
    report = failed(verify(saved, wide))
    assert report.keys() == {"encoder", "decoder"}
    assert "every tensor is still the start's" in report["encoder"].detail


def test_a_folder_with_the_manifest_of_its_start_is_the_same(start: Path, trained: Path) -> None:
    verify(start, start.parent / "parent")
    shutil.copy(start / "t5g2.json", trained)
    before = (trained / "t5g2.json").read_bytes()
    report = verify(trained, start)
    assert report.passed, report.failed
    assert "a copy of the start's" in report.skipped["integrity"]
    assert (trained / "t5g2.json").read_bytes() == before
    # A manifest of another folder still makes it a conversion.
    rewrite(trained / "t5g2.json", lambda document: document.update(dtype="float16"))
    assert not is_trained_elsewhere(trained, open_checkpoint(start))


def resume(start: Path, saved: Path) -> Any:
    """Load as transformers' Trainer does on resume: by the file's own names."""
    model = CLASSES["whole"].from_pretrained(start, dtype=torch.float32)
    model.load_state_dict(load_file(saved / "model.safetensors"), strict=False)
    return model


def test_V5_an_encoder_lost_on_resume_is_found(start: Path, trained: Path, tmp_path: Path) -> None:
    resume(start, trained).save_pretrained(tmp_path / "resumed")
    report = verify(tmp_path / "resumed", start)
    assert failed(report).keys() == {"encoder"}
    assert "but the decoder has moved" in message_of(report, "encoder")
    assert "transformers#48805" in message_of(report, "encoder")
    assert "--frozen encoder" in message_of(report, "encoder")
    # Declared as frozen it passes, but only if it equals the start's.
    assert verify(tmp_path / "resumed", start, frozen=["encoder"]).passed
    assert "was frozen, but is 1.00% away" in message_of(verify(trained, start, frozen=["encoder"]), "encoder")


def put_back(prefix: str) -> Callable[[Tensors, Tensors], None]:
    def edit(tensors: Tensors, old: Tensors) -> None:
        for name in names(old, prefix):
            if name != TABLE:
                tensors[name] = old[name].float()

    return edit


def randomly(prefix: str) -> Callable[[Tensors, Tensors], None]:
    def edit(tensors: Tensors, old: Tensors) -> None:
        generator = torch.Generator().manual_seed(1)
        for name in names(old, prefix):
            # Initialized as Gemma's classes are: small matrices, zero norms.
            shape = old[name].shape
            tensors[name] = torch.randn(shape, generator=generator) * 0.02 * (len(shape) > 1)

    return edit


def one(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, Tensors], None]:
    return lambda tensors, _: tensors.update({name: value(tensors[name])})


UP = "model.encoder.layers.4.mlp.up_proj.weight"

MUTANTS: dict[str, tuple[Callable[[Tensors, Tensors], Any], dict[str, str]]] = {
    "the encoder as at the start": (put_back(ENCODER), {"encoder": "every tensor is still the start's, but the dec"}),
    "the decoder as at the start": (put_back(DECODER), {"decoder": "every tensor is still the start's, but the enc"}),
    "one layer of the encoder": (
        put_back(f"{ENCODER}layers.5."),
        {"encoder": "encoder.layers.5 is still the start's, but most layers have moved"},
    ),
    "most layers of the decoder": (
        lambda tensors, old: [put_back(f"{DECODER}layers.{layer}.")(tensors, old) for layer in range(6)],
        {"decoder": "6 of 8 layers are still the start's: decoder.layers.0"},
    ),
    "a random encoder": (
        randomly(ENCODER),
        {
            "encoder": "is not near its start: random, or diverged",
            "embedding": f"{TABLE} is not near its start",
            "projector": "mm_input_projection_weight is not near its start",
        },
    ),
    "a random decoder": (randomly(DECODER), {"decoder": "is not near its start: random, or diverged"}),
    "a random matrix": (one(UP, torch.randn_like), {"encoder": f"{UP} is not near its start"}),
    "a norm that was filled anew": (
        one("model.encoder.norm.weight", torch.zeros_like),
        {"encoder": "model.encoder.norm.weight is all zeros"},
    ),
    "the tower moved": (
        lambda tensors, _: [tensors[name].mul_(1.01) for name in tensors if name.startswith(TOWER)],
        {"vision": "was frozen, but is 1.00% away from the start's"},
    ),
    "one bias of the tower moved": (
        one(f"{TOWER}post_layernorm.bias", lambda tensor: tensor + 1e-6),
        {"vision": "vision_model.post_layernorm.bias was frozen"},
    ),
    "a tensor missing": (
        lambda tensors, _: tensors.pop(UP),
        {"tensors": f"{UP} is missing", "runs": f"{UP} is missing"},
    ),
    "a tensor too many": (
        lambda tensors, _: tensors.update({"optimizer.step": torch.zeros(1)}),
        {"tensors": "optimizer.step is not a tensor of this model"},
    ),
    "another shape": (one(UP, lambda tensor: tensor.T), {"tensors": f"{UP} has shape", "runs": f"{UP} has shape"}),
    "NaN": (
        one(UP, lambda tensor: tensor.index_put((torch.tensor(3), torch.tensor(2)), torch.tensor(float("nan")))),
        {"encoder": f"{UP} is not finite at element", "runs": "not finite"},
    ),
    "infinity in the table": (
        one(TABLE, lambda tensor: tensor.index_put((torch.tensor(9), torch.tensor(0)), torch.tensor(float("inf")))),
        {"embedding": f"{TABLE} is not finite at element 432", "runs": "not finite"},
    ),
    "another class's head": (
        lambda tensors, _: tensors.update({"score.out_proj.weight": torch.zeros(2, 48)}),
        {"tensors": "score.out_proj.weight is a head that T5Gemma2ForConditionalGeneration does not have"},
    ),
    "a tied table that is another": (
        lambda tensors, _: tensors.update({"lm_head.out_proj.weight": tensors[TABLE] * 2}),
        {"tensors": "lm_head.out_proj.weight is a tied copy"},
    ),
    "nothing at all": (
        lambda tensors, old: tensors.update({name: each.float() for name, each in old.items()}),
        {"encoder": "every tensor is still the start's", "decoder": "every tensor is still the start's"},
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("mutant", MUTANTS)
def test_V5_damaged_tensors_are_named_by_their_check(mutant: str, start: Path, trained: Path) -> None:
    edit, expected = MUTANTS[mutant]
    old = load_file(start / "model.safetensors")
    change(trained, lambda tensors: edit(tensors, old))
    report = verify(trained, start)
    assert failed(report).keys() == expected.keys()
    for name, words in expected.items():
        assert words in message_of(report, name)


def test_an_adapter_next_to_the_weights_is_named(start: Path, trained: Path) -> None:
    (trained / "adapter_config.json").write_text("{}")
    report = verify(trained, start)
    assert failed(report).keys() == {"config"}
    assert "adapter next to the weights (adapter_config.json): transformers loads both" in message_of(report, "config")


def test_single_tensors_may_stay_unchanged_as_with_merged_adapters(start: Path, trained: Path) -> None:
    old = load_file(start / "model.safetensors")

    def keep_two_matrices_of_each_layer(tensors: Tensors) -> None:
        for name in [*names(old, ENCODER), *names(old, DECODER)]:
            if not name.endswith(("q_proj.weight", "v_proj.weight")):
                tensors[name] = old[name].float()

    change(trained, keep_two_matrices_of_each_layer)
    report = verify(trained, start)
    assert report.passed, report.failed
    encoder = next(check for check in report.checks if check.name == "encoder")
    assert encoder.detail.startswith("16 of 105 tensors moved")


def test_a_trained_tower_passes_when_declared(start: Path, trained: Path) -> None:
    change(trained, lambda tensors: [tensors[name].mul_(1.01) for name in names(tensors, TOWER, without="-")] and None)
    assert not verify(trained, start).passed
    assert verify(trained, start, frozen=["none"]).passed
    report = verify(trained, start, frozen=["none", "projector", "encoder.layers.3"])
    assert failed(report).keys() == {"encoder"}
    assert "model.encoder.layers.3." in message_of(report, "encoder")


def test_a_frozen_layer_passes_when_declared(start: Path, trained: Path) -> None:
    old = load_file(start / "model.safetensors")
    change(trained, lambda tensors: put_back(f"{ENCODER}layers.5.")(tensors, old))
    assert failed(verify(trained, start)).keys() == {"encoder"}
    assert verify(trained, start, frozen=["encoder.layers.5"]).passed


@pytest.mark.parametrize("part", ["tower", "encoder.layers.8", "encoder.layers", ""])
def test_frozen_must_name_a_part_or_layer(part: str, start: Path, trained: Path) -> None:
    with pytest.raises(UsageError, match="is not a part or layer"):
        verify(trained, start, frozen=[part])


def test_conversion_options_are_refused(start: Path, trained: Path) -> None:
    with pytest.raises(UsageError, match="--mapping, --tolerance cannot be used"):
        verify(trained, start, mapping="gemma3", tolerance=0.1)
    with pytest.raises(UsageError, match="--frozen applies only to folders that were trained elsewhere"):
        verify(start, start.parent / "parent", frozen=["encoder"])


Edit = Callable[[dict[str, Any]], Any]


def at(path: str, value: Any) -> Edit:
    *sections, last = path.split(".")

    def edit(document: dict[str, Any]) -> None:
        for section in sections:
            document = document[section]
        if value is None:
            del document[last]
        else:
            document[last] = value

    return edit


TEXT = "encoder.text_config"

SETTINGS: dict[str, tuple[Edit, str]] = {
    "window": (at("decoder.sliding_window", 9), "decoder.sliding_window is 9, expected"),
    "the encoder's window": (at(f"{TEXT}.sliding_window", 9), "encoder.text_config.sliding_window is 9"),
    "theta": (
        at("decoder.rope_parameters.full_attention.rope_theta", 2e6),
        "decoder.rope_parameters.full_attention.rope_theta is 2000000.0",
    ),
    "factor": (
        at(f"{TEXT}.rope_parameters.full_attention.factor", 8.0),
        "encoder.text_config.rope_parameters.full_attention.factor is 8.0",
    ),
    "eps": (at("decoder.rms_norm_eps", 1e-5), "decoder.rms_norm_eps is 1e-05"),
    "the tower's eps": (at("encoder.vision_config.layer_norm_eps", 1e-5), "vision_config.layer_norm_eps is 1e-05"),
    "query scale": (at("decoder.query_pre_attn_scalar", 99), "query_pre_attn_scalar is 99"),
    "softcap": (at("decoder.final_logit_softcapping", 3.0), "final_logit_softcapping is 3.0"),
    "no window": (at("decoder.sliding_window", None), "sliding_window"),
    "image token": (at("image_token_index", 7), "encoder.image_token_index is 7"),
    "end of image": (at("encoder.eoi_token_index", 7), "encoder.eoi_token_index is 7"),
    "decoder's start": (at("decoder.bos_token_id", 7), "decoder.bos_token_id is 7"),
    "end at the top": (at("eos_token_id", 7), "eos_token_id is 7"),
    "untied": (at("tie_word_embeddings", False), "tie_word_embeddings is False"),
    "untied decoder": (at("decoder.tie_word_embeddings", False), "decoder.tie_word_embeddings is False"),
    "two sizes of a table": (at("decoder.vocab_size", 264), "share one table, but have vocab_size [256, 264]"),
    "quantised": (
        lambda document: document.update(quantization_config={"bits": 4}),
        "quantization_config.bits is 4, a key with an unknown effect",
    ),
    "code of its own": (lambda document: document.update(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "an unknown key": (at("decoder.use_something_new", True), "new is True, a key with an unknown effect"),
    "an unknown rope key": (
        at("decoder.rope_parameters.full_attention.attention_factor", 2.0), "attention_factor is 2.0",
    ),
    "another class": (at("architectures", ["T5ForConditionalGeneration"]), "architectures is"),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("setting", SETTINGS)
def test_V5_a_setting_with_another_meaning_fails(setting: str, start: Path, trained: Path) -> None:
    edit, words = SETTINGS[setting]
    rewrite(trained / "config.json", edit)
    report = verify(trained, start)
    assert "config" in failed(report)
    assert words in message_of(report, "config")


HARMLESS: dict[str, tuple[Edit, str | None]] = {
    "labels": (lambda document: document.update(id2label={"0": "no", "1": "yes", "2": "maybe"}), None),
    "dtype": (at("decoder.dtype", "bfloat16"), None),
    "who wrote it": (lambda document: document.update(unsloth_version="2026.11.1"), None),
    "how an older version would write": (lambda document: document["decoder"].update(temperature=0.7), None),
    "no default rope factor": (at("decoder.rope_parameters.full_attention.factor", None), None),
    "a default rope": (
        lambda document: document["decoder"]["rope_parameters"].update(
            full_attention={"rope_type": "default", "rope_theta": 1_000_000}
        ),
        None,
    ),
    "no cache": (at("decoder.use_cache", False), "decoder.use_cache is False"),
    "dropout": (at("decoder.attention_dropout", 0.1), "decoder.attention_dropout is 0.1"),
    "dropout at the top": (at("dropout_rate", 0.1), "dropout_rate is 0.1"),
    "null": (at("decoder.something", None), None),
    "the ends as a list": (at("decoder.eos_token_id", [1]), None),
}


@pytest.mark.parametrize("setting", HARMLESS)
def test_a_setting_with_the_same_meaning_passes(setting: str, start: Path, trained: Path) -> None:
    edit, remark = HARMLESS[setting]
    if setting == "null":
        rewrite(trained / "config.json", lambda document: document["decoder"].update(something=None))
    else:
        rewrite(trained / "config.json", edit)
    report = verify(trained, start)
    assert report.passed, report.failed
    assert remark is None or any(remark in each for each in report.remarks)


def test_generation_ids_are_compared_and_other_choices_reported(start: Path, trained: Path) -> None:
    path = trained / "generation_config.json"
    rewrite(path, lambda document: document.update(do_sample=True, eos_token_id=[1], decoder_start_token_id=2))
    report = verify(trained, start)
    assert report.passed, report.failed
    assert any("do_sample True" in remark for remark in report.remarks)
    rewrite(path, lambda document: document.update(eos_token_id=[7]))
    assert "generation_config.json: eos_token_id is [7]" in message_of(verify(trained, start), "config")


def swapped(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    one, other = list(vocabulary)[20:22]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def special(document: dict[str, Any]) -> None:
    document["added_tokens"][2]["special"] = False


def merge(document: dict[str, Any]) -> None:
    document["model"]["merges"].append(["a", "b"])


def more(number: int) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        document["added_tokens"].append({**document["added_tokens"][0], "content": "<new>", "id": number})

    return edit


TOKENS: dict[str, tuple[str, Edit, str]] = {
    "two ids swapped": ("tokenizer.json", swapped, "expected"),
    "merges": ("tokenizer.json", merge, "merges, the start's has"),
    "normalizer": ("tokenizer.json", lambda it: it.update(normalizer={"type": "Lowercase"}), "normalizer is"),
    "pre-tokenizer": ("tokenizer.json", lambda it: it.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer is"),
    "post-processor": (
        "tokenizer.json",
        lambda it: it.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
            }
        ),
        "post_processor is",
    ),
    "decoder": ("tokenizer.json", lambda it: it.update(decoder={"type": "Fuse"}), "decoder is"),
    "special": ("tokenizer.json", special, "has special False, expected True"),
    "an added token gone": ("tokenizer.json", lambda it: it["added_tokens"].pop(1) and None, "is missing"),
    "unknown token": ("tokenizer.json", lambda it: it["model"].update(unk_token="<bos>"), "model.unk_token"),
    "beyond the table": ("tokenizer.json", more(256), "'<new>' was added with id 256, but the table has 256 rows"),
    "another's id": ("tokenizer.json", more(9), "'<new>' was added with id 9, which "),
    "end": ("tokenizer_config.json", lambda it: it.update(eos_token="<bos>"), "eos_token is '<bos>'"),
    "switch": ("tokenizer_config.json", lambda it: it.update(add_eos_token=True), "add_eos_token is True"),
    "cleaning": (
        "tokenizer_config.json",
        lambda it: it.update(clean_up_tokenization_spaces=True),
        "clean_up_tokenization_spaces",
    ),
    "class": ("tokenizer_config.json", lambda it: it.update(tokenizer_class="T5Tokenizer"), "tokenizer_class is"),
    "template": ("tokenizer_config.json", lambda it: it.update(chat_template="{{ 1 }}"), "the chat template is new"),
}


@pytest.mark.parametrize("change_of", TOKENS)
def test_V5_a_tokenizer_with_another_meaning_fails(change_of: str, start: Path, trained: Path) -> None:
    name, edit, words = TOKENS[change_of]
    rewrite(trained / name, edit)
    report = verify(trained, start)
    assert failed(report).keys() == {"tokenizer"}
    assert words in message_of(report, "tokenizer")


def test_tokenizer_settings_left_by_training_are_reported(start: Path, trained: Path) -> None:
    def cut(document: dict[str, Any]) -> None:
        document["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]

    rewrite(trained / "tokenizer.json", cut)
    report = verify(trained, start)
    assert report.passed, report.failed
    assert any("truncates texts after 8 tokens" in remark for remark in report.remarks)


def test_tokens_added_with_their_rows_are_reported(start: Path, trained: Path) -> None:
    def sizes(document: dict[str, Any]) -> None:
        for section in (document, document["decoder"], document["encoder"]["text_config"]):
            section["vocab_size"] = 257

    rewrite(trained / "config.json", sizes)
    rewrite(trained / "tokenizer.json", more(256))
    change(trained, lambda tensors: tensors.update({TABLE: torch.cat((tensors[TABLE], torch.ones(1, 48)))}))
    report = verify(trained, start)
    assert report.passed, report.failed
    assert any("1 token(s) were added: '<new>' 256" in remark for remark in report.remarks)


def test_a_folder_without_tokenizer_or_config_says_so(start: Path, trained: Path) -> None:
    (trained / "tokenizer.json").unlink()
    report = verify(trained, start)
    assert report.passed
    assert "copy the start's tokenizer" in report.skipped["tokenizer"]
    rewrite(trained / "config.json", lambda document: document.update(decoder=7))
    report = verify(trained, start)
    assert failed(report).keys() == {"config"}
    assert set(report.skipped) == {"integrity", "tensors", "tokenizer", *PARTS, "runs"}


def test_the_same_tensor_in_two_spellings_fails(start: Path, trained: Path) -> None:
    name = "model.encoder.norm.weight"
    change(trained, lambda tensors: tensors.update({name.replace("r.n", "r.text_model.n"): tensors[name] * 2}))
    report = verify(trained, start)
    assert failed(report).keys() == {"tensors"}
    assert "under two names each" in message_of(report, "tensors")


def test_a_fine_tuned_encoder_is_checked_against_the_extracted_one(start: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    convert(start, tmp_path / "alone", part="encoder")
    model = AutoModel.from_pretrained(tmp_path / "alone", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" not in name:
                parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "out")
    report = verify(tmp_path / "out", tmp_path / "alone")
    assert report.passed, report.failed
    assert [check.name for check in report.checks] == ["tensors", "config", "vision", "projector", "embedding",
                                                       "encoder", "runs"]  # fmt: skip
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "t5gemma2_encoder"


def test_a_mismatched_folder_and_source_get_a_hint(start: Path, trained: Path, tmp_path: Path) -> None:
    other = copied(start, tmp_path / "other")
    change(other, lambda tensors: tensors.update({name: torch.randn_like(each) for name, each in tensors.items()}))
    report = verify(trained, other)
    assert any("no part of it is close to other" in remark for remark in report.remarks)
    assert "LoRA" not in message_of(report, "vision")
    # The start's own source instead of the start.
    report = verify(trained, start.parent / "parent")
    assert any("pass the T5Gemma 2 that was trained" in remark for remark in report.remarks)
    # Only the encoder instead of the whole model; the command in the remark works.
    from transformers import T5Gemma2ForConditionalGeneration

    model = T5Gemma2ForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    model.get_encoder().save_pretrained(tmp_path / "alone")
    report = verify(tmp_path / "alone", start)
    assert any("--part encoder" in remark for remark in report.remarks)
    convert(start, tmp_path / "encoder", part="encoder")
    assert verify(tmp_path / "alone", tmp_path / "encoder").passed


def test_a_manifest_of_other_files_is_named_and_not_the_source(start: Path, trained: Path, tmp_path: Path) -> None:
    manifest = json.loads((start / "t5g2.json").read_text())
    manifest["files"]["config.json"]["bytes"] += 1
    (trained / "t5g2.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="matches neither the files") as error:
        verify(trained, start)
    assert "move this file away" in str(error.value)
    for damaged in ("{}", "no JSON"):
        (trained / "t5g2.json").write_text(damaged)
        report = verify(trained, start)
        assert "integrity" in failed(report)
        assert any("move that away" in remark for remark in report.remarks)
    (trained / "t5g2.json").unlink()
    assert verify(trained, start).passed
