import hashlib
from pathlib import Path

import pytest

from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.errors import MappingError
from t5g2convert.mapping.library import mappings_folder, shipped_maps
from t5g2convert.mapping.name_patterns import index_of, pattern_fault, root_of
from t5g2convert.mapping.schema import PresetSettings, Row, WeightMap
from t5g2convert.mapping.source_families import FAMILIES, source_variants
from t5g2convert.mapping.weightmap import did_you_mean, load_map

GOOD = (mappings_folder() / "gemma3.yaml").read_text()

UP_FROM = '"{text}layers.{layer}.mlp.up_proj.weight"'
UP_TO = '"model.encoder.layers.{layer}.mlp.up_proj.weight"'
STUB = """\
  - to: {projector: "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight"}
    shape: [16]
    op: {zeros: true}
    when: text_only
"""


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) >= 1, old
    assert old != new
    return GOOD.replace(old, new, 1)


def line_of_the_edit(text: str) -> int:
    pairs = zip(text.split("\n"), GOOD.split("\n"), strict=False)
    return next(number for number, (ours, theirs) in enumerate(pairs, start=1) if ours != theirs)


def refusal(path: Path, text: str) -> MappingError:
    path.write_text(text)
    with pytest.raises(MappingError) as caught:
        load_map(path)
    return caught.value


def assert_points_at(error: MappingError, path: Path, text: str, node: str) -> None:
    where, line, column = (error.where or "").rsplit(":", 2)
    assert where == str(path)
    assert int(line) == line_of_the_edit(text)
    shown = text.split("\n")[int(line) - 1]
    assert shown[int(column) - 1 :].startswith(node)
    assert error.message.splitlines()[-2:] == [f"  {shown}", "  " + " " * (int(column) - 1) + "^"]


UNKNOWN_KEYS = [
    ("vocabulary:\n", "vocabulry:\n", "vocabulry", "vocabulary"),
    ("drop:\n", "drops:\n", "drops", "drop"),
    ("\ngeneration_config:", "\ngeneration_confg:", "generation_confg", "generation_config"),
    ("  cut: {", "  cuts: {", "cuts", "cut"),
    ("{model_type: t5gemma2, architecture:", "{model_type: t5gemma2, architectur:", "architectur", "architecture"),
    ("source: {model_type:", "source: {model_typ:", "model_typ", "model_type"),
    ("  carry: ", "  cary: ", "cary", "carry"),
    ("  processor:\n", "  procesor:\n", "procesor", "processor"),
    ("    special: [", "    specials: [", "specials", "special"),
    ('replaces: "<unused99>"', 'replace: "<unused99>"', "replace", "replaces"),
    ("    shape: [query, hidden]", "    shap: [query, hidden]", "shap", "shape"),
    ("    merged_attention: true", "    merged_atention: true", "merged_atention", "merged_attention"),
    ("    when: vision\n", "    wen: vision\n", "wen", "when"),
    ("    op: {zeros: true}", "    ops: {zeros: true}", "ops", "op"),
    ('  - from: "{text}norm.weight"', '  - form: "{text}norm.weight"', "form", "from"),
    ('  - from: "{text}norm.weight"', '  - from_: "{text}norm.weight"', "from_", "from"),
    ("    because: ", "    becuse: ", "becuse", "because"),
    ("    must_equal: ", "    must_eqal: ", "must_eqal", "must_equal"),
    ("    option: ", "    options: ", "options", "option"),
]


@pytest.mark.parametrize(("old", "new", "key", "meant"), UNKNOWN_KEYS, ids=[key for _, _, key, _ in UNKNOWN_KEYS])
def test_C2_an_unknown_key_is_refused_with_the_nearest_one(
    old: str, new: str, key: str, meant: str, tmp_path: Path
) -> None:
    text = edited(old, new)
    error = refusal(tmp_path / "map.yaml", text)
    assert error.message.startswith(f"unknown key {key!r}\n")
    assert error.hint == f"did you mean {meant}?"
    assert_points_at(error, tmp_path / "map.yaml", text, key)


