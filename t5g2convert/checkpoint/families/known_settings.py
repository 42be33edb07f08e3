"""The known settings, file by file and section by section, with the treatment of each and the reason.

A test compares these lists with the fields of the classes of transformers; docs/settings.md is made from them. An
unlisted setting is refused if its name suggests an effect on the computation, and noted otherwise.
"""

from collections.abc import Mapping
from typing import Any, Final

from t5g2convert.checkpoint.families.setting_rules import Outcome, Section, Setting

USED, CARRIED, REFUSED, NOTED, ABOUT = Outcome


def _all(outcome: Outcome, names: str, because: str, *neutral: Any) -> tuple[Setting, ...]:
    """Return settings that differ only in name."""
    return tuple(Setting(name, outcome, because, neutral) for name in names.split())


def _switch(outcome: Outcome, because: str, **neutral: Any) -> tuple[Setting, ...]:
    """Return settings, each with the one value that changes nothing."""
    return tuple(Setting(name, outcome, because, (value,)) for name, value in neutral.items())


_TWO_LABELS: Final = {"0": "LABEL_0", "1": "LABEL_1"}

EVERY_CONFIG: Final = (
    Setting("model_type", USED, "decides how the file is read"),
    *_all(
        ABOUT, "transformers_version _name_or_path name_or_path _commit_hash unsloth_version unsloth_fixed "
        "_unsloth_fixed _diffusers_version _sentence_transformers_version auto_map custom_pipelines",
        "metadata about the file's author, or the name of code that is never run",
    ),
    *_all(USED, "dtype torch_dtype", "the tensors' stored dtype is used; noted if config.json differs"),
    *_switch(
        REFUSED, "not a decoder-only model", is_encoder_decoder=False,
        add_cross_attention=False,
    ),
    Setting("cross_attention_hidden_size", REFUSED, "not a decoder-only model"),
    Setting("pruned_heads", REFUSED, "pruning heads at load time is not supported", ({},)),
    Setting("per_layer_config", REFUSED, "per-layer settings are not supported", ({},)),
    Setting("is_causal", REFUSED, "encoders with other attention masks are not supported", (True,)),
    Setting(
        "layer_idx_mapping", REFUSED, "a layer order that differs from the tensor names is not supported", ({}, []),
    ),
    *_all(
        USED, "quantization_config quantization compression_config",
        "quantised weights are refused; noted if the weights are not quantised",
    ),
    Setting("sparsity_config", REFUSED, "quantised weights are not supported"),
    *_switch(
        NOTED, "affects what transformers returns, not what it computes", output_hidden_states=False,
        output_attentions=False, return_dict=True, use_return_dict=True, tie_last_hidden_states=False,
        output_router_logits=False,
    ),
    *_switch(
        NOTED, "an option of older transformers versions that these models do not read", chunk_size_feed_forward=0,
        torchscript=False, use_bfloat16=False, tf_legacy_loss=False, is_decoder=False, tie_encoder_decoder=False,
    ),
    Setting("id2label", NOTED, "classifier labels", (_TWO_LABELS, {})),
    Setting("label2id", NOTED, "classifier labels", ({"LABEL_0": 0, "LABEL_1": 1}, {})),
    Setting("num_labels", NOTED, "classifier labels", (2,)),
    *_all(NOTED, "problem_type classifier_dropout finetuning_task task_specific_params", "task-specific", {}),
    *_all(NOTED, "tokenizer_class prefix processor_class sep_token_id", "the tokenizer files take precedence"),
    *_all(
        NOTED, "attn_implementation _attn_implementation _attn_implementation_internal _experts_implementation "
        "_experts_implementation_internal", "the attention kernel is chosen at load time",
    ),
    Setting("_attn_implementation_autoset", NOTED, "the attention kernel is chosen at load time", (False, True)),
    *_switch(
        NOTED, "transformers reads generation settings from generation_config.json", max_length=20, min_length=0,
        do_sample=False, early_stopping=False, num_beams=1, num_beam_groups=1, diversity_penalty=0.0, temperature=1.0,
        top_k=50, top_p=1.0, typical_p=1.0, repetition_penalty=1.0, length_penalty=1.0, no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        num_return_sequences=1, output_scores=False, return_dict_in_generate=False, remove_invalid_values=False,
        penalty_alpha=0.0, cache_implementation="hybrid",
    ),
    *_all(
        NOTED, "decoder_start_token_id bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id "
        "forced_eos_token_id exponential_decay_length_penalty max_new_tokens min_new_tokens stop_strings "
        "encoder_repetition_penalty epsilon_cutoff eta_cutoff min_p guidance_scale",
        "transformers reads generation settings from generation_config.json",
    ),
)  # fmt: skip
"""Settings that any section of any transformers config may have."""


