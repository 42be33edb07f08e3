from pathlib import Path
from typing import Any

import pytest

from t5g2convert import UsageError
from t5g2convert.reference.generation.generator import Prompt
from t5g2convert.reference.generation.prompt_file import read_prompts
from t5g2convert.reference.options import GenerateOptions


def read(path: Path, text: str, **options: Any) -> list[Prompt]:
    path.write_text(text, encoding="utf-8", newline="")
    return read_prompts(path, GenerateOptions(**options))


def test_each_line_is_a_prompt(tmp_path: Path) -> None:
    found = read(tmp_path / "many.txt", 'a\r\n\n {"prompt": 1}\n  \nTéll\u2028me', decoder_prompt="so")
    assert found == [Prompt("a", "so"), Prompt(' {"prompt": 1}', "so"), Prompt("Téll\u2028me", "so")]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_each_line_of_a_json_file_is_a_value(suffix: str, tmp_path: Path) -> None:
    text = '"a\\nb"\n{"prompt": "c", "decoder_prompt": "", "image": "x/y.png"}\n\n{"prompt": "d"}\n'
    found = read(tmp_path / f"many{suffix}", text, decoder_prompt="so", image=Path("z.png"))
    assert found == [
        Prompt("a\nb", "so", Path("z.png")),
        Prompt("c", "", tmp_path / "x/y.png"),
        Prompt("d", "so", Path("z.png")),
    ]


def test_with_the_encoder_hidden_a_line_is_the_decoders(tmp_path: Path) -> None:
    assert read(tmp_path / "many.txt", "a\n", hide_encoder=True) == [Prompt("", "a")]
    assert read(tmp_path / "many.jsonl", '"a"\n{"decoder_prompt": "b"}', hide_encoder=True) == [
        Prompt("", "a"),
        Prompt("", "b"),
    ]
    with pytest.raises(UsageError, match=r"many\.jsonl:2: --hide-encoder hides prompt"):
        read(tmp_path / "many.jsonl", '"a"\n{"prompt": "b"}', hide_encoder=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("a", "not JSON"),
        ("[]", "valid dictionary"),
        ("3", "valid dictionary"),
        ('{"promt": "x"}', "promt: Extra inputs are not permitted"),
        ('{"prompt": 3}', "prompt: Input should be a valid string"),
        ('{"image": ""}', "image: String should have at least 1 character"),
    ],
)
def test_a_line_that_is_not_valid_is_named(line: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"many\.jsonl:3: .*{reason}"):
        read(tmp_path / "many.jsonl", f'"a"\n\n{line}\n')


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no prompt"):
        read(tmp_path / "many.txt", " \n\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "missing", GenerateOptions())
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path, GenerateOptions())
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_prompts(tmp_path / "bytes", GenerateOptions())
