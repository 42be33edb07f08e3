import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Gemma3ForConditionalGeneration, T5Gemma2ForConditionalGeneration

from t5g2convert import CheckpointError, UsageError, convert, generate
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.generation.generator import Generator
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.cli.commandline import CommandLine, Result, assert_one_line_error
from tests.conftest import TwinFolder
from tests.models.overflowing import make_overflow
from tests.reference.models import loaded

PROMPT = "Tell me a story"
EOS, BOI, EOI, IMAGE = 1, 253, 254, 255
CONVERTED = "note: {} was converted but not trained: its decoder has not learned to use the encoder\n"


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo's T5Gemma 2 in float32; do not change it."""
    from t5g2convert.cli.demo import build_demo_source

    folder = tmp_path_factory.mktemp("lively")
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "out", dtype="float32", flush=False)
    return folder / "out"


@pytest.fixture
def output(lively: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may change."""
    shutil.copytree(lively, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    values = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def set_config(folder: Path, section: str | None, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def theirs(folder: Path, ids: list[int], count: int, pixels: torch.Tensor | None = None) -> list[int]:
    """Return the tokens that transformers generates, without the start token."""
    model = loaded(T5Gemma2ForConditionalGeneration, folder)
    images = {} if pixels is None else {"pixel_values": pixels}
    written = model.generate(
        input_ids=torch.tensor([ids]), **images, max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in written[0, 1:]]


def decoded(folder: Path, tokens: list[int]) -> str:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens)


# Generated text


def test_the_text_equals_that_of_transformers(t5g2: CommandLine, lively: Path) -> None:
    result = t5g2("generate", lively, "--prompt", PROMPT, "--max-new-tokens", "32")
    assert (result.code, result.err) == (0, CONVERTED.format(lively))
    expected = theirs(lively, TextCodec(lively).encode(PROMPT), 32)
    assert EOS not in expected
    assert len(set(expected)) > 5
    assert result.out == decoded(lively, expected) + "\n"


def test_with_an_image_the_text_equals_that_of_transformers(t5g2: CommandLine, lively: Path, image: Path) -> None:
    result = t5g2("generate", lively, "--prompt", PROMPT, "--image", image, "--max-new-tokens", "24")
    assert result.code == 0, result.err
    tower = T5Gemma2Reference(open_checkpoint(lively)).vision
    assert tower is not None
    pixels = picture(image, tower, lively, torch.float32)
    codec = TextCodec(lively)
    blank = codec.encode("\n\n")
    ids = [*blank, BOI, *[IMAGE] * 4, EOI, *codec.encode(f"\n\n{PROMPT}")]
    expected = theirs(lively, ids, 24, pixels)
    assert result.out == decoded(lively, expected) + "\n"
    assert expected != theirs(lively, ids, 24, -pixels)


def test_only_the_same_prompt_gives_the_same_text(t5g2: CommandLine, lively: Path) -> None:
    one, two = (t5g2("generate", lively, "--prompt", PROMPT).out for _ in range(2))
    assert one == two
    assert one != t5g2("generate", lively, "--prompt", "Something else").out


def test_the_token_limit_is_kept(lively: Path) -> None:
    long = "".join(generate(lively, PROMPT, max_new_tokens=12))
    assert "".join(generate(lively, PROMPT, max_new_tokens=5)) == decoded(
        lively, theirs(lively, TextCodec(lively).encode(PROMPT), 5)
    )
    assert long.startswith("".join(generate(lively, PROMPT, max_new_tokens=5)))


def set_ends(folder: Path, ends: int | list[int]) -> None:
    """Set the end tokens in generation_config.json, as fine-tunes with more end tokens do."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))


@pytest.mark.parametrize("listed", [False, True])
def test_it_stops_before_the_end_token(listed: bool, t5g2: CommandLine, output: Path) -> None:
    tokens = theirs(output, TextCodec(output).encode(PROMPT), 32)
    end = next(token for token in tokens[3:] if token != tokens[0])
    set_ends(output, [EOS, end] if listed else end)
    before = tokens[: tokens.index(end)]
    assert before
    assert t5g2("generate", output, "--prompt", PROMPT).out == decoded(output, before) + "\n"


def test_an_end_at_once_is_an_empty_line(t5g2: CommandLine, output: Path) -> None:
    (first,) = theirs(output, TextCodec(output).encode(PROMPT), 1)
    set_ends(output, first)
    assert t5g2("generate", output, "--prompt", PROMPT).out == "\n"
    assert list(generate(output, PROMPT)) == []


def test_without_a_generation_config_the_decoders_end_counts(t5g2: CommandLine, output: Path) -> None:
    (first,) = theirs(output, TextCodec(output).encode(PROMPT), 1)
    (output / "generation_config.json").unlink()
    set_config(output, "decoder", eos_token_id=first)
    assert t5g2("generate", output, "--prompt", PROMPT).out == "\n"


def test_pieces_come_as_they_are_written(lively: Path) -> None:
    pieces = list(generate(lively, PROMPT, max_new_tokens=20))
    assert len(pieces) > 10
    assert "".join(pieces) == decoded(lively, theirs(lively, TextCodec(lively).encode(PROMPT), 20))
    assert next(generate(lively, PROMPT, max_new_tokens=10**9)) == pieces[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_can_be_computed_in_another_dtype(dtype: str, t5g2: CommandLine, lively: Path, image: Path) -> None:
    with_image: list[str | Path] = ["--image", image]
    for options in ([], with_image):
        result = t5g2("generate", lively, "--prompt", PROMPT, "--dtype", dtype, "--max-new-tokens", "4", *options)
        assert (result.code, result.err) == (0, CONVERTED.format(lively))
        assert result.out.strip()


def test_terminal_escapes_are_escaped(t5g2: CommandLine, lively: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "stream", lambda *_: iter(["a\x1b[31m", "\x07\u202e", "b\nc"]))
    assert t5g2("generate", lively, "--prompt", PROMPT).out == "a\\x1b[31m\\x07\\u202eb\nc\n"


# What the decoder reads


def test_the_decoder_continues_its_prompt(t5g2: CommandLine, lively: Path) -> None:
    codec = TextCodec(lively)
    tokens = [2, *codec.encode("so it began", special=False)]
    model = loaded(T5Gemma2ForConditionalGeneration, lively)
    expected = model.generate(
        input_ids=torch.tensor([codec.encode(PROMPT)]),
        decoder_input_ids=torch.tensor([tokens]),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )[0, len(tokens) :].tolist()
    call = ("generate", lively, "--prompt", PROMPT, "--decoder-prompt", "so it began", "--max-new-tokens", "20")
    assert t5g2(*call).out == decoded(lively, expected) + "\n"
    assert t5g2(*call, "--engine", "transformers").out == decoded(lively, expected) + "\n"
    assert expected != theirs(lively, codec.encode(PROMPT), 20)


def test_with_the_encoder_hidden_it_writes_as_gemma_3(t5g2: CommandLine, lively: Path) -> None:
    source = lively.parent / "source"
    ids = [2, *TextCodec(source).encode("so it began", special=False)]
    expected = (
        loaded(Gemma3ForConditionalGeneration, source)
        .generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )[0, len(ids) :]
        .tolist()
    )
    call = ("generate", lively, "--hide-encoder", "--decoder-prompt", "so it began", "--max-new-tokens", "24", "--json")
    for engine in ("reference", "transformers"):
        result = t5g2(*call, "--engine", engine)
        # As Gemma 3 it needs no training.
        assert (result.code, result.err) == (0, "")
        (found,) = json.loads(result.out)["texts"]
        assert (found["tokens"], found["finish"]) == (expected, "length")
        assert found["text"] == decoded(lively, expected)


def test_a_chat_goes_through_the_folders_template(t5g2: CommandLine, output: Path) -> None:
    template = (
        "{{ bos_token }}[{{ messages[0].role }}] {{ messages[0].content }}{% if add_generation_prompt %} ->{% endif %}"
    )
    (output / "chat_template.jinja").write_text(template)
    ids = [2, *TextCodec(output).encode(f"[user] {PROMPT} ->", special=False)]
    result = t5g2("generate", output, "--prompt", PROMPT, "--chat", "--max-new-tokens", "16")
    assert result.out == decoded(output, theirs(output, ids, 16)) + "\n"


def test_a_chat_without_a_template_is_exit_2(t5g2: CommandLine, lively: Path) -> None:
    result = t5g2("generate", lively, "--prompt", PROMPT, "--chat")
    assert_one_line_error(result, 2)
    assert f"{lively} has no chat template" in result.err


# Many prompts


def documents(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    found: list[dict[str, Any]] = json.loads(result.out)["texts"]
    return found


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.5", "--seed", "3"]], ids=["greedy", "sampled"])
def test_prompts_in_a_batch_give_the_texts_that_they_give_alone(
    sampling: list[str], t5g2: CommandLine, lively: Path, image: Path
) -> None:
    lines = [
        {"prompt": "a"},
        {"prompt": "Tell me a long story", "decoder_prompt": "It began"},
        {"prompt": "b", "image": image.name},
        {"prompt": "Tell", "decoder_prompt": "x"},
        {"prompt": PROMPT},
    ]
    (image.parent / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ("generate", lively, "--prompts", image.parent / "many.jsonl", "--max-new-tokens", "20", "--json", *sampling)
    alone, pairs, together = (documents(t5g2(*call, "--batch", size)) for size in ("1", "2", "9"))
    assert alone == pairs == together
    assert [found["prompt"] for found in together] == [line["prompt"] for line in lines]
    assert all(len(found["tokens"]) == 20 for found in together)
    assert len({found["text"] for found in together}) == 5
    assert alone == documents(t5g2(*call, "--engine", "transformers"))
    # Sampling depends on the place of a prompt, and the first one is --prompt's.
    one = t5g2("generate", lively, "--prompt", "a", "--max-new-tokens", "20", *sampling)
    assert one.out == alone[0]["text"] + "\n"


def test_each_text_of_a_file_is_one_line(t5g2: CommandLine, lively: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("a\n\nTell me\r\n")
    result = t5g2("generate", lively, "--prompts", tmp_path / "many.txt", "--max-new-tokens", "9")
    expected = ["".join(generate(lively, prompt, max_new_tokens=9)) for prompt in ("a", "Tell me")]
    assert result.out.splitlines() == expected


def test_with_the_encoder_hidden_the_lines_are_the_decoders(t5g2: CommandLine, lively: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("so it began\nso\n")
    found = documents(t5g2("generate", lively, "--prompts", tmp_path / "many.txt", "--hide-encoder", "--json"))
    assert [(each["prompt"], each["decoder_prompt"]) for each in found] == [("", "so it began"), ("", "so")]
    for each in found:
        alone = generate(lively, hide_encoder=True, decoder_prompt=each["decoder_prompt"])
        assert "".join(alone) == each["text"]


# Infilling


def scripted(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> list[list[int]]:
    """Let the model write given tokens; return the encoder's inputs that it is given."""
    codec, read = TextCodec(folder), list[list[int]]()
    tokens = [codec.token_id(name) for name in names]

    def start(ids: torch.Tensor, kept: torch.Tensor, *_: object, **__: object) -> Any:
        read.extend(row[keep].tolist() for row, keep in zip(ids, kept, strict=True))
        written = iter(tokens)

        def step(ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(kept), 256)
            logits[:, next(written)] = 1
            return logits

        return step

    monkeypatch.setattr(Generator, "_loaded", lambda _: SimpleNamespace(start=start))
    return read


def with_googles_names(folder: Path) -> None:
    """Rename the unused tokens so that `<unused6237>` is id 250, with two more after it, as in Gemma's vocabulary."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        f"<unused{6237 - 250 + token}>" if name.startswith("<unused") else name: token
        for name, token in tokenizer["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


S0, S1, S2 = "<unused6237>", "<unused6236>", "<unused6235>"


@pytest.mark.parametrize("masks", [("[MASK]", "[MASK]"), (S0, S1)])
def test_masks_are_filled_with_the_spans_that_the_model_writes(
    masks: tuple[str, str], t5g2: CommandLine, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_googles_names(output)
    codec = TextCodec(output)
    read = scripted(monkeypatch, output, S0, "o", "n", "e", S1, "▁", "t", S2, "x")
    prompt = f"It is {masks[0]} and{masks[1]}."
    result = t5g2("generate", output, "--infill", "--prompt", prompt)
    assert (result.out, result.err) == ("It is one and t.\n", CONVERTED.format(output))
    plain = [codec.encode(text, special=False) for text in ("It is ", " and", ".")]
    assert read == [[*plain[0], 250, *plain[1], 249, *plain[2]]]
    (found,) = documents(t5g2("generate", output, "--infill", "--prompt", prompt, "--json"))
    assert (found["spans"], found["finish"]) == (["one", " t"], "end")
    assert found["tokens"] == [250, *codec.encode("one", special=False), 249, *codec.encode(" t", special=False)]


def test_a_mask_without_a_span_stays_and_is_noted(
    t5g2: CommandLine, output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_googles_names(output)
    (tmp_path / "many.txt").write_text("a [MASK] b [MASK]\n")
    scripted(monkeypatch, output, "x", S1, "y", "<eos>")
    result = t5g2("generate", output, "--infill", "--prompts", tmp_path / "many.txt")
    assert result.out == "a [MASK] b y\n"
    assert "prompt 1: the model wrote nothing for 1 of 2 masks" in result.err
    (found,) = documents(t5g2("generate", output, "--infill", "--prompts", tmp_path / "many.txt", "--json"))
    assert found["spans"] == [None, "y"]


def test_a_span_may_be_empty_and_a_second_span_of_a_mask_is_not_taken(
    t5g2: CommandLine, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_googles_names(output)
    scripted(monkeypatch, output, S0, S1, "y", S0, "z", "<eos>")
    assert t5g2("generate", output, "--infill", "--prompt", "a[MASK]b[MASK]").out.startswith("aby")
    scripted(monkeypatch, output, S0, "<eos>")
    assert t5g2("generate", output, "--infill", "--prompt", "a[MASK]b").out == "ab\n"


def test_the_first_sentinel_of_a_training_is_used(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = scripted(monkeypatch, output, "<unused150>", "x", "<eos>")
    for recorded, first in (("<unused150>", "<unused150>"), (TextCodec(output).token_id("<unused150>"), "<unused150>")):
        mixture = SimpleNamespace(first_sentinel=recorded)
        trained = SimpleNamespace(adaptation=SimpleNamespace(ul2=SimpleNamespace(mixture=mixture)))
        monkeypatch.setattr("t5g2convert.reference.generation.infill.read_manifest", lambda _, it=trained: it)
        scripted(monkeypatch, output, first, "x", "<eos>")
        assert list(generate(output, "a[MASK]b", infill=True)) == ["axb"]
    # Version 0.1.0 did not record it: it began with the highest id.
    mixture.first_sentinel = None
    read = scripted(monkeypatch, output, "<unused153>", "x", "<eos>")
    assert list(generate(output, "a[MASK]b", infill=True)) == ["axb"]
    assert read[0][1] == 252
    mixture.first_sentinel = "x"
    with pytest.raises(UsageError, match=r"names such as <unused0>, but the first of .* is x"):
        list(generate(output, "a[MASK]b", infill=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--prompt", "no mask"], "needs a text with masks"),
        (["--prompt", f"[MASK] and {S0}"], "both [MASK] and"),
        (["--prompt", f"{S0} and {S2}"], f"has {S2} where {S1} is expected"),
        (["--prompt", f"{S0} and {S0}"], f"has {S0} where {S1} is expected"),
        (["--prompt", "<unused6239>"], f"where {S0} is expected"),
        (["--prompt", "[MASK]" * 153], "has 153 masks, but the model has 152 sentinels"),
        (["--prompt", "[MASK]", "--chat"], "--infill cannot be used with --chat"),
        (["--prompt", "[MASK]", "--stop", "x"], "--infill cannot be used with --stop"),
        (["--prompt", "[MASK]", "--decoder-prompt", "x"], "takes no --decoder-prompt"),
        (["--hide-encoder"], "--infill is for the encoder's text"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_text_that_cannot_be_filled_is_exit_2(
    options: list[str], reason: str, t5g2: CommandLine, output: Path
) -> None:
    with_googles_names(output)
    result = t5g2("generate", output, "--infill", *options)
    assert_one_line_error(result, 2)
    assert reason in result.err


def test_infilling_without_the_sentinel_in_the_tokenizer_is_exit_2(t5g2: CommandLine, lively: Path) -> None:
    result = t5g2("generate", lively, "--infill", "--prompt", "[MASK]")
    assert_one_line_error(result, 2)
    assert f"has no token {S0}" in result.err


# Sampling and stops


def test_the_folders_sampling_is_the_default(t5g2: CommandLine, output: Path) -> None:
    greedy = t5g2("generate", output, "--prompt", PROMPT).out
    path = output / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 3.0, "top_k": 64}))
    sampled = t5g2("generate", output, "--prompt", PROMPT).out
    assert sampled != greedy
    assert sampled == t5g2("generate", output, "--prompt", PROMPT, "--seed", "0").out
    assert sampled != t5g2("generate", output, "--prompt", PROMPT, "--seed", "1").out
    assert greedy == t5g2("generate", output, "--prompt", PROMPT, "--temperature", "0").out


def test_the_text_ends_before_a_stop_text(t5g2: CommandLine, lively: Path) -> None:
    whole = "".join(generate(lively, PROMPT, max_new_tokens=30))
    stop = whole[12:15]
    at = whole.find(stop)
    call = ("generate", lively, "--prompt", PROMPT, "--max-new-tokens", "30", "--stop", "never", "--stop", stop)
    assert t5g2(*call).out == whole[:at] + "\n"
    (found,) = documents(t5g2(*call, "--json"))
    assert (found["text"], found["finish"]) == (whole[:at], "stop")


def test_special_tokens_are_shown_on_request(t5g2: CommandLine, output: Path) -> None:
    tokens = theirs(output, TextCodec(output).encode(PROMPT), 32)
    end = next(token for token in tokens[3:] if token != tokens[0])
    name = TextCodec(output).token_name(end)
    tokenizer = json.loads((output / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": end, "content": name})
    tokenizer["added_tokens"].sort(key=lambda entry: entry["id"])
    (output / "tokenizer.json").write_text(json.dumps(tokenizer))
    set_ends(output, [EOS, end])
    hidden, shown = (t5g2("generate", output, "--prompt", PROMPT, *option).out for option in ([], ["--show-special"]))
    assert shown == hidden[:-1] + f"{name}\n"


def test_settings_that_are_not_applied_are_noted(t5g2: CommandLine, output: Path) -> None:
    path = output / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4}))
    result = t5g2("generate", output, "--prompt", PROMPT, "--max-new-tokens", "2")
    assert result.code == 0
    assert "generation_config.json sets num_beams, which t5g2 generate does not apply" in result.err


def test_only_a_folder_that_was_not_trained_is_noted(t5g2: CommandLine, output: Path) -> None:
    call = ("generate", output, "--prompt", PROMPT, "--max-new-tokens", "2")
    assert t5g2(*call).err == CONVERTED.format(output)
    # Weights of another size are not the conversion's.
    tensors = load_file(output / "model.safetensors")
    save_file(tensors, output / "model.safetensors", {"format": "pt", "trained": "elsewhere"})
    assert t5g2(*call).err == ""
    (output / "t5g2.json").unlink()
    assert t5g2(*call).err == ""


# Errors


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "a prompt is missing"),
        (["--prompt", "a", "--prompts", "FILE"], "cannot be used together"),
        (["--prompt", "a", "--hide-encoder"], "--decoder-prompt"),
        (["--image", "MISSING", "--hide-encoder"], "hides the prompt and --image"),
        (["--chat", "--hide-encoder"], "--chat is for the encoder's text"),
        (["--prompt", "a", "--seed", "1"], "--seed applies only to sampling"),
        (["--prompt", "a", "--stop", ""], "--stop must not be empty"),
        (["--prompts", "FILE"], "has no prompt"),
        (["--prompts", "MISSING"], "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_fit_are_exit_2(
    options: list[str], reason: str, t5g2: CommandLine, lively: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("\n \n")
    places = {"FILE": tmp_path / "empty", "MISSING": tmp_path / "missing"}
    result = t5g2("generate", lively, *(places.get(option, option) for option in options))
    assert_one_line_error(result, 2)
    assert reason in result.err


def test_hide_encoder_is_refused_in_python_too(lively: Path) -> None:
    with pytest.raises(UsageError, match="hides --prompt"):
        list(generate(lively, PROMPT, hide_encoder=True))
    with pytest.raises(UsageError, match="a prompt is missing"):
        list(generate(lively))


def test_an_image_token_of_a_chat_template_is_where_the_image_is(t5g2: CommandLine, output: Path, image: Path) -> None:
    (output / "chat_template.jinja").write_text(
        "{{ bos_token }}[user] {% for part in messages[0].content %}"
        "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% endif %}{% endfor %} ->"
    )
    codec, tower = TextCodec(output), T5Gemma2Reference(open_checkpoint(output)).vision
    assert tower is not None
    before, after = (codec.encode(text, special=False) for text in ("[user] \n\n", f"\n\n{PROMPT} ->"))
    ids = [2, *before, BOI, *[IMAGE] * 4, EOI, *after]
    expected = theirs(output, ids, 12, picture(image, tower, output, torch.float32))
    result = t5g2("generate", output, "--prompt", PROMPT, "--image", image, "--chat", "--max-new-tokens", "12")
    assert result.out == decoded(output, expected) + "\n"
    (output / "chat_template.jinja").write_text("{{ messages[0].role }}")
    result = t5g2("generate", output, "--prompt", PROMPT, "--image", image, "--chat")
    assert_one_line_error(result, 2)
    assert "no place for an image" in result.err


def test_an_empty_prompt_is_exit_2(t5g2: CommandLine, lively: Path) -> None:
    assert_one_line_error(t5g2("generate", lively, "--prompt", ""), 2)
    with pytest.raises(UsageError, match="empty"):
        list(generate(lively, ""))


def test_a_folder_without_a_tokenizer_is_exit_3(t5g2: CommandLine, output: Path) -> None:
    (output / "tokenizer.json").unlink()
    result = t5g2("generate", output, "--prompt", PROMPT)
    assert_one_line_error(result, 3)
    assert "tokenizer.json" in result.err
    (output / "tokenizer.json").write_text("{}")
    assert_one_line_error(t5g2("generate", output, "--prompt", PROMPT), 3)


def test_an_image_for_a_model_without_a_tower_is_exit_2(
    t5g2: CommandLine, lively: Path, image: Path, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    shutil.copytree(converted_twin("text-8"), tmp_path / "text-only")
    shutil.copy(lively / "tokenizer.json", tmp_path / "text-only")
    result = t5g2("generate", tmp_path / "text-only", "--prompt", PROMPT, "--image", image)
    assert_one_line_error(result, 2)
    assert "vision tower" in result.err
    assert t5g2("generate", tmp_path / "text-only", "--prompt", PROMPT, "--max-new-tokens", "2").code == 0


def test_a_file_that_is_not_a_picture_is_exit_2(t5g2: CommandLine, lively: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no picture")
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        result = t5g2("generate", lively, "--prompt", PROMPT, "--image", path)
        assert_one_line_error(result, 2)
        assert str(path) in result.err


def test_image_tokens_in_the_prompt_are_not_the_folders_fault(t5g2: CommandLine, lively: Path, image: Path) -> None:
    result = t5g2("generate", lively, "--prompt", "what is <image_soft_token>?", "--image", image)
    assert_one_line_error(result, 2)
    assert "image" in result.err


def test_a_decoder_without_a_start_token_is_exit_2(t5g2: CommandLine, output: Path) -> None:
    set_config(output, "decoder", bos_token_id=None)
    result = t5g2("generate", output, "--prompt", PROMPT)
    assert_one_line_error(result, 2)
    assert "bos_token_id" in result.err


def test_a_token_beyond_the_table_is_not_reported_as_a_bug(t5g2: CommandLine, output: Path) -> None:
    tokenizer = json.loads((output / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<unused0>"] = 4000
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 4000, "content": "<unused0>"})
    (output / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert max(TextCodec(output).encode("a <unused0> b")) == 4000
    result = t5g2("generate", output, "--prompt", "a <unused0> b")
    assert result.code in (2, 3), result.err
    assert_one_line_error(result, result.code)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["OUTPUT"], 2),
        (["OUTPUT", "--prompt", "x", "--max-new-tokens", "0"], 2),
        (["OUTPUT", "--prompt", "x", "--dtype", "int8"], 2),
        (["MISSING", "--prompt", "x"], 3),
        (["SOURCE", "--prompt", "x"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_has_its_own_exit_code(
    arguments: list[str], code: int, t5g2: CommandLine, lively: Path, demo_source: Path, tmp_path: Path
) -> None:
    places = {"OUTPUT": lively, "SOURCE": demo_source, "MISSING": tmp_path / "missing"}
    assert_one_line_error(t5g2("generate", *(places.get(item, item) for item in arguments)), code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_is_exit_2(t5g2: CommandLine, lively: Path) -> None:
    assert_one_line_error(t5g2("generate", lively, "--prompt", PROMPT, "--device", "cuda"), 2)


def test_an_unknown_dtype_is_refused(lively: Path) -> None:
    with pytest.raises(UsageError, match="dtype: Input should be"):
        list(generate(lively, PROMPT, dtype="int8"))


def test_a_missing_tensor_is_the_folders_fault(t5g2: CommandLine, output: Path) -> None:
    tensors = load_file(output / "model.safetensors")
    del tensors["model.decoder.layers.3.mlp.up_proj.weight"]
    save_file(tensors, output / "model.safetensors")
    result = t5g2("generate", output, "--prompt", PROMPT)
    assert_one_line_error(result, 3)
    assert "model.decoder.layers.3.mlp.up_proj.weight" in result.err
    with pytest.raises(CheckpointError):
        list(generate(output, PROMPT))


# Numbers that are not finite


def test_V4_a_float16_overflow_is_an_error_not_an_empty_line(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    source = make_overflow(demo_source, tmp_path / "overflowing")
    convert(source, tmp_path / "out", dtype="float16")
    result = t5g2("generate", tmp_path / "out", "--prompt", PROMPT)
    assert_one_line_error(result, 2)
    assert "float16 overflows" in result.err
    assert "--dtype float32" in result.err
    assert t5g2("generate", tmp_path / "out", "--prompt", PROMPT, "--dtype", "float32").code == 0
    assert t5g2("generate", tmp_path / "out", "--prompt", PROMPT, "--dtype", "bfloat16").code == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named_as_the_reason(dtype: str, t5g2: CommandLine, output: Path) -> None:
    tensors = load_file(output / "model.safetensors")
    tensors["model.decoder.norm.weight"][0] = torch.nan
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    result = t5g2("generate", output, "--prompt", PROMPT, "--dtype", dtype)
    assert_one_line_error(result, 3)
    assert f"{output}: the logits are not finite in {dtype}" in result.err


def test_text_before_an_overflow_ends_with_a_newline(
    t5g2: CommandLine, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pieces(*_: object, **__: object) -> Iterator[str]:
        yield "so far"
        raise UsageError("float16 overflows")

    monkeypatch.setattr(Generator, "stream", pieces)
    result = t5g2("generate", output, "--prompt", PROMPT)
    assert (result.code, result.out) == (2, "so far\n")


def test_convert_verifies_float16_in_float32(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    source = make_overflow(demo_source, tmp_path / "overflowing")
    result = t5g2("convert", source, tmp_path / "out", "--dtype", "float16", "--verify")
    assert result.code == 0, result.err
    assert "verified in float32" in result.out
    assert "load the output with dtype=torch.float32 or dtype=torch.bfloat16" in result.err