WRONG_TYPES = [
    pytest.param("format: 1", "format: 2", "2", "format", id="format-2"),
    pytest.param("format: 1", 'format: "1"', '"1"', "format", id="format-text"),
    pytest.param("name: gemma3", "name: 3", "3", "name", id="name-number"),
    pytest.param("name: gemma3", "name: Gemma 3", "Gemma 3", "name", id="name-with-space"),
    pytest.param("name: gemma3", "name: ../gemma3", "../gemma3", "name", id="name-path"),
    pytest.param("title: Gemma 3 (", "title: 3\n# (", "3", "title", id="title-number"),
    pytest.param(
        "model_type: [gemma3, gemma3_text]", "model_type: gemma3", "gemma3}", "model_type", id="text-for-list"
    ),
    pytest.param("model_type: [gemma3, gemma3_text]", "model_type: []", "[]", "model_type", id="no-model-type"),
    pytest.param("model_type: t5gemma2", "model_type: 5", "5,", "expected a name pattern", id="target-number"),
    pytest.param("{262208: 262144}", "{262208: many}", "many", "", id="rows-text"),
    pytest.param("{image_token_index: 256001}", '{image_token_index: "256001"}', '"256001"', "", id="token-text"),
    pytest.param("shape: [key_value, hidden]", "shape: key_value", "key_value", "shape", id="shape-text"),
    pytest.param("shape: [key_value, hidden]", "shape: [1.5, hidden]", "1.5", "", id="size-float"),
    pytest.param("shape: [key_value, hidden]", "shape: [true, hidden]", "true", "", id="size-boolean"),
    pytest.param("merged_attention: true", "merged_attention: 1", "1", "merged_attention", id="flag-number"),
    pytest.param("when: text_only", "when: 3", "3", "when", id="condition-number"),
    pytest.param("op: {zeros: true}", "op: zeros", "zeros", "op", id="op-text"),
    pytest.param("op: {zeros: true}", "op: {zero: true}", "{zero", "expected one operation of", id="op-unknown"),
    pytest.param("op: {zeros: true}", "op: {zeros: 1}", "1", "zeros", id="op-number"),
    pytest.param(
        "op: {take_rows: vocab}",
        "op: {take_rows: vocab, zeros: true}",
        "{take_rows",
        "expected one operation of",
        id="op-two",
    ),
    pytest.param(f"from: {UP_FROM}", "from: 3", "3", "from", id="pattern-number"),
    pytest.param(f"encoder: {UP_TO}", f"encoder: [{UP_TO}, 3]", "[", "expected a name pattern", id="target-list"),
    pytest.param(f"encoder: {UP_TO}", f"encodr: {UP_TO}", "encodr", "unknown part 'encodr'", id="part"),
    pytest.param('because: "the softmax', 'because: 3  # "', "3", "because", id="reason-number"),
    pytest.param("    - chat_template.json\n", "    - {tokenizer: model}\n", "{tokenizer", "", id="file-mapping"),
    pytest.param("config:\n  architectures", "config: none\n_:\n  architectures", "none", "config", id="config-text"),
]


@pytest.mark.parametrize(("old", "new", "node", "named"), WRONG_TYPES)
def test_C2_a_value_of_the_wrong_type_is_refused(old: str, new: str, node: str, named: str, tmp_path: Path) -> None:
    text = edited(old, new)
    error = refusal(tmp_path / "map.yaml", text)
    assert named in error.message.splitlines()[0]
    assert_points_at(error, tmp_path / "map.yaml", text, node)


