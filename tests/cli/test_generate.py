import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import T5Gemma2ForConditionalGeneration

from t5g2convert import CheckpointError, UsageError, convert, generate
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.cli.commandline import CommandLine, assert_one_line_error
from tests.conftest import TwinFolder
from tests.models.overflowing import make_overflow
from tests.reference.models import loaded

PROMPT = "Tell me a story"
EOS, BOI, EOI, IMAGE = 1, 253, 254, 255


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
    assert (result.code, result.err) == (0, "")
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


def test_a_character_of_several_tokens_is_written_whole(lively: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of = "aé東🎉".encode()
    monkeypatch.setattr(
        "t5g2convert.reference.generation.greedy_tokens", lambda *_, **__: iter(torch.tensor([[n]]) for n in bytes_of)
    )
    monkeypatch.setattr(TextCodec, "decode", lambda _, tokens: bytes(tokens).decode(errors="replace"))
    monkeypatch.setattr("t5g2convert.reference.generation.until_end", lambda steps, _: (int(step) for step in steps))
    assert list(generate(lively, PROMPT)) == ["a", "é", "東", "🎉"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_can_be_computed_in_another_dtype(dtype: str, t5g2: CommandLine, lively: Path, image: Path) -> None:
    with_image: list[str | Path] = ["--image", image]
    for options in ([], with_image):
        result = t5g2("generate", lively, "--prompt", PROMPT, "--dtype", dtype, "--max-new-tokens", "4", *options)
        assert (result.code, result.err) == (0, "")
        assert result.out.strip()


def test_terminal_escapes_are_escaped(t5g2: CommandLine, lively: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "t5g2convert.reference.generation.generate", lambda *_, **__: iter(["a\x1b[31m", "\x07\u202e", "b\nc"])
    )
    assert t5g2("generate", lively, "--prompt", PROMPT).out == "a\\x1b[31m\\x07\\u202eb\nc\n"


# Errors


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

    monkeypatch.setattr("t5g2convert.reference.generation.generate", pieces)
    result = t5g2("generate", output, "--prompt", PROMPT)
    assert (result.code, result.out) == (2, "so far\n")


def test_convert_verifies_float16_in_float32(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    source = make_overflow(demo_source, tmp_path / "overflowing")
    result = t5g2("convert", source, tmp_path / "out", "--dtype", "float16", "--verify")
    assert result.code == 0, result.err
    assert "verified in float32" in result.out
    assert "load the output with dtype=torch.float32 or dtype=torch.bfloat16" in result.err
