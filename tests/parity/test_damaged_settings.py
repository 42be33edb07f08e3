"""V1: every setting is changed, removed or hidden, and the manifest resealed; nothing may pass."""

from functools import partial
from typing import Any

import pytest

from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.parity.reports.report import Check
from tests.parity.mutations import (
    PARITIES,
    Document,
    MakeBench,
    Tally,
    check_of,
    close,
    departs,
    dotted,
    leaves,
    message_of,
    parent_of,
    plausible,
    put,
    setting_name,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_source")]


UNSEEN = {
    # Neither model computes with it.
    **dict.fromkeys(
        ("architectures", "is_encoder_decoder", "tie_word_embeddings", "model_type", "use_cache", "vision_use_head",
         "max_position_embeddings", "initializer_range"),
        "no part of what is computed",
    ),
    **dict.fromkeys(("attention_dropout", "dropout_rate", "classifier_dropout_rate"), "only in training"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "where writing starts and ends"),
    **dict.fromkeys(
        ("transformers_version", "_from_model_config", "output_attentions", "output_hidden_states"),
        "generation_config.json: who wrote it, and what transformers returns",
    ),
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
    """Return whether a failed check names a setting, by its path or by section and key."""
    section, _, last = name.rpartition(".")
    return not check.passed and (
        name in message_of(check) or (f"{section}." in message_of(check) and last in message_of(check))
    )


def seen_by_parity(report: Any) -> bool:
    return any(check.name in PARITIES for check in report.failed)


def test_every_changed_setting_is_found(bench: MakeBench, without_use: None) -> None:
    made, tally, unseen = bench("images-8"), Tally(), set()
    for file in ("config.json", "generation_config.json"):
        for path, value in list(leaves(read_json_object(made.folder / file))):
            name, changed = setting_name(path), plausible(path, value)
            made.edit(file, partial(put, path=path, value=changed))
            report = made.resealed()
            tally.add(f"{file}: {name} = {changed!r}", report)
            assert says(check_of(report, "config"), name), (name, changed)
            # An unreadable folder has no forward pass to compare.
            if not seen_by_parity(report) and "provenance" not in report.skipped:
                unseen.add(name)
    assert tally.caught["config"] == tally.tried
    surprising = {name for name in unseen if name not in UNSEEN and name.rpartition(".")[2] not in UNSEEN}
    assert surprising == set()
    close(tally, "settings")


def test_every_changed_setting_of_a_text_only_target_is_found(bench: MakeBench, without_passes: None) -> None:
    made, tally = bench("text-float32"), Tally()
    for path, value in list(leaves(read_json_object(made.folder / "config.json"))):
        made.edit("config.json", partial(put, path=path, value=plausible(path, value)))
        report = made.resealed()
        tally.add(f"{setting_name(path)} = {plausible(path, value)!r}", report)
        assert says(check_of(report, "config"), setting_name(path)), setting_name(path)
    assert tally.caught["config"] == tally.tried
    close(tally, "settings of a text-only target")


def test_every_setting_must_be_present(bench: MakeBench, without_passes: None) -> None:
    made, tally = bench("images-8"), Tally()
    for file in ("config.json", "generation_config.json"):
        for path, _ in list(leaves(read_json_object(made.folder / file))):
            made.edit(file, lambda document, path=path: parent_of(document, path).pop(path[-1]))
            report = made.resealed()
            name = setting_name(path)
            tally.add(f"without {name}", report)
            # An unreadable setting is named by its section.
            named = name if "rope_theta" not in name else name.partition(".full")[0].partition(".sliding")[0]
            assert named in message_of(check_of(report, "config")), name
    assert tally.caught["config"] == tally.tried
    close(tally, "settings missing")


@pytest.mark.parametrize("section", ["", "encoder", "encoder.text_config", "encoder.vision_config", "decoder"])
def test_settings_of_other_models_are_unknown(section: str, bench: MakeBench, without_passes: None) -> None:
    made, keys = bench("images-8"), tuple(section.split(".")) if section else ()
    unknown: Document = {
        "use_bidirectional_attention": True, "quantization_config": {"quant_method": "bitsandbytes"},
        "auto_map": {"AutoModel": "modeling.Model"}, "rope_scaling": {"type": "yarn"}, "torch_dtype": "float16",
        "_attn_implementation": "sdpa", "sliding_window_pattern": 2, "empty": {}, "none": None,
    }  # fmt: skip
    if section:
        unknown["dtype"] = "bfloat16"
    for key, value in unknown.items():
        made.edit("config.json", partial(put, path=(*keys, key), value=value))
        check = check_of(made.resealed(), "config")
        assert not check.passed
        assert ".".join((*keys, key)) in message_of(check)


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
    # An activation is not a module: the projection after it is the first that differs.
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


def test_computed_settings_are_found_by_parity(bench: MakeBench, without_use: None) -> None:
    made, tally = bench("images-13"), Tally()

    def judge(path: str, value: Any) -> Any:
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        made.edit("config.json", partial(put, path=keys, value=value))
        report = made.resealed()
        tally.add(f"{path} = {value!r}", report)
        assert setting_name(keys) in message_of(check_of(report, "config"))
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
    for path, value, text in OF_IMAGES:
        report = judge(path, value)
        assert text in check_of(report, "vision_parity").detail, path
    assert tally.caught["config"] == tally.caught["parity"] == tally.tried
    close(tally, "settings that are computed with")


# Tricks


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
    """Checks spell nested settings with dots; a dotted key may not pass for a nested one."""
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
def test_a_fraction_is_not_an_integer(path: str, value: Any, bench: MakeBench) -> None:
    """transformers refuses such a config: its fields are typed."""
    made = bench("images-8")
    made.edit("config.json", partial(put, path=tuple(path.split(".")), value=value))
    assert not made.resealed().passed


@pytest.mark.parametrize(
    "setting",
    ["query_pre_attn_scalar", "sliding_window", "hidden_size", "head_dim", "num_attention_heads", "intermediate_size"],
)
@pytest.mark.parametrize("number", [10**30, 10**400], ids=["1e30", "1e400"])
def test_oversized_numbers(setting: str, number: int, bench: MakeBench) -> None:
    made = bench("images-8")
    made.edit("config.json", partial(put, path=("decoder", setting), value=number))
    assert not check_of(made.resealed(), "config").passed


@pytest.mark.parametrize("path", [("encoder", "eoi_token_index"), ("image_token_index",)], ids=".".join)
def test_oversized_token_ids(path: tuple[str, ...], bench: MakeBench) -> None:
    made = bench("images-8")
    made.edit("config.json", partial(put, path=path, value=10**30))
    assert not check_of(made.resealed(), "config").passed


@pytest.mark.parametrize("depth", [100, 500, 900, 5000])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_deeply_nested_setting_is_unknown(file: str, depth: int, bench: MakeBench) -> None:
    made = bench("images-8")
    nested = b'{"deep": ' + b"[" * depth + b"]" * depth + b", "
    (made.folder / file).write_bytes(made.sound[file].replace(b"{", nested, 1))
    assert not check_of(made.resealed(), "config").passed
