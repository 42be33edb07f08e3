"""Fine-tune a T5Gemma 2 on pairs with transformers' Seq2SeqTrainer, for those who do not use `t5g2 finetune`.

    python examples/finetune_with_trainer.py MODEL train.jsonl held-out.jsonl OUT [--steps 500] [--lora 16]

A row is {"input": "...", "target": "..."}. OUT gets Trainer's checkpoints and, at the end, OUT/model: the checkpoint
with the lowest held-out loss, which `t5g2 verify OUT/model --source MODEL` checks. The same command resumes an
interrupted run. Each comment names a known fault of such a script; docs/trained-elsewhere.md has what they cost.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint

# Only the text layers: a bare "q_proj" also matches the attention of SigLIP, which stays frozen.
ADAPTED = r"model\.(encoder\.text_model|decoder)\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"

Example = dict[str, list[int]]


def main() -> None:
    """Train, or resume, and write the best model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="pairs in a pass")
    parser.add_argument("--accumulate", type=int, default=4, help="passes in a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations and checkpoints")
    parser.add_argument("--lora", type=int, help="the rank of adapters (default: train all weights)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; the weights stay float32")
    chosen = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    training, held_out = (read(path, tokenizer) for path in (chosen.train, chosen.held_out))
    chosen.out.mkdir(parents=True, exist_ok=True)
    last = get_last_checkpoint(chosen.out)
    model = load(chosen.model, last, chosen.lora)
    trainer = make_trainer(model, tokenizer, training, held_out, settings(chosen))
    trainer.train(resume_from_checkpoint=last)
    best = trainer.state.best_model_checkpoint
    assert best is not None
    print(f"the lowest held-out loss, {trainer.state.best_metric:.4f}, is that of {best}")
    save(chosen.model, Path(best), chosen.out / "model", adapted=chosen.lora is not None)


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Read pairs, as the model reads them."""
    # A text may have other line ends than JSONL, so not splitlines().
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [encode(tokenizer, row["input"], row["target"]) for row in rows]


def encode(tokenizer: PreTrainedTokenizerBase, source: str, target: str) -> Example:
    """Return the encoder's input and the labels of a pair."""
    # One bos for the encoder, and none for the labels: the class itself starts the decoder with bos. The tokenizer
    # would add one to both, and a chat template has one already. It adds no eos, so the model would not learn to end.
    ids, labels = (tokenizer(text, add_special_tokens=False).input_ids for text in (source, target))
    ids = [tokenizer.bos_token_id, *ids]
    # With attention_mask, which the collator pads with zeros: without it, the decoder attends to the padding.
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [*labels, tokenizer.eos_token_id]}


def load(start: Path, last: str | None, rank: int | None) -> Any:
    """Load the model to train: the start, or the checkpoint of an interrupted run."""
    # From the checkpoint: Trainer's resume alone would leave encoder and embedding as they are in the start, because
    # save_pretrained writes other names than the module has. Trainer still warns of missing keys; they are loaded here.
    # In float32, because from_pretrained keeps bfloat16, in which most updates of a small learning rate round to none.
    model = AutoModelForSeq2SeqLM.from_pretrained(start if last is None or rank else last, dtype=torch.float32)
    model.get_encoder().vision_tower.requires_grad_(False)
    if rank:
        # Adapters keep their names, so that Trainer restores them itself.
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED))
    return model


def settings(chosen: argparse.Namespace) -> Seq2SeqTrainingArguments:
    """Return Trainer's settings."""
    return Seq2SeqTrainingArguments(
        str(chosen.out),
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch,
        per_device_eval_batch_size=chosen.batch,
        # Trainer of transformers 5.24 divides by the labels of the whole step, not of each pass; a test holds that.
        gradient_accumulation_steps=chosen.accumulate,
        learning_rate=chosen.lr,
        warmup_steps=chosen.steps // 10,
        lr_scheduler_type="cosine",
        bf16=chosen.bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=chosen.every,
        # Without it, Trainer keeps the logits of all held-out labels: 1 MB for each at 262,144 tokens.
        prediction_loss_only=True,
        save_steps=chosen.every,
        save_total_limit=2,
        metric_for_best_model="loss",
        greater_is_better=False,
        # It would put the start's encoder back, as resuming does; `save` reads the best checkpoint instead.
        load_best_model_at_end=False,
        logging_steps=10,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: list[Example],
    held_out: list[Example],
    arguments: Seq2SeqTrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
) -> Seq2SeqTrainer:
    """Return the Trainer."""
    return Seq2SeqTrainer(
        model,
        arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        train_dataset=training,
        eval_dataset=held_out,
        callbacks=callbacks,
    )


def save(start: Path, checkpoint: Path, output: Path, *, adapted: bool) -> None:
    """Write the model of a checkpoint in the start's dtype, with the start's own tokenizer."""
    model = AutoModelForSeq2SeqLM.from_pretrained(start if adapted else checkpoint, dtype=torch.float32)
    if adapted:
        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    model.to(AutoConfig.from_pretrained(start).dtype).save_pretrained(output)
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in (*tokenizer, "processor_config.json", "preprocessor_config.json"):
        if (start / name).exists():
            shutil.copyfile(start / name, output / name)


if __name__ == "__main__":
    main()