FAULTS = [
    pytest.param(
        "model_type: t5gemma2",
        "model_type: t5gema2",
        "t5gema2,",
        "unknown target",
        "did you mean t5gemma2?",
        id="target",
    ),
    pytest.param(
        "architecture: T5Gemma2ForConditionalGeneration}",
        'architecture: T5Gemma2ForConditionalGeneration, roots: {text: "{layer}"}}',
        '"{layer}"',
        "expected a literal prefix",
        None,
        id="target-root",
    ),
    pytest.param(
        "when: text_only",
        "when: text-only",
        "text-only",
        "unknown feature",
        "did you mean text_only?",
        id="condition",
    ),
    pytest.param(
        'because: "the softmax',
        'when: tied\n    because: "the softmax',
        "tied",
        "unknown feature 'tied'",
        "known: projector_aligned, projector_copy, projector_zeros, text_only, vision",
        id="condition-of-a-drop",
    ),
    pytest.param(
        UP_FROM,
        '"{text}layers.{encoder_layer}.mlp.up_proj.weight"',
        '"{text}layers.{enc',
        "the source has no encoder layers",
        None,
        id="index-of-another-family",
    ),
    pytest.param(
        "shape: [key_value, hidden]",
        "shape: [key_valu, hidden]",
        "key_valu",
        "unknown dimension 'key_valu'",
        "did you mean key_value?",
        id="dim",
    ),
    pytest.param(
        "shape: [key_value, hidden]",
        "shape: [xyzzy, hidden]",
        "xyzzy",
        "unknown dimension 'xyzzy'",
        None,
        id="far",
    ),
    pytest.param(
        "op: {take_rows: vocab}",
        "op: {take_rows: vocb}",
        "{take_rows",
        "unknown dimension 'vocb'",
        "did you mean vocab?",
        id="op-dim",
    ),
    pytest.param(
        "op: {scaled_row: eoi_token}",
        "op: {scaled_row: eoi_tokn}",
        "{scaled_row",
        "unknown dimension 'eoi_tokn'",
        "did you mean eoi_token?",
        id="row-dim",
    ),
    pytest.param(
        UP_FROM,
        '"{txt}layers.{layer}.mlp.up_proj.weight"',
        '"{txt}',
        "unknown root or index {txt}",
        "did you mean text?",
        id="root",
    ),
    pytest.param(
        UP_FROM,
        '"{text}layers.{layr}.mlp.up_proj.weight"',
        '"{text}',
        "unknown root or index {layr}",
        "did you mean layer?",
        id="index",
    ),
    pytest.param(
        UP_TO,
        '"model.encoder.layers.{layr}.mlp.up_proj.weight"',
        '"model.',
        "unknown root or index {layr}",
        "did you mean layer?",
        id="target-index",
    ),
    pytest.param(
        'from: "{vision}head.probe"',
        'from: "{visoin}head.probe"',
        '"{visoin}',
        "unknown root or index {visoin}",
        "did you mean vision?",
        id="drop-root",
    ),
    pytest.param(
        '"{text}rotary_emb_local.inv_freq"',
        '"{txt}rotary_emb_local.inv_freq"',
        '"{txt}rotary',
        "unknown root or index {txt}",
        "did you mean text?",
        id="drop-root-in-a-list",
    ),
    pytest.param(
        '"qa_outputs.bias"]',
        '"{text}norm.weight"]',
        '"{text}norm.weight"]',
        "a row carries {text}norm.weight",
        None,
        id="drop-in-a-list-carried",
    ),
    pytest.param(
        "option: drop_heads",
        "option: drop_head",
        "drop_head",
        "option: Input should be 'drop_heads'",
        None,
        id="drop-option",
    ),
    pytest.param(
        'from: ["qa_outputs.weight", "qa_outputs.bias"]',
        "from: []",
        "[]",
        "expected a name pattern, or a list of name patterns",
        None,
        id="drop-of-nothing",
    ),
    pytest.param(
        'must_equal: "{text}embed_tokens.weight"',
        'must_equal: "{tex}embed_tokens.weight"',
        '"{tex}',
        "unknown root or index {tex}",
        "did you mean text?",
        id="equal-root",
    ),
    pytest.param(
        'must_equal: "{text}embed_tokens.weight"',
        'must_equal: "{text}layers.{layer}.input_layernorm.weight"',
        '"{text}layers',
        "{layer} is on one side only",
        None,
        id="equal-index",
    ),
    pytest.param(
        UP_FROM, '"{text}layers.{layer.mlp.up_proj.weight"', '"{text}', "unbalanced braces", None, id="braces-open"
    ),
    pytest.param(
        UP_FROM, '"{text}layers.layer}.mlp.up_proj.weight"', '"{text}', "unbalanced braces", None, id="braces-closed"
    ),
    pytest.param(
        UP_FROM,
        '"layers.{text}{layer}.mlp.up_proj.weight"',
        '"layers',
        "the root {text} must come first",
        None,
        id="root-inside",
    ),
    pytest.param(
        UP_FROM,
        '"{text}layers.{layer}.{layer}.up_proj.weight"',
        '"{text}',
        "more than one index",
        None,
        id="two-indices",
    ),
    pytest.param(
        UP_TO,
        '"{text}layers.{layer}.mlp.up_proj.weight"',
        '"{text}',
        "{text} is not a root of the target",
        "target.roots has none",
        id="root-in-target",
    ),
    pytest.param(
        UP_TO,
        '"model.encoder.layers.0.mlp.up_proj.weight"',
        '"model.',
        "{layer} is on one side only",
        None,
        id="layer-in-source-only",
    ),
    pytest.param(
        UP_TO,
        '"model.encoder.layers.{vision_layer}.mlp.up_proj.weight"',
        '"model.',
        "is on one side only",
        None,
        id="other-index",
    ),
    pytest.param(
        '"model.encoder.norm.weight", decoder',
        '"model.encoder.norm.{layer}.weight", decoder',
        '"model.',
        "{layer} is on one side only",
        None,
        id="layer-in-target-only",
    ),
    pytest.param(
        UP_TO,
        '"model.encoder.layers.{layer}.mlp.gate_proj.weight"',
        '"model.',
        "another row fills model.encoder.layers.{layer}.mlp.gate_proj.weight already",
        None,
        id="two-rows-one-target",
    ),
    pytest.param(
        UP_TO,
        '"model.decoder.layers.{layer}.mlp.gate_proj.weight"',
        '"model.',
        "another row fills model.decoder.layers.{layer}.mlp.gate_proj.weight already",
        None,
        id="two-parts-one-target",
    ),
    pytest.param(
        UP_FROM,
        '"{text}layers.{layer}.mlp.gate_proj.weight"',
        '"{text}',
        "another row carries {text}layers.{layer}.mlp.gate_proj.weight already",
        None,
        id="two-rows-one-source",
    ),
    pytest.param(
        'from: "{vision}head.probe"',
        'from: "{vision}post_layernorm.bias"',
        '"{vision}post',
        "a row carries {vision}post_layernorm.bias",
        None,
        id="dropped-and-carried",
    ),
    pytest.param(
        "model_type: [gemma3, gemma3_text]",
        "model_type: [gemma3, gemma3_txt]",
        "gemma3_txt",
        "unknown model_type 'gemma3_txt'",
        "did you mean gemma3_text?",
        id="model-type",
    ),
    pytest.param(
        "model_type: [gemma3, gemma3_text]",
        "model_type: [gemma3, llama]",
        "llama",
        "unknown model_type 'llama'",
        f"known: {', '.join(FAMILIES)}",
        id="model-type-far",
    ),
    pytest.param(
        "moved: {image_token_index:",
        "moved: {image_token_indx:",
        "image_token_indx",
        "unknown value 'image_token_indx'",
        "did you mean image_token_index?",
        id="moved",
    ),
    pytest.param(
        "{id: image_token_index,",
        "{id: image_token_indx,",
        "image_token_indx",
        "'image_token_indx' does not move",
        "vocabulary.moved has image_token_index",
        id="file-moved",
    ),
    pytest.param(
        '    moved:\n      - {id: image_token_index, token: "<image_soft_token>", replaces: "<unused99>"}\n',
        "    moved: []\n",
        "[]",
        "vocabulary.moved has 'image_token_index', but no token is listed for it",
        None,
        id="file-moved-without-token",
    ),
    pytest.param(
        'replaces: "<unused99>"',
        'replaces: "<image_soft_token>"',
        '"<image_soft_token>"}',
        "'<image_soft_token>' is duplicated",
        None,
        id="file-token-twice",
    ),
    pytest.param(
        'special: ["<mask>"]',
        'special: ["<unused99>"]',
        '"<unused99>"',
        "'<unused99>' is duplicated",
        None,
        id="file-special",
    ),
    pytest.param(
        "    - chat_template.json\n",
        "    - tokenizer.json\n",
        "tokenizer.json",
        "tokenizer.json is made by the conversion, and cannot be carried",
        None,
        id="file-made-and-carried",
    ),
    pytest.param(
        "    - chat_template.json\n",
        "    - preprocessor_config.json\n",
        "preprocessor_config.json",
        "preprocessor_config.json is made by the conversion, and cannot be carried",
        None,
        id="file-of-the-processor",
    ),
    pytest.param(
        "size: {height: $vision_image_size,",
        "size: {height: $vision_imag_size,",
        "$vision_imag_size",
        "unknown value $vision_imag_size",
        "did you mean vision_image_size?",
        id="file-value",
    ),
    pytest.param(
        "  dtype: $dtype", "  dtype: $dtyp", "$dtyp", "unknown value $dtyp", "did you mean dtype?", id="value"
    ),
    pytest.param(
        "{rope_type: linear, rope_theta: $encoder.rope_full_theta, factor",
        "{rope_type: linear, rope_theta: $encoder.rope_ful_theta, factor",
        "$encoder.rope_ful_theta",
        "unknown value $encoder.rope_ful_theta",
        "did you mean encoder.rope_full_theta?",
        id="value-inside",
    ),
    pytest.param(
        "final_logit_softcapping: $decoder.final_logit_softcapping",
        "final_logit_softcapping: $vision.final_logit_softcapping",
        "$vision.final_logit_softcapping",
        "unknown value $vision.final_logit_softcapping",
        "did you mean final_logit_softcapping?",
        id="value-of-no-stack",
    ),
    pytest.param(
        "height: $vision_image_size,",
        "height: $encoder.vision_image_size,",
        "$encoder.vision_image_size",
        "unknown value $encoder.vision_image_size",
        "did you mean vision_image_size?",
        id="file-value-of-a-stack",
    ),
    pytest.param(
        "architectures: [T5Gemma2ForConditionalGeneration]\n  model",
        "architectures: [$arch]\n  model",
        "$arch",
        "unknown value $arch",
        None,
        id="value-in-list",
    ),
    pytest.param(
        "  pad_token_id: $decoder.pad_token_id\n\n# What",
        "  pad_token_id: $decoder.pad_token_idd\n\n# What",
        "$decoder.pad_token_idd",
        "unknown value $decoder.pad_token_idd",
        "did you mean decoder.pad_token_id?",
        id="generation-value",
    ),
    pytest.param(
        "{case: {vision: $mm_tokens_per_image, text_only: 4}}",
        "{case: {vision: $mm_tokens_per_image}}",
        "{case",
        "case must be the only key, and must have exactly one of its names for every source: projector_aligned,",
        None,
        id="case-missing",
    ),
    pytest.param(
        "{case: {vision: $mm_tokens_per_image, text_only: 4}}",
        "{case: {vision: $mm_tokens_per_image, text_only: 4, audio: 5}}",
        "{case",
        "case must be the only key",
        None,
        id="case-too-many",
    ),
    pytest.param(
        "{case: {vision: $mm_tokens_per_image, text_only: 4}}",
        "{case: {vision: $mm_tokens_per_image, text_only: 4}, other: 5}",
        "{case",
        "case must be the only key",
        None,
        id="case-beside",
    ),
    pytest.param(
        "{case: {vision: $mm_tokens_per_image, text_only: 4}}",
        "{case: [4, 256]}",
        "{case",
        "case must be the only key",
        None,
        id="case-list",
    ),
]