def _architectures(*classes: str) -> Setting:
    """Return the setting for the class that loads the source; the target has its own class."""
    return Setting("architectures", NOTED, "replaced by the target's class", tuple([name] for name in classes))


_SIZES: Final = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
)

_STACK: Final = (
    *_all(USED, _SIZES, "compared with the tensors, and carried to both stacks"),
    *_all(
        CARRIED, "hidden_activation rms_norm_eps query_pre_attn_scalar sliding_window max_position_embeddings "
        "attn_logit_softcapping attention_dropout initializer_range use_cache",
        "the same in both stacks",
    ),
    *_all(CARRIED, "bos_token_id eos_token_id pad_token_id", "the same in both stacks; refused beyond the table"),
    Setting("hidden_act", USED, "hidden_activation is read instead; noted if they differ"),
    Setting("layer_types", CARRIED, "selects the layers with a sliding window"),
    Setting("attention_bias", USED, "true is refused: biases are not supported"),
    Setting("use_bidirectional_attention", REFUSED, "encoders with other attention masks are not supported", (False,)),
    *_switch(REFUSED, "partial rotation is not supported", partial_rotary_factor=1.0),
    *_all(USED, "rope_theta rope_scaling rope_parameters", "read in every spelling; all spellings must agree"),
    Setting("mlp_bias", REFUSED, "biases are not supported", (False,)),
    *_switch(REFUSED, "query and key norms are fixed by the model family", use_qk_norm=True, qk_norm=True),
)  # fmt: skip

GEMMA3_TEXT: Final = Section(
    "config.json of a text-only Gemma 3, and `text_config` of one with images",
    (
        *EVERY_CONFIG,
        _architectures("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3Model", "Gemma3TextForCausalLM"),
        *_STACK,
        Setting(
            "final_logit_softcapping",
            CARRIED,
            "applies to the decoder; refused in a multimodal model, which ignores it",
        ),
        Setting("rope_local_base_freq", USED, "theta of the sliding-window layers"),
        *_all(
            USED,
            "sliding_window_pattern _sliding_window_pattern",
            "read if layer_types is absent; noted if they differ",
        ),
        Setting("tie_word_embeddings", USED, "false requires a head that equals the embedding"),
        *_all(
            NOTED,
            "boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id image_token_id "
            "mm_tokens_per_image vision_config",
            "a text model does not read images",
        ),
    ),
    "Gemma 3",
)

GEMMA3: Final = Section(
    "config.json of a Gemma 3 with images",
    (
        *EVERY_CONFIG,
        _architectures("Gemma3ForConditionalGeneration", "Gemma3Model"),
        *_all(USED, "text_config vision_config", "read; see the sections below"),
        *_all(
            CARRIED,
            "boi_token_index eoi_token_index image_token_index mm_tokens_per_image",
            "position of images among the tokens; the image token gets a new id if its row is cut",
        ),
        *_all(
            USED,
            "boi_token_id eoi_token_id image_token_id",
            "transformers' names for the same ids: both spellings must agree",
        ),
        *_all(USED, "bos_token_id eos_token_id pad_token_id", "take precedence over text_config"),
        Setting(
            "tie_word_embeddings",
            USED,
            "takes precedence over text_config; false requires a head that equals the embedding",
        ),
        Setting("initializer_range", USED, "text_config's value is carried; noted if this one differs"),
        *_all(
            NOTED,
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "intermediate_size max_position_embeddings sliding_window use_cache ignore_index image_seq_length",
            "text_config decides",
        ),
        *_all(
            REFUSED,
            "rope_theta rope_scaling rope_parameters rope_local_base_freq layer_types attn_logit_softcapping "
            "final_logit_softcapping rms_norm_eps query_pre_attn_scalar hidden_activation attention_bias",
            "not read at this level; it belongs in text_config",
        ),
        *_switch(
            REFUSED,
            "encoders with other attention masks are not supported",
            use_bidirectional_attention=False,
            use_bidirectional=False,
        ),
    ),
    "Gemma 3",
)

