"""The example with transformers' Seq2SeqTrainer avoids each known fault."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import finetune_with_trainer as example
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, PrinterCallback, TrainerCallback

from t5g2convert import convert, verify
from tests.conftest import TwinFolder
from tests.examples.conftest import run

PAIRS = [("a", "b"), ("one two three", "four"), ("x" * 40, "y" * 30), ("if", "while not found and not done: pass")]


@pytest.fixture(scope="module")
def model(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer") / "model"
    convert(tiny_parent, folder)
    return folder


def test_the_encoder_reads_one_bos_and_the_labels_have_none(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer("def", add_special_tokens=False).input_ids
    assert tokenizer("def").input_ids == [2, *text]
    row = example.encode(tokenizer, "def", "def")
    assert row == {"input_ids": [2, *text], "attention_mask": [1] * (1 + len(text)), "labels": [*text, 1]}
    # A tokenizer that adds eos too makes no difference.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<bos> $A <eos>", None, [("<bos>", 2), ("<eos>", 1)]
    )
    assert tokenizer("def").input_ids == [2, *text, 1]
    assert example.encode(tokenizer, "def", "def") == row


def test_padding_is_hidden_from_the_decoder_and_has_no_labels(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [example.encode(tokenizer, *pair) for pair in PAIRS[:2]]
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert (batch["labels"] != -100).sum(1).tolist() == [len(row["labels"]) for row in rows]
    network = AutoModelForSeq2SeqLM.from_pretrained(model)
    alone = network(**DataCollatorForSeq2Seq(tokenizer)(rows[:1])).logits[0]
    assert torch.allclose(network(**batch).logits[0, : len(alone)], alone, atol=1e-5)
    del batch["attention_mask"]
    assert not torch.allclose(network(**batch).logits[0, : len(alone)], alone, atol=1e-5)


class Gradient(TrainerCallback):
    """Keeps the gradient of a step."""

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        self.found = torch.cat(
            [each.grad.flatten() for each in given["model"].parameters() if each.grad is not None]
        ).clone()


@pytest.mark.parametrize("rank", [None, 2])
def test_each_label_of_a_step_counts_the_same_however_it_is_cut_into_passes(
    model: Path, tmp_path: Path, rank: int | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [example.encode(tokenizer, *pair) for pair in PAIRS]

    def gradient(batch: int, accumulate: int) -> torch.Tensor:
        torch.manual_seed(0)
        chosen = Namespace(out=tmp_path, steps=1, batch=batch, accumulate=accumulate, lr=1e-3, every=5, bf16=False)
        arguments = example.settings(chosen)
        arguments.max_grad_norm, arguments.disable_tqdm = 0.0, True
        seen = Gradient()
        network = example.load(model, None, rank)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        trainer = example.make_trainer(network, tokenizer, rows, rows, arguments, [seen])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return seen.found

    whole, cut = gradient(4, 1), gradient(1, 4)
    # Float32 rounding; a mean for each pass would be off by more than a tenth.
    assert (whole - cut).abs().max() < 1e-4 * whole.abs().max()
    single = [gradient_of_mean(example.load(model, None, None), tokenizer, [row]) for row in rows]
    mean_of_means = torch.stack(single).mean(0)
    expected = gradient_of_mean(example.load(model, None, None), tokenizer, rows)
    assert (mean_of_means - expected).abs().max() > 0.1 * expected.abs().max()
    if rank is None:
        assert (whole - expected).abs().max() < 1e-4 * expected.abs().max()


def gradient_of_mean(network: Any, tokenizer: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """Return the gradient of the mean loss of all labels, by a plain pass."""
    network(**DataCollatorForSeq2Seq(tokenizer)(rows)).loss.backward()
    return torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None])


def test_adapters_are_in_every_text_layer_and_not_in_the_vision_tower(twin_folder: TwinFolder, tmp_path: Path) -> None:
    convert(twin_folder("images-13"), tmp_path / "model")
    network = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    names = [name for name, _ in network.named_modules()]
    adapted = [name for name in names if re.fullmatch(example.ADAPTED, name)]
    assert len(adapted) == 2 * 13 * 4
    assert not [name for name in adapted if "vision" in name]
    assert [name for name in names if "vision" in name and name.endswith("q_proj")]
    network = example.load(tmp_path / "model", None, 2)
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(adapted)
    assert not [name for name in trained if "vision" in name or "lora" not in name]
    network = example.load(tmp_path / "model", None, None)
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, _ in network.named_parameters() if ".vision_tower." in name] != []


def test_the_weights_that_are_trained_are_float32(model: Path, tmp_path: Path) -> None:
    AutoModelForSeq2SeqLM.from_pretrained(model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert example.load(tmp_path, None, None).dtype == torch.float32


@pytest.mark.slow
def test_trainer_alone_loses_encoder_and_embedding_and_the_example_resumes_exactly(model: Path) -> None:
    head, *lines = run("compare_resumes.py", model, "--steps", "4", "--pairs", "64", "--batch", "8").splitlines()
    assert head.split() == ["equal", "step", "3", "held-out", "embedding", "encoder", "decoder"]
    rows = {line[:26].strip(): line[26:].replace(" of ", "/").split() for line in lines[:-1]}
    whole, alone, resumed, best = rows.values()
    assert list(rows)[2:] == ["resumed as in the example", "load_best_model_at_end"]
    # 8 layers of 13 tensors and a norm: the decoder's.
    assert (alone[0], resumed[0], best[0]) == ("105/211", "211/211", "105/211")
    assert resumed[1:] == whole
    assert [float(each) for each in resumed[-3:]] == [0, 0, 0]
    assert float(alone[1]) > float(whole[0])
    assert all(float(each) > 0 for each in alone[-3:])
    assert float(best[-1]) == 0 < min(map(float, best[-3:-1]))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--lora", "2")])
def test_a_run_is_trained_resumed_and_verified(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    run("dates.py", tmp_path, "--train", "64", "--held-out", "8")
    files = (tmp_path / "train.jsonl", tmp_path / "held-out.jsonl")
    common = ("--every", "1", "--batch", "4", "--accumulate", "2", "--lr", "1e-3", *options)
    for steps in ("2", "4"):
        printed = run("finetune_with_trainer.py", model, *files, tmp_path / "out", "--steps", steps, *common)
        assert f"is that of {tmp_path / 'out' / f'checkpoint-{steps}'}" in printed
    history = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())["log_history"]
    losses = {each["step"]: each["eval_loss"] for each in history if "eval_loss" in each}
    assert list(losses) == [1, 2, 3, 4]
    assert losses[4] < losses[2] < losses[1]
    report = verify(tmp_path / "out/model", model, frozen=("embedding",) if options else ())
    assert [check.name for check in report.checks if not check.passed] == []
    assert report.passed
