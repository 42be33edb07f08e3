"""The files next to the weights: which are written, their content, and what is refused before writing weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from t5g2convert import convert, plan
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.models.gemma_tokenizer import (
    SETTINGS,
    moved,
    tokenizer_text,
    write_json,
    write_nested_processor,
    write_processor,
    write_tokenizer,
)
from tests.processes.memory import run_and_measure

SMALL = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
         "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 262_208}  # fmt: skip

Make = Callable[..., Path]


@pytest.fixture
def make(gemma3_map: WeightMap, demo_config: Mapping[str, Any], tmp_path: Path) -> Make:
    """Return a small source with the published vocabulary, with or without images; tests add files."""

    def source(*, images: bool = True) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        tower = {"model_type": "gemma3", "mm_tokens_per_image": 4, "vision_config": demo_config["vision_config"]}
        alone = {"model_type": "gemma3_text", **SMALL}
        config = {**tower, "text_config": SMALL} if images else alone
        write_synthetic_source(folder, gemma3_map, config, seed=None)
        return folder

    return source


@pytest.fixture
def source(make: Make) -> Path:
    """Return a source with images and all files of a Hub repository."""
    folder = make()
    write_tokenizer(folder)
    write_processor(folder, side=56, tokens=4)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    return folder


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def edit(path: Path, **changes: Any) -> None:
    document = {**read(path), **changes}
    write_json(path, {key: value for key, value in document.items() if value != "gone"})


def hows(source: Path) -> dict[str, tuple[str, list[str]]]:
    return {file["name"]: (file["how"], file["from"]) for file in plan(source).to_json()["files"]}


@pytest.mark.slow
def test_the_output_has_the_files_of_a_release(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "t5g2.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "processor_config.json",
    }  # fmt: skip
    assert read(tmp_path / "out/tokenizer.json") == moved(tokenizer_text())
    for name in ("special_tokens_map.json",):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    manifest = read_manifest(tmp_path / "out").document()
    assert manifest["tokens"] == [
        {"token": "<image_soft_token>", "source": 262_144, "target": 256_001, "replaces": "<unused99>"},
        {"token": "<mask>", "source": 4, "target": 4, "replaces": None},
    ]


def test_the_plan_says_how_each_file_is_made(source: Path) -> None:
    assert hows(source) == {
        "tokenizer.json": ("changed", ["tokenizer.json"]),
        "tokenizer_config.json": ("changed", ["tokenizer_config.json"]),
        "processor_config.json": ("made", ["config.json", "processor_config.json", "preprocessor_config.json"]),
        "special_tokens_map.json": ("copied", ["special_tokens_map.json"]),
    }
    note = "tokenizer.json: <image_soft_token> replaces <unused99>, id 256001"
    assert note in plan(source).notes


def test_a_model_whose_image_token_stays_keeps_its_tokenizer(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert hows(demo_source)[name] == ("copied", [name])
        assert (tmp_path / "out" / name).read_bytes() == (demo_source / name).read_bytes()
    assert plan(demo_source).tokens == ()


def test_a_text_only_model_has_no_processor(make: Make, tmp_path: Path) -> None:
    folder = make(images=False)
    write_tokenizer(folder)
    write_processor(folder, side=896, tokens=256)
    convert(folder, tmp_path / "out")
    assert not (tmp_path / "out/processor_config.json").exists()
    written = read(tmp_path / "out/tokenizer_config.json")
    assert "processor_class" not in written
    assert written["image_token"] == "<image_soft_token>"
    assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).token_to_id("<image_soft_token>") == 256_001


@pytest.mark.parametrize("images", [True, False])
def test_a_folder_without_a_tokenizer_is_converted_with_a_note(images: bool, make: Make, tmp_path: Path) -> None:
    done = convert(make(images=images), tmp_path / "out")
    assert "the source has no tokenizer.json: the output cannot tokenize text" in done.notes
    assert not list((tmp_path / "out").glob("*token*"))


def test_a_text_only_model_keeps_a_tokenizer_of_another_kind(make: Make, demo_source: Path, tmp_path: Path) -> None:
    folder = make(images=False)
    text = (demo_source / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(text)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    done = convert(folder, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == text
    assert (tmp_path / "out/tokenizer_config.json").read_text() == '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    assert any("tokenizer.json is copied unchanged" in note for note in done.notes)


# tokenizer_config.json


def test_the_settings_are_the_sources_but_for_the_moved_token(source: Path, tmp_path: Path) -> None:
    edit(source / "tokenizer_config.json", image_token_id=262_144, boi_token_id=255_999)
    convert(source, tmp_path / "out")
    before, after = (read(folder / "tokenizer_config.json") for folder in (source, tmp_path / "out"))
    old, new = before.pop("added_tokens_decoder"), after.pop("added_tokens_decoder")
    assert (before.pop("image_token_id"), after.pop("image_token_id")) == (262_144, 256_001)
    assert before == after
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    assert old.pop("262144") == {"content": "<image_soft_token>", **flags}
    assert old.pop("256001")["content"] == "<unused99>"
    assert new.pop("256001") == {"content": "<image_soft_token>", **flags}
    assert (old.pop("4")["special"], new.pop("4")["special"]) == (False, True)
    assert old == new


def test_missing_settings_are_filled_in(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").unlink()
    assert hows(source)["tokenizer_config.json"] == ("made", [])
    write_json(
        source / "tokenizer_config.json", {"model_max_length": 512, "image_token": {"content": "<image_soft_token>"}}
    )
    convert(source, tmp_path / "out")
    assert read(tmp_path / "out/tokenizer_config.json") == {
        "model_max_length": 512,
        "image_token": {"content": "<image_soft_token>"},
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "Gemma3Processor",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }


def test_settings_that_need_no_change_are_copied(source: Path, tmp_path: Path) -> None:
    write_json(source / "tokenizer_config.json", SETTINGS)
    assert hows(source)["tokenizer_config.json"] == ("copied", ["tokenizer_config.json"])


@pytest.mark.parametrize("template", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_is_kept_with_a_note(template: str, source: Path, tmp_path: Path) -> None:
    if template == "tokenizer_config.json":
        edit(source / template, chat_template="{{ bos_token }}")
    else:
        (source / template).write_text('{"chat_template": "{{ bos_token }}"}')
    done = convert(source, tmp_path / "out")
    assert "the chat template is the source's: it was written for a decoder without an encoder" in done.notes
    assert "{{ bos_token }}" in (tmp_path / "out" / template).read_text()


def test_without_a_chat_template_there_is_no_note_of_one(source: Path) -> None:
    assert not any("chat template" in note for note in plan(source).notes)


# processor_config.json


@pytest.mark.sampled
@pytest.mark.parametrize("nested", [False, True])
def test_the_image_processor_is_the_sources(nested: bool, source: Path, tmp_path: Path) -> None:
    if nested:
        (source / "preprocessor_config.json").unlink()
        write_nested_processor(source, side=56, tokens=4)
    name = "processor_config.json" if nested else "preprocessor_config.json"
    given = read(source / name)
    image = given["image_processor"] if nested else given
    image |= {"image_mean": [0.1, 0.2, 0.3], "resample": 3, "image_processor_type": "Gemma3ImageProcessorFast"}
    write_json(source / name, given)
    convert(source, tmp_path / "out")
    written = read(tmp_path / "out/processor_config.json")
    found = written.pop("image_processor")
    assert written == {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    image.pop("processor_class", None)
    assert found == {"do_convert_rgb": True, **image, "image_processor_type": "Gemma3ImageProcessor"}


def test_a_nested_image_processor_wins_over_a_separate_one(source: Path, tmp_path: Path) -> None:
    write_nested_processor(source, side=56, tokens=4)
    edit(source / "preprocessor_config.json", resample=0)
    convert(source, tmp_path / "out")
    assert read(tmp_path / "out/processor_config.json")["image_processor"]["resample"] == 2


def test_without_one_it_is_made_from_the_config(make: Make, tmp_path: Path) -> None:
    folder = make()
    assert hows(folder) == {"processor_config.json": ("made", ["config.json"])}
    convert(folder, tmp_path / "out")
    written = read(tmp_path / "out/processor_config.json")
    assert (written["processor_class"], written["image_seq_length"]) == ("Gemma3Processor", 4)
    image = written["image_processor"]
    assert image["size"] == {"height": 56, "width": 56}
    assert image["image_mean"] == image["image_std"] == [0.5, 0.5, 0.5]
    assert (image["resample"], image["rescale_factor"]) == (2, 1 / 255)


# What is refused, before any weights are written

Damage = Callable[[Path], object]

FAULTS: dict[str, tuple[str, Damage, str]] = {
    "no-token": ("tokenizer.json", lambda path: path.write_text("{}"), "expected <image_soft_token> as added token"),
    "decoder-old": (
        "tokenizer_config.json",
        lambda path: edit(path, added_tokens_decoder={"262144": {"content": "<mine>"}}),
        "has the token '<mine>' as 262144, which is <image_soft_token> in another file",
    ),
    "decoder-new": (
        "tokenizer_config.json",
        lambda path: edit(path, added_tokens_decoder={"256001": {"content": "<unused100>"}}),
        "added_tokens_decoder has '<unused100>' as 256001, expected <image_soft_token> or <unused99>",
    ),
    "another-image-token": (
        "tokenizer_config.json",
        lambda path: edit(path, image_token="<img>"),
        "image_token is '<img>', the token that config.json means is '<image_soft_token>', 262144",
    ),
    "in-use": (
        "tokenizer_config.json",
        lambda path: edit(path, additional_special_tokens=["<unused99>"]),
        "additional_special_tokens uses <unused99>, which <image_soft_token> replaces",
    ),
    "in-use-in-the-map": (
        "special_tokens_map.json",
        lambda path: edit(path, sep_token={"content": "<unused99>"}),
        "sep_token uses <unused99>, which <image_soft_token> replaces",
    ),
    "no-json": ("tokenizer_config.json", lambda path: path.write_text("{"), "is not valid JSON"),
    "size": (
        "preprocessor_config.json",
        lambda path: edit(path, size={"height": 896, "width": 896}),
        "size is {'height': 896, 'width': 896}, but config.json requires {'height': 56, 'width': 56}",
    ),
    "length": ("processor_config.json", lambda path: edit(path, image_seq_length=256), "image_seq_length is 256"),
    "length-inside": (
        "preprocessor_config.json", lambda path: edit(path, image_seq_length=256), "image_seq_length is 256",
    ),
    "image-processor": (
        "processor_config.json", lambda path: edit(path, image_processor="x"), "image_processor is not an object",
    ),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("fault", FAULTS)
def test_I15_files_that_do_not_fit_are_refused_while_planning(fault: str, source: Path) -> None:
    name, damage, message = FAULTS[fault]
    plan(source)
    damage(source / name)
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert message in caught.value.message
    assert caught.value.where == str(source / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json"])
def test_a_file_that_changes_while_weights_are_written_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    """Once for a rewritten file and once for a copied one."""

    def touch(_: int) -> None:
        with (source / name).open("a") as file:
            file.write(" ")

    with pytest.raises(CheckpointError, match=rf"{name}: changed while it was being read"):
        convert(source, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tokenizer_of_the_published_size_takes_bounded_memory(source: Path, tmp_path: Path) -> None:
    text = tokenizer_text()
    pair = '\n      [\n        "▁東",\n        "a]\\"b"\n      ],'
    text = text.replace('"merges": [', f'"merges": [{pair * ((33_384_568 - len(text.encode())) // len(pair.encode()))}')
    (source / "tokenizer.json").write_text(text)
    _, peak = run_and_measure("convert", "--no-verify", "--no-card", source, tmp_path / "out")
    assert peak < 210e6
    assert (tmp_path / "out/tokenizer.json").stat().st_size > 33e6
    assert read(tmp_path / "out/tokenizer.json") == moved(text)