@pytest.mark.parametrize(("old", "new", "node", "reason", "hint"), FAULTS)
def test_C2_a_fault_is_refused_with_its_position(
    old: str, new: str, node: str, reason: str, hint: str | None, tmp_path: Path
) -> None:
    text = edited(old, new)
    error = refusal(tmp_path / "map.yaml", text)
    assert reason in error.message
    assert error.hint == hint
    assert_points_at(error, tmp_path / "map.yaml", text, node)


def row_line(text: str, start: str) -> int:
    return text[: text.index(start)].count("\n") + 1


def test_C2_a_row_without_a_source_is_refused(tmp_path: Path) -> None:
    text = edited(STUB, STUB.replace("    op: {zeros: true}\n", ""))
    error = refusal(tmp_path / "map.yaml", text)
    assert error.message.startswith("from is missing\n")
    assert error.where == f"{tmp_path}/map.yaml:{row_line(text, STUB.splitlines()[0])}:5"


def test_C2_a_row_of_zeros_with_a_source_is_refused(tmp_path: Path) -> None:
    text = edited(STUB, STUB.replace("  - to:", '  - from: "{text}other"\n    to:'))
    error = refusal(tmp_path / "map.yaml", text)
    assert error.message.startswith("a row with zeros must not have from\n")
    assert_points_at(error, tmp_path / "map.yaml", text, "from")


