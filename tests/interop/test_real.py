"""What is known of the real Gemma 3 270M holds: `make real` fetches it, and sets T5G2_REAL to its folder."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Gemma3ForCausalLM, PreTrainedModel, T5Gemma2ForConditionalGeneration

from t5g2convert import convert, inspect, plan, verify
from tests.cli.commandline import CommandLine

REAL = os.environ.get("T5G2_REAL", "")

pytestmark = pytest.mark.skipif(not REAL, reason="T5G2_REAL names no real Gemma 3 270M (make real)")

PROMPT = "The capital of France is Paris. The capital of Germany is"

SENTENCES = (
    "The river rose after three days of rain, and the farmers moved their cattle to the hills.",
    "A binary search halves the interval in each step until the value is found or nothing is left.",
)

TOKENIZER_SHA256 = "f5b32522"
"""The beginning of the sha256 of the published T5Gemma 2's tokenizer.json."""


@pytest.fixture
def t5g2(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture(scope="module")
def source() -> Path:
    return Path(REAL)


@pytest.fixture(scope="module")
def said() -> Iterator[Callable[[str], None]]:
    """Print lines for docs/results.md when all tests are done."""
    lines: list[str] = []
    yield lines.append
    print("\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory, said: Callable[[str], None]) -> Path:
    folder = tmp_path_factory.mktemp("real") / "t5gemma-2-270m-270m"
    started = time.monotonic()
    done = convert(source, folder)
    said(f"converted in {time.monotonic() - started:.1f} s: {dict(done.parameters)}")
    return folder


@pytest.fixture(scope="module")
def models(source: Path, converted: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Gemma 3 and its conversion in transformers, float32."""
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    return (
        Gemma3ForCausalLM.from_pretrained(source, **settings).eval(),
        T5Gemma2ForConditionalGeneration.from_pretrained(converted, **settings).eval(),
    )


def test_the_plan_uses_every_tensor(source: Path) -> None:
    assert inspect(source).parameters["total"] == 268_098_176
    made = plan(source)
    assert made.dropped == ()
    assert made.parameters["total"] == 368_444_608


def test_verify_finds_no_difference(source: Path, converted: Path, said: Callable[[str], None]) -> None:
    assert hashlib.sha256((converted / "tokenizer.json").read_bytes()).hexdigest().startswith(TOKENIZER_SHA256)
    started = time.monotonic()
    report = verify(converted, source)
    assert report.passed, report.failed
    figures = {check.name: check.figures for check in report.checks if check.figures is not None}
    assert {name: figure.max_abs for name, figure in figures.items()} == {"decoder_parity": 0, "encoder_parity": 0}
    said(f"verified in {time.monotonic() - started:.1f} s: " + "; ".join(check.detail for check in report.checks))


def test_both_parts_come_out_again(source: Path, converted: Path, tmp_path: Path) -> None:
    for part in ("encoder", "decoder"):
        convert(converted, tmp_path / part, part=part)
        assert verify(tmp_path / part, converted).passed
    before, after = (safe_open(folder / "model.safetensors", "pt") for folder in (source, tmp_path / "decoder"))
    names = {name.partition("model.")[2]: name for name in after.keys()}  # noqa: SIM118 - not a dict
    assert len(names) == len(before.keys())
    for name in before.keys():  # noqa: SIM118
        assert torch.equal(before.get_tensor(name), after.get_tensor(names[name.partition("model.")[2]])), name


@torch.inference_mode()
def test_with_the_encoder_hidden_it_writes_what_gemma_3_writes(
    models: tuple[PreTrainedModel, PreTrainedModel], converted: Path, t5g2: CommandLine, said: Callable[[str], None]
) -> None:
    gemma, ours = models
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = gemma.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    found = ours.generate(
        ids, attention_mask=torch.zeros_like(ids), decoder_input_ids=ids, max_new_tokens=20, do_sample=False
    )[0, ids.shape[1] :]
    assert found.tolist() == expected.tolist()
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert text.startswith(" Berlin.")
    command = ("generate", converted, "--decoder-prompt", PROMPT, "--hide-encoder", "--temperature", "0")
    written = t5g2(*command, "--max-new-tokens", "20", "--dtype", "float32").out
    assert text.strip() in written
    said(f"{PROMPT}{text}")


@torch.inference_mode()
def test_the_perplexity_is_gemma_3s_with_the_encoder_hidden_and_far_higher_with_it(
    models: tuple[PreTrainedModel, PreTrainedModel], converted: Path, said: Callable[[str], None]
) -> None:
    gemma, ours = models
    tokenizer = AutoTokenizer.from_pretrained(converted)
    losses: dict[str, list[float]] = {"Gemma 3": [], "encoder hidden": [], "encoder visible": []}
    for sentence in SENTENCES:
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        seen = {"Gemma 3": gemma(input_ids=ids).logits}
        for name, mask in (("encoder hidden", torch.zeros_like(ids)), ("encoder visible", torch.ones_like(ids))):
            seen[name] = ours(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
        assert torch.equal(seen["Gemma 3"], seen["encoder hidden"])
        for name, logits in seen.items():
            losses[name].append(float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])))
    perplexities = {name: float(torch.tensor(each).mean().exp()) for name, each in losses.items()}
    assert perplexities["Gemma 3"] == perplexities["encoder hidden"] < 100
    assert perplexities["encoder visible"] > 3 * perplexities["Gemma 3"]
    said("perplexity of two sentences: " + ", ".join(f"{name} {value:.1f}" for name, value in perplexities.items()))


def test_it_infills_and_has_a_card(converted: Path, t5g2: CommandLine, said: Callable[[str], None]) -> None:
    done = t5g2("generate", converted, "--infill", "--prompt", "Paris is the [MASK] of France.", "--temperature", "0")
    assert done.code == 0
    said(f"infilled, untrained: {json.dumps(done.out)}")
    card = t5g2("card", converted).out
    assert "368,444,608" in card