SIGLIP: Final = Section(
    "`vision_config` of a Gemma 3 (SigLIP)",
    (
        *EVERY_CONFIG,
        _architectures("SiglipVisionModel"),
        *_all(
            USED,
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size",
            "compared with the tensors, and carried",
        ),
        *_all(CARRIED, "hidden_act layer_norm_eps", "used by the tower"),
        Setting(
            "attention_dropout",
            CARRIED,
            "used only in training, where the target has one value (text_config's) for all parts",
        ),
        Setting("vision_use_head", NOTED, "image features bypass the pooling head", (False,)),
        *_all(NOTED, "initializer_range initializer_factor dropout", "used only in training"),
        *_all(
            NOTED,
            "projection_dim projection_size num_image_tokens projector_hidden_act",
            "Gemma 3's projector does not have it",
        ),
        *_switch(REFUSED, "the tower's attention has biases, and is not causal", attention_bias=True, qkv_bias=True),
    ),
    "SigLIP",
)

GEMMA2: Final = Section(
    "config.json of a Gemma 2",
    (
        *EVERY_CONFIG,
        _architectures("Gemma2ForCausalLM", "Gemma2Model"),
        *_STACK,
        Setting("final_logit_softcapping", CARRIED, "the decoder's"),
        Setting("tie_word_embeddings", CARRIED, "with false, the separate head is converted"),
        Setting("sliding_window_size", NOTED, "sliding_window is read instead"),
    ),
    "Gemma 2",
)

ROPE: Final = Section(
    "`rope_parameters`, `rope_scaling` and their layer types",
    (
        Setting("rope_type", USED, "default or linear; anything else is refused"),
        Setting("type", USED, "older spelling of rope_type; refused in Gemma 3's rope_scaling, because readers differ"),
        Setting("factor", USED, "divides positions if the type is linear; refused without a type"),
        Setting("rope_theta", USED, "must agree with its other occurrences"),
        *_switch(REFUSED, "partial rotation is not supported", partial_rotary_factor=1.0),
        *_switch(REFUSED, "default and linear do not scale attention", attention_factor=1.0),
        Setting("original_max_position_embeddings", NOTED, "default and linear do not read it"),
    ),
    "a default or linear rotary embedding",
    closed=True,
)

CONFIG_SECTIONS: Final = (GEMMA3, GEMMA3_TEXT, SIGLIP, ROPE, GEMMA2)
"""The sections of config.json, in the order of docs/settings.md."""

_GENERATION_IDS: Final = (
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id "
    "suppress_tokens begin_suppress_tokens bad_words_ids force_words_ids forced_decoder_ids sequence_bias"
)

GENERATION: Final = Section(
    "generation_config.json",
    (
        *_all(CARRIED, _GENERATION_IDS, "ids follow moved tokens; an id beyond the embedding table is refused"),
        *_all(
            CARRIED,
            "cache_implementation do_sample max_length max_new_tokens repetition_penalty stop_strings temperature "
            "top_k top_p use_cache",
            "unchanged",
        ),
        Setting("every other key", CARRIED, "unchanged, known to t5g2 or not"),
    ),
    "transformers",
)

TOKENIZER: Final = Section(
    "tokenizer_config.json",
    (
        Setting("processor_class", NOTED, "kept for a multimodal model; a text-only target has no processor"),
        Setting("added_tokens_decoder", CARRIED, "the image token gets a new id if its row is cut"),
        Setting("boi_token", CARRIED, "added if absent and the image token moves"),
        Setting("eoi_token", CARRIED, "added if absent and the image token moves"),
        Setting("image_token", CARRIED, "added if absent and the image token moves"),
        Setting("tokenizer_class", CARRIED, "added if absent and the image token moves"),
        Setting("every other key", CARRIED, "unchanged; a key that names a replaced token is refused"),
    ),
    "transformers",
)

PAGE: Final[Mapping[str, str]] = {
    "used": "read: it determines the output, or is compared with a setting that does",
    "carried": "written to the output",
    "refused": "the conversion is refused, except at the values in brackets",
    "noted": "left behind, and named in one note, except at the values in brackets",
    "left behind": "has no effect on the model",
}
"""Explanations of the outcomes for docs/settings.md."""