def test_C2_a_row_of_zeros_for_every_layer_is_refused(tmp_path: Path) -> None:
    text = edited(STUB, STUB.replace("mm_soft_emb_norm", "{layer}.mm_soft_emb_norm"))
    error = refusal(tmp_path / "map.yaml", text)
    assert "{layer} is on one side only" in error.message
    assert_points_at(error, tmp_path / "map.yaml", text, '"model.')


def test_C2_merged_attention_outside_the_stacks_is_refused(tmp_path: Path) -> None:
    row = '    to: {projector: "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight"}\n'
    text = edited(row, row + "    merged_attention: true\n")
    error = refusal(tmp_path / "map.yaml", text)
    assert "merged_attention needs targets in both stacks" in error.message
    assert error.where == f"{tmp_path}/map.yaml:{row_line(text, row) + 1}:23"


@pytest.mark.parametrize("field", ["format", "name", "title", "source", "target"])
def test_C2_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    (line,) = [line for line in GOOD.splitlines(keepends=True) if line.startswith(f"{field}:")]
    assert refusal(tmp_path / "map.yaml", edited(line, "")).message.startswith(f"{field}: Field required\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("op: {zeros: true}", "op: {zeros: false}", id="zeros-false"),
        pytest.param("{262208: 262144}", "{262208: 300000}", id="cut-grows-the-table"),
        pytest.param("{262208: 262144}", "{262208: 0}", id="cut-leaves-nothing"),
        pytest.param("{262208: 262144}", "{262208: -1}", id="cut-negative"),
        pytest.param("{image_token_index: 256001}", "{image_token_index: -1}", id="moved-negative"),
        pytest.param("{image_token_index: 256001}", "{layer_types: 256001}", id="moved-no-token"),
        pytest.param("shape: [key_value, hidden]", "shape: [-1, hidden]", id="size-negative"),
        pytest.param("    - special_tokens_map.json\n", "    - ../tokenizer.json\n", id="carry-outside"),
        pytest.param("    - special_tokens_map.json\n", "    - /etc/hostname\n", id="carry-absolute"),
        pytest.param("    - special_tokens_map.json\n", '    - "a\\0b"\n', id="carry-nul"),
        pytest.param("    - special_tokens_map.json\n", "    - config.json\n", id="carry-over-the-config"),
        pytest.param('replaces: "<unused99>"', 'replaces: "<un\\"used99>"', id="token-with-a-quote"),
        pytest.param('replaces: "<unused99>"', 'replaces: "<un\\\\used99>"', id="token-with-a-backslash"),
        pytest.param('replaces: "<unused99>"', 'replaces: ": x"', id="token-like-json"),
        pytest.param('replaces: "<unused99>"', 'replaces: ""', id="token-empty"),
        pytest.param('special: ["<mask>"]', 'special: ["a\\tb"]', id="token-with-a-tab"),
        pytest.param(
            '  projector:\n    - "multi_modal_projector."\n    - "model.multi_modal_projector."\n',
            "  projector: []\n",
            id="root-without-spelling",
        ),
        pytest.param('- "model.multi_modal_projector."', '- "model.{layer}."', id="spelling-with-braces"),
    ],
)
def test_C2_a_map_that_no_model_can_satisfy_is_refused(old: str, new: str, tmp_path: Path) -> None:
    text = edited(old, new)
    error = refusal(tmp_path / "map.yaml", text)
    assert (error.where or "").rsplit(":", 2)[1] == str(line_of_the_edit(text))


