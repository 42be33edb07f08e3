"""The check `tokenizer` names every undeclared difference from the source."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import convert, verify
from t5g2convert.checkpoint.families.gemma3 import read_gemma3
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from t5g2convert.parity.checks.tokenizer import has_tokenizer_files, judge_tokenizer
from t5g2convert.parity.reports.report import Check
from tests.models.gemma_tokenizer import (
    TAGS,
    tokenizer_text,
    write_json,
    write_nested_processor,
    write_processor,
    write_tokenizer,
)
from tests.parity.mutations import Bench, check_of

Document = dict[str, Any]

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
         "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 262_208, "sliding_window": 5}  # fmt: skip

Make = Callable[..., Bench]


def few_words() -> str:
    """Reduce the test tokenizer to its first words and tags; these tests encode no text."""
    document = json.loads(tokenizer_text())
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {word: number for word, number in vocabulary.items() if number in TAGS or number < 400}
    return json.dumps(document, indent=2, ensure_ascii=False)


@pytest.fixture
def make(gemma3_map: WeightMap, demo_config: Mapping[str, Any], tmp_path: Path) -> Make:
    """Return a conversion with tokenizer and image processor that the test may damage."""

    return partial(build, gemma3_map, demo_config, tmp_path)


def build(
    weight_map: WeightMap,
    demo_config: Mapping[str, Any],
    folder: Path,
    *,
    images: bool = True,
    change: Callable[[Path], object] | None = None,
    **options: Any,
) -> Bench:
    """Write a source, change it, convert it."""
    source = folder / "source"
    source.mkdir()
    config: Mapping[str, Any] = {"model_type": "gemma3_text", **SMALL}
    if images:
        tower = demo_config["vision_config"]
        config = {"model_type": "gemma3", "mm_tokens_per_image": 4, "vision_config": tower, "text_config": SMALL}
    write_synthetic_source(source, weight_map, config, seed=0)
    write_tokenizer(source)
    (source / "tokenizer.json").write_text(few_words())
    write_processor(source, side=56, tokens=4)
    (source / "chat_template.jinja").write_text("{{ bos_token }}")
    if change is not None:
        change(source)
    convert(source, folder / "converted", **options)
    return Bench.of(source, folder / "converted", folder / "out")


@pytest.fixture(scope="module")
def shared(gemma3_map: WeightMap, demo_config: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return the conversion that most tests damage."""
    return build(gemma3_map, demo_config, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def sound(shared: Bench) -> Bench:
    """Return the shared conversion, restored after the test."""
    shared.restore()
    return shared


def judged(made: Bench) -> Check:
    model = read_gemma3(json.loads((made.source / "config.json").read_text()), made.source)
    return judge_tokenizer(Folders(made.source), model, open_checkpoint(made.folder), read_manifest(made.folder))


def refusal(made: Bench) -> str:
    check = judged(made)
    assert not check.passed
    return "\n".join(check.offenders)


# Sound conversions

SOURCES: dict[str, Callable[[Path], object]] = {
    "as on the Hub": lambda source: None,
    "as transformers 5 saves it": lambda source: (
        (source / "preprocessor_config.json").unlink(),
        write_nested_processor(source, side=56, tokens=4),
    ),
    "no image processor": lambda source: (
        (source / "preprocessor_config.json").unlink(),
        (source / "processor_config.json").unlink(),
    ),
    "no settings of the tokenizer": lambda source: (source / "tokenizer_config.json").unlink(),
    "few settings of the tokenizer": lambda source: (source / "tokenizer_config.json").write_text(
        '{"image_token_id": 262144, "added_tokens_decoder": {"4": {"content": "<mask>"}, "256001": "<unused99>"}}'
    ),
    "no tokenizer": lambda source: (source / "tokenizer.json").unlink(),
    "a text-only export": lambda source: edit(
        source / "tokenizer.json",
        lambda document: document.update(added_tokens=document["added_tokens"][:-1]),
    ),
    "the token in place": lambda source: edit(source / "tokenizer.json", in_place),
    "another token": lambda source: (source / "tokenizer_config.json").write_text('{"sep_token": "[SEP]"}'),
}


def edit(path: Path, change: Callable[[Document], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


def in_place(document: Document) -> None:
    """Move the image token by hand, as the converter does."""
    document["added_tokens"].pop()
    for entry in document["added_tokens"]:
        if entry["content"] == "<unused99>":
            entry |= {"content": "<image_soft_token>", "special": True}
    document["model"]["vocab"]["<image_soft_token>"] = document["model"]["vocab"].pop("<unused99>")


@pytest.mark.sampled
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("label", SOURCES)
def test_a_conversion_of_a_sound_source_passes(label: str, images: bool, make: Make) -> None:
    check = judged(make(images=images, change=SOURCES[label]))
    assert check.passed, check.offenders
    assert check.name == "tokenizer"
    assert ("processor_config.json" in check.detail) is images


def test_moved_tokens_are_reported(make: Make) -> None:
    assert judged(make()).detail == (
        "tokenizer.json, tokenizer_config.json, processor_config.json, special_tokens_map.json, chat_template.jinja: "
        "tokens and pixels match the source's but for <image_soft_token>, now 256001, as declared"
    )


def test_an_unchanged_tokenizer_equals_the_sources(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "converted")
    made = Bench.of(demo_source, tmp_path / "converted", tmp_path / "out")
    assert judged(made).passed
    made.edit("tokenizer.json", lambda document: document["model"]["vocab"].update({"<unused0>": 1}))
    made.reseal()
    assert "model.vocab.<unused0> is 1, expected" in refusal(made)


# Damaged conversions


def entry_of(document: Document, token: str) -> Document:
    (found,) = (entry for entry in document["added_tokens"] if entry["content"] == token)
    assert isinstance(found, dict)
    return found


def swap(vocabulary: dict[str, int], one: str, other: str) -> None:
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def image(document: Document) -> Document:
    section = document["image_processor"]
    assert isinstance(section, dict)
    return section


Change = Callable[[Document], object]

MUTATIONS: dict[str, tuple[str, Change, str]] = {
    "two words swapped": ("tokenizer.json", lambda it: swap(it["model"]["vocab"], "ab", "▁ab"), "model.vocab.ab is"),
    "a word renamed": (
        "tokenizer.json",
        lambda it: it["model"]["vocab"].update(cd=it["model"]["vocab"].pop("ab")),
        "model.vocab.ab is missing",
    ),
    "the words in another order": (
        "tokenizer.json",
        lambda it: it["model"].update(vocab=dict(reversed(it["model"]["vocab"].items()))),
        "keys in a different order",
    ),
    "a merge changed": (
        "tokenizer.json",
        lambda it: it["model"]["merges"].__setitem__(0, ["a", "a"]),
        "model.merges[0][1] is 'a', expected 'b'",
    ),
    "two merges exchanged": ("tokenizer.json", lambda it: it["model"]["merges"].reverse(), "model.merges[0]"),
    "a merge lost": ("tokenizer.json", lambda it: it["model"]["merges"].pop(), "model.merges is a list of 2"),
    "an ordinary token made special": (
        "tokenizer.json",
        lambda it: entry_of(it, "<unused100>").update(special=True),
        "special is True, expected False",
    ),
    "a special token made ordinary": (
        "tokenizer.json",
        lambda it: entry_of(it, "<end_of_turn>").update(special=False),
        "special is False, expected True",
    ),
    "a flag that is a number": (
        "tokenizer.json",
        lambda it: entry_of(it, "<end_of_turn>").update(special=1),
        "special is 1, expected True",
    ),
    "the image token made ordinary": (
        "tokenizer.json",
        lambda it: entry_of(it, "<image_soft_token>").update(special=False),
        "special is False, expected True",
    ),
    "a token that strips blanks": (
        "tokenizer.json",
        lambda it: entry_of(it, "<end_of_turn>").update(lstrip=True),
        "lstrip is True",
    ),
    "another normalizer": (
        "tokenizer.json",
        lambda it: it["normalizer"].update(content="_"),
        "normalizer.content is '_', expected '▁'",
    ),
    "no normalizer": ("tokenizer.json", lambda it: it.update(normalizer=None), "normalizer is None"),
    "no begin of sequence": ("tokenizer.json", lambda it: it.pop("post_processor"), "post_processor is missing"),
    "a setting more": (
        "tokenizer.json",
        lambda it: it["model"].update(end_of_word_suffix="x"),
        "model.end_of_word_suffix is 'x'",
    ),
    "the image token elsewhere": (
        "tokenizer.json",
        lambda it: entry_of(it, "<image_soft_token>").update(id=256_002),
        "<image_soft_token> has id 256002, the encoder's image_token_index is 256001",
    ),
    "the image token where it was": (
        "tokenizer.json",
        lambda it: it["added_tokens"].append({**entry_of(it, "<image_soft_token>"), "id": 262_144}),
        "added_tokens is a list of 16, expected a list of 15",
    ),
    "another begin of image": (
        "tokenizer_config.json",
        lambda it: it.update(boi_token="<start_of_turn>"),
        "boi_token is '<start_of_turn>', expected '<start_of_image>'",
    ),
    "another end of sequence": (
        "tokenizer_config.json",
        lambda it: it.update(eos_token="<pad>"),
        "eos_token is '<pad>', expected '<eos>'",
    ),
    "the old id among the settings": (
        "tokenizer_config.json",
        lambda it: it["added_tokens_decoder"].update({"262144": {}}),
        "added_tokens_decoder.262144 is {}, which the source does not have",
    ),
    "the old name among the settings": (
        "tokenizer_config.json",
        lambda it: it["added_tokens_decoder"]["256001"].update(content="<unused99>"),
        "added_tokens_decoder.256001.content is '<unused99>', expected '<image_soft_token>'",
    ),
    "a mask that is special in one file": (
        "tokenizer_config.json",
        lambda it: it["added_tokens_decoder"]["4"].update(special=False),
        "added_tokens_decoder.4.special is False, expected True",
    ),
    "another class": (
        "tokenizer_config.json",
        lambda it: it.update(tokenizer_class="LlamaTokenizer"),
        "tokenizer_class is 'LlamaTokenizer'",
    ),
    "another processor": (
        "tokenizer_config.json",
        lambda it: it.update(processor_class="PaliGemmaProcessor"),
        "processor_class is 'PaliGemmaProcessor'",
    ),
    "another name among special tokens": (
        "special_tokens_map.json",
        lambda it: it.update(eos_token="<pad>"),
        "special_tokens_map.json differs from the source's",
    ),
    "another mean": (
        "processor_config.json",
        lambda it: image(it).update(image_mean=[0.5, 0.5, 0.4]),
        "image_processor.image_mean[2] is 0.4, expected 0.5",
    ),
    "another deviation": (
        "processor_config.json",
        lambda it: image(it).update(image_std=[1, 1, 1]),
        "image_std[0] is 1",
    ),
    "another size": (
        "processor_config.json",
        lambda it: image(it).update(size={"height": 56, "width": 57}),
        "image_processor.size.width is 57, expected 56",
    ),
    "another resampling": ("processor_config.json", lambda it: image(it).update(resample=3), "resample is 3"),
    "another scale": (
        "processor_config.json",
        lambda it: image(it).update(rescale_factor=1.0),
        "rescale_factor is 1.0",
    ),
    "another image processor": (
        "processor_config.json",
        lambda it: image(it).update(image_processor_type="SiglipImageProcessor"),
        "image_processor_type is 'SiglipImageProcessor'",
    ),
    "another count of image tokens": (
        "processor_config.json",
        lambda it: it.update(image_seq_length=256),
        "image_seq_length is 256, expected 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", MUTATIONS)
def test_V1_every_difference_is_named(label: str, sound: Bench) -> None:
    name, change, message = MUTATIONS[label]
    assert judged(sound).passed
    sound.edit(name, change)
    sound.reseal()
    assert message in refusal(sound)


FALSE_DECLARATIONS: dict[str, Callable[[Document], object]] = {
    "nothing declared": lambda manifest: manifest.update(tokens=[]),
    "another id": lambda manifest: manifest["tokens"][0].update(target=256_002),
    "another old id": lambda manifest: manifest["tokens"][0].update(source=262_143),
    "another token": lambda manifest: manifest["tokens"][0].update(token="<image>"),
    "another that gives way": lambda manifest: manifest["tokens"][0].update(replaces="<unused100>"),
    "nothing gives way": lambda manifest: manifest["tokens"][0].update(replaces=None),
    "nothing made special": lambda manifest: manifest["tokens"].pop(),
    "one more made special": lambda manifest: manifest["tokens"].append(
        {"token": "<unused0>", "source": 6, "target": 6, "replaces": None}
    ),
}


@pytest.mark.parametrize("label", FALSE_DECLARATIONS)
def test_a_false_declaration_in_the_manifest_is_found(label: str, sound: Bench) -> None:
    sound.reseal(FALSE_DECLARATIONS[label])
    assert not judged(sound).passed


def test_a_false_declaration_differs_from_the_plan(sound: Bench) -> None:
    sound.reseal(FALSE_DECLARATIONS["nothing made special"])
    report = sound.judge()
    assert [check.name for check in report.failed] == ["provenance", "tokenizer"]
    assert "t5g2.json says tokens" in "\n".join(check_of(report, "provenance").offenders)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_provenance_misses_a_file_removed_from_folder_and_manifest(name: str, sound: Bench) -> None:
    (sound.folder / name).unlink()
    sound.reseal()
    report = sound.judge()
    assert f"{name} is not in t5g2.json" in check_of(report, "provenance").offenders


@pytest.mark.parametrize("text", ["[]", "{}", '{"added_tokens": 3}', '{"added_tokens": [3]}', '{"added_tokens": [{}]}'])
def test_an_invalid_tokenizer_is_a_fault_not_a_crash(text: str, sound: Bench) -> None:
    (sound.folder / "tokenizer.json").write_text(text)
    if text != "[]":
        assert not judged(sound).passed
    else:
        with pytest.raises(CheckpointError, match="expected an object"):
            judged(sound)


def test_a_missing_file_is_named(make: Make) -> None:
    made = make()
    (made.folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"processor_config\.json: is missing"):
        judged(made)
    check = check_of(made.judge(), "tokenizer")
    assert (check.passed, check.detail) == (False, "processor_config.json: is missing")


def test_a_tokenizer_that_the_source_lacks_is_named(make: Make) -> None:
    made = make(change=lambda source: (source / "tokenizer.json").unlink())
    for text in ("{}", '{"added_tokens": []}'):
        (made.folder / "tokenizer.json").write_text(text)
        assert "tokenizer.json exists, but the source has none" in refusal(made)


# Verification as a whole


def test_verify_runs_the_check_and_passes(make: Make) -> None:
    made = make()
    report = made.judge()
    assert report.passed, report.failed
    assert [check.name for check in report.checks].index("tokenizer") == 3


def test_without_files_there_is_nothing_to_check(make: Make) -> None:
    def remove(source: Path) -> None:
        for path in source.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()

    made = make(images=False, change=remove)
    assert not has_tokenizer_files(made.folder, read_manifest(made.folder))
    assert made.judge().skipped["tokenizer"] == "the output has no tokenizer"


def test_a_custom_map_is_checked_by_its_declared_token_moves(make: Make, tmp_path: Path) -> None:
    text = find_map("gemma3").path.read_text()
    text = text.replace("image_token_index: 256001", "image_token_index: 256002").replace("<unused99>", "<unused100>")
    (tmp_path / "mine.yaml").write_text(text.replace('special: ["<mask>"]', "special: []"))
    made = make(mapping=str(tmp_path / "mine.yaml"))
    assert judged(made).passed
    tokens = read_manifest(made.folder).document()["tokens"]
    assert [(change["target"], change["replaces"]) for change in tokens] == [(256_002, "<unused100>")]
    assert verify(made.folder, made.source, mapping=str(tmp_path / "mine.yaml"), record=False).passed
