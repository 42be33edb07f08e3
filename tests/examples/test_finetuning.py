"""The examples of fine-tuning with the commands of t5g2."""

import json
from pathlib import Path

import pytest

from t5g2convert import convert
from tests.examples.conftest import run

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content }}<end_of_turn>"
    "\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
SHORT = ("--steps", "4", "--batch", "8", "--lr", "1e-3", "--held-out", "4", "--precision", "float32")


@pytest.fixture
def model(tiny_parent: Path, tmp_path: Path) -> Path:
    convert(tiny_parent, tmp_path / "model")
    return tmp_path / "model"


def held_out_losses(out: Path) -> list[float]:
    lines = (out / "run/evaluation.jsonl").read_text().splitlines()
    return [json.loads(line)["tasks"]["pairs"] for line in lines]


def test_sentences_and_translations_are_unique_and_agree() -> None:
    from translation import sentences, statement

    pairs = list(sentences())
    assert len(pairs) == len({english for english, _ in pairs}) == 10 * 6 * 5 + 4 * 4 * 5 * 6 * 10 * 2
    assert pairs[0] == ("The old house is new.", "Das alte Haus ist neu.")
    assert statement("", "she", "see", "red", "dog", False) == (
        "She sees the red dog.",
        "Sie sieht den roten Hund.",
    )
    assert statement("today", "I", "buy", "old", "flower", True) == (
        "Today I do not buy the old flower.",
        "Heute kaufe ich die alte Blume nicht.",
    )
    assert statement("now", "they", "love", "big", "car", False)[1] == "Jetzt lieben sie das große Auto."


def test_a_conversation_asks_for_what_was_said() -> None:
    import random

    from chat import NAMES, STRANGERS, conversation

    assert not set(NAMES) & set(STRANGERS)
    messages = conversation(random.Random(3), ("Anna",))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 5
    texts = [message["content"] for message in messages]
    assert texts[texts.index("What is my name?") + 1] == "Your name is Anna."
    (town,) = (text.removeprefix("I live in ").rstrip(".") for text in texts if text.startswith("I live in"))
    assert texts[texts.index("Where do I live?") + 1] == f"You live in {town}."
    assert max(texts.index("Hello, my name is Anna."), texts.index(f"I live in {town}.")) < texts.index(
        "What is my name?"
    )


@pytest.mark.slow
def test_a_model_learns_to_translate(model: Path, tmp_path: Path) -> None:
    printed = run("translation.py", model, tmp_path / "out", "--pairs", "64", *SHORT)
    assert "pair 1: input" in printed
    assert "packed 64 pairs" in printed
    losses = held_out_losses(tmp_path / "out")
    assert losses[-1] < losses[0]
    # A line for each prompt.
    _, _, written = printed.rpartition("$ t5g2 generate")
    assert len(written.splitlines()) == 1 + 4
    assert b"encoder hidden" in (tmp_path / "out/translation.svg").read_bytes()


@pytest.mark.slow
def test_a_model_learns_to_chat(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    printed = run("chat.py", model, tmp_path / "out", "--conversations", "20", *SHORT)
    assert "packed 100 pairs" in printed
    assert "packed 20 pairs" in printed
    losses = held_out_losses(tmp_path / "out")
    assert losses[-1] < losses[0]
    _, _, written = printed.rpartition("$ t5g2 generate")
    assert len(written.splitlines()) == 1 + 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_finetuning_benchmark_measures_both(tmp_path: Path, precision: str) -> None:
    options = ("--layers", "2", "--length", "64", "--pairs", "4", "--steps", "3", "--rounds", "1")
    rows = run("benchmark_finetune.py", "tiny", *options, "--precision", precision, "--folder", tmp_path).splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["finetune", "trainer", "finetune"]
    assert all(float(row.split()[1]) > 100 for row in rows[1:3])
    assert rows[3].endswith(f"times as fast ({precision})")