SETTINGS = "    settings: {rope_full_factor: 8.0, max_position_embeddings: 131072}"


@pytest.mark.parametrize(
    ("settings", "node", "reason"),
    [
        ("rope_full_facto: 8.0", "rope_full_facto", "unknown key 'rope_full_facto' (did you mean rope_full_factor?)"),
        ("rms_norm_eps: 1.0", "rms_norm_eps", "unknown key 'rms_norm_eps'"),
        ("rope_full_factor: 0.0", "0.0", "rope_full_factor: Input should be greater than 0"),
        ("rope_full_factor: -8", "-8", "rope_full_factor: Input should be greater than 0"),
        ('rope_full_factor: "8"', '"8"', "rope_full_factor: Input should be a valid number"),
        ("sliding_window: 512.5", "512.5", "sliding_window: Input should be a valid integer"),
        ("sliding_window: 0", "0", "sliding_window: Input should be greater than 0"),
        ("max_position_embeddings: 2147483648", "2147483648", "max_position_embeddings: Input should be less than"),
        ("sliding_window: null", "{", "settings: expected at least one setting, and a value for each"),
        ("", "{", "settings: expected at least one setting, and a value for each"),
    ],
    ids=str,
)
def test_C2_a_preset_may_set_only_declared_fields_to_valid_values(
    settings: str, node: str, reason: str, tmp_path: Path
) -> None:
    text = edited(SETTINGS, f"    settings: {{{settings}}}")
    error = refusal(tmp_path / "map.yaml", text)
    assert_points_at(error, tmp_path / "map.yaml", text, node)
    assert reason in f"{error.message.splitlines()[0]} ({error.hint})"


