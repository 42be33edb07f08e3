"""Make an embedding model from the encoder of a T5Gemma 2: contrastive training in sentence-transformers.

    t5g2 extract T5GEMMA2 ENCODER --part encoder
    python examples/embedding.py ENCODER OUT [--steps 60] [--batch 32]

The pairs are read from Python's standard library: the first line of a function's docstring, and its code without the
docstring. The model learns to find the code among that of the other pairs of its batch. Before and after the training,
the held-out lines are looked up among the code of all held-out functions, of files that training never sees; printed is
the share whose code is nearest by cosine. OUT becomes a folder for SentenceTransformer(OUT).
"""

import argparse
import ast
import random
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

sys.path.append(str(Path(__file__).parent))
from tiny_parent.corpus import Document, split

Pair = tuple[str, str]


def main() -> None:
    """Measure, train, save, and measure again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step; each is a negative for the others")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--tokens", type=int, default=64, help="of a text; the rest is cut off")
    parser.add_argument("--held-out", type=int, default=200, help="pairs to measure with")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; the weights stay float32")
    chosen = parser.parse_args()
    training, held_out = (shuffled(documents) for documents in split())
    held_out = held_out[: chosen.held_out]
    # In float32: in bfloat16, as the folder is, most updates of a small learning rate round to nothing.
    model = SentenceTransformer(str(chosen.encoder), model_kwargs={"dtype": torch.float32})
    model.max_seq_length = chosen.tokens
    print(f"{len(training):,} pairs to train on; {len(held_out):,} held out")
    print(f"before: {accuracy(model, held_out):.1%} found", flush=True)
    train(model, training, chosen)
    model.save(str(chosen.output))
    # The folder, not the model in memory, because a saved model must be as good.
    saved = SentenceTransformer(str(chosen.output), model_kwargs={"dtype": torch.float32})
    print(f"after {chosen.steps} steps: {accuracy(saved, held_out):.1%} found")


def shuffled(documents: list[Document]) -> list[Pair]:
    """Return the pairs of all Python files, no line and no code twice, in a seeded order."""
    found = {line: code for document in documents for line, code in pairs(document)}
    unique = sorted({code: line for line, code in found.items()}.items())
    random.Random(0).shuffle(unique)
    return [(line, code) for code, line in unique]


def pairs(document: Document) -> Iterator[Pair]:
    """Yield the first line of each function's docstring, and the code without the docstring."""
    if not document.name.endswith(".py"):
        return
    for node in ast.walk(ast.parse(document.text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            line = (ast.get_docstring(node) or "").strip().split("\n")[0]
            body = node.body[1:]
            if len(line.split()) >= 4 and body:
                node.body, node.decorator_list = body, []
                yield line, ast.unparse(node)


def train(model: SentenceTransformer, training: list[Pair], chosen: argparse.Namespace) -> None:
    """Train with the other code of the batch as negatives."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(chosen.output),
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch,
        learning_rate=chosen.lr,
        warmup_steps=chosen.steps // 10,
        bf16=chosen.bf16,
        use_cpu=not torch.cuda.is_available(),
        # A text that is twice in a batch would be its own negative.
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        # Its checkpoints cannot be resumed: Trainer does not load them under the names that it saves.
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    )
    lines, codes = zip(*training, strict=True)
    rows = Dataset.from_dict({"anchor": lines, "positive": codes})
    encoder = model[0].auto_model
    # Trainer writes the tokenizer's eos into the config, and turns its cache off.
    config = deepcopy(encoder.config)
    SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)).train()
    encoder.config = config


def accuracy(model: SentenceTransformer, held_out: list[Pair]) -> float:
    """Return the share of lines whose own code is the nearest of all."""
    lines, codes = zip(*held_out, strict=True)
    nearest = model.similarity(model.encode(list(lines)), model.encode(list(codes))).argmax(dim=1)
    return float((nearest == torch.arange(len(held_out))).float().mean())


if __name__ == "__main__":
    main()