@pytest.mark.parametrize("name", PresetSettings.model_fields)
def test_every_setting_of_a_preset_may_be_set_that_the_family_has(name: str, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    text = edited(SETTINGS, f"    settings: {{{name}: 7}}")
    if name not in FAMILIES["gemma3"].terms.values:
        assert f"unknown value {name!r}" in refusal(path, text).message
        return
    path.write_text(text.replace("    assumed: [max_position_embeddings]\n", "", 1))
    assert load_map(path).map.presets["t5gemma-2-270m-270m"].settings.chosen == {name: 7}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param("text_only: {tokenizer_class", "text: {tokenizer_class", "case must be the only key", id="case"),
        pytest.param(
            "    image_processor:", "    pixels:", "expected the settings of an image_processor", id="processor"
        ),
    ],
)
def test_C2_an_impossible_file_is_refused(old: str, new: str, reason: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / "map.yaml", edited(old, new))
    assert reason in error.message.splitlines()[0]
    assert error.message.splitlines()[-1].endswith("^")


def test_a_map_without_tokenizer_and_processor_may_carry_their_files(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("files:\n")]
    (tmp_path / "map.yaml").write_text(f"{text}files: {{carry: [tokenizer.json, processor_config.json]}}\n")
    assert load_map(tmp_path / "map.yaml").map.files.tokenizer is None


def test_a_loaded_map_knows_its_file_and_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(GOOD + "# ä\n")
    loaded = load_map(path)
    assert loaded.path == path
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.map == load_map(mappings_folder() / "gemma3.yaml").map


@pytest.mark.parametrize("content", ["- 1\n", "text\n", "3\n", "{}\n"])
def test_an_invalid_map_is_refused(content: str, tmp_path: Path) -> None:
    assert (refusal(tmp_path / "map.yaml", content).where or "").startswith(f"{tmp_path}/map.yaml:1:1")


@pytest.mark.parametrize(
    ("name", "hint"), [("hiden", "did you mean hidden?"), ("hidden", "did you mean hidden?"), ("zzz", None), ("", None)]
)
def test_a_near_name_is_suggested_and_a_far_one_is_not(name: str, hint: str | None) -> None:
    assert did_you_mean(name, ["hidden", "head", "rows"]) == hint


SHIPPED = [loaded.map for loaded in shipped_maps()]
ROWS = [pytest.param(each, row, id=f"{each.name}:{row.from_ or row.to}") for each in SHIPPED for row in each.weights]


def terms(weight_map: WeightMap) -> list[SourceModel]:
    return [FAMILIES[model_type].terms for model_type in weight_map.source.model_type]


@pytest.mark.parametrize(("weight_map", "row"), ROWS)
def test_every_shipped_row_uses_names_that_exist(weight_map: WeightMap, row: Row) -> None:
    for model in terms(weight_map):
        known = {*model.dims, "vocab"}
        assert {size for size in (*row.shape, *row.op.sizes()) if isinstance(size, str)} <= known
    if row.from_ is not None:
        assert pattern_fault(row.from_, weight_map.roots, terms(weight_map)[0].dims) is None
        assert root_of(row.from_) in {*weight_map.roots, None}
    assert row.when is None or any(row.when in variant for variant in source_variants(weight_map.source.model_type))


PREFIXES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "gemma2": {
        "embedding": ("model.encoder.embed_tokens.", "model.decoder.embed_tokens.", "lm_head.out_proj."),
        "encoder": "model.encoder.",
        "decoder": "model.decoder.",
    },
    "gemma3": {
        "embedding": "model.encoder.embed_tokens.",
        "encoder": "model.encoder.",
        "decoder": "model.decoder.",
        "vision": "model.encoder.vision_tower.vision_model.",
        "projector": "model.encoder.multi_modal_projector.",
    },
    "t5gemma2-encoder": {
        "embedding": "embed_tokens.",
        "encoder": ("layers.", "norm."),
        "vision": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
    },
    "t5gemma2-decoder": {
        "embedding": "{text}embed_tokens.",
        "decoder": ("{text}layers.", "{text}norm."),
        "vision": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
    },
}


@pytest.mark.parametrize(("weight_map", "row"), ROWS)
def test_every_shipped_target_is_in_the_part_that_its_name_says(weight_map: WeightMap, row: Row) -> None:
    for part, target in row.targets:
        assert target.startswith(PREFIXES[weight_map.name][part])
        assert row.from_ is None or index_of(target) == index_of(row.from_)


def test_both_stacks_get_the_same_names(gemma3_map: WeightMap) -> None:
    stacks = [row for row in gemma3_map.weights if row.to.keys() & {"encoder", "decoder"}]
    assert len(stacks) == 14
    for row in stacks:
        assert row.to.keys() == {"encoder", "decoder"}
        assert str(row.to["decoder"]) == str(row.to["encoder"]).replace("model.encoder.", "model.decoder.")


def test_merged_attention_is_on_the_six_attention_tensors(gemma3_map: WeightMap) -> None:
    names = [f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    assert [row.from_ for row in gemma3_map.weights if row.merged_attention] == [
        f"{{text}}layers.{{layer}}.{name}" for name in names
    ]


def test_only_the_two_norms_around_attention_change_their_names(gemma3_map: WeightMap) -> None:
    renamed = {
        row.from_.rpartition("{layer}.")[2]: str(row.to["encoder"]).rpartition("{layer}.")[2]
        for row in gemma3_map.weights
        if row.from_ is not None and "encoder" in row.to
    }
    assert {old: new for old, new in renamed.items() if not new.endswith(old.replace("{text}", "."))} == {
        "input_layernorm.weight": "pre_self_attn_layernorm.weight",
        "post_attention_layernorm.weight": "post_self_attn_layernorm.weight",
    }


def test_the_spellings_seen_in_the_wild_are_known(gemma3_map: WeightMap) -> None:
    assert set(gemma3_map.roots["text"]) >= {
        "language_model.model.",
        "model.language_model.model.",
        "model.language_model.",
        "language_model.",
        "model.",
        "",
    }
    assert set(gemma3_map.roots["vision"]) >= {
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
    }
    dropped = {pattern for drop in gemma3_map.drop for pattern in drop.patterns}
    assert dropped >= {"lm_head.weight", "language_model.lm_head.weight"}


def test_the_vocabulary_is_cut_as_the_releases_are(gemma3_map: WeightMap) -> None:
    assert gemma3_map.vocabulary.cut == {262208: 262144}
    assert gemma3_map.vocabulary.moved == {"image_token_index": 256001}


@pytest.mark.parametrize("variant", source_variants(["gemma3"]), ids=lambda variant: "-".join(sorted(variant)))
def test_every_kind_of_source_fills_all_parts_of_the_target(variant: frozenset[str], gemma3_map: WeightMap) -> None:
    parts = {part for row in gemma3_map.weights if row.applies(variant) for part in row.to}
    assert parts == {"embedding", "encoder", "decoder", "vision", "projector"}


def test_shipped_maps_have_their_files_names_and_distinct_families() -> None:
    assert [loaded.map.name for loaded in shipped_maps()] == [loaded.path.stem for loaded in shipped_maps()]
    families = [(model_type, each.extracts) for each in SHIPPED for model_type in each.source.model_type]
    assert len(families) == len(set(families))
