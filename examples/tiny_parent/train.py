"""Train a small real Gemma 3 on the standard library's text, as a parent worth converting and adapting.

    python examples/tiny_parent/train.py OUT [--steps 2000] [--minutes 8]

OUT becomes a folder for `t5g2 inspect`, `t5g2 convert` and `t5g2 verify`: 2.9 million parameters in eight layers, seven
of them sliding with an odd window; head widths that do not add up to the model's width; and a byte-level tokenizer of
4,096 tokens. Texts never contain its last 256 tokens, which are left for the sentinels of UL2. The same seed, steps and
versions of Python and torch give the same model; `--minutes` ends the training, and the decay of its learning rate, in
time.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from corpus import Document, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

SPECIAL: Final = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Tokens 0 to 3, as in Gemma."""
VOCABULARY, UNUSED = 4096, 256
CONFIG: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 65,
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOKENS, SEQUENCES, HELD_OUT_SEQUENCES = 256, 8, 64
PEAK, WARM_UP, LAST = 3e-3, 0.05, 0.05
"""The peak learning rate, the fraction of the training that is warm-up, and the final fraction of the peak."""


def main() -> None:
    """Train the model, and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000, help=f"steps of {SEQUENCES} sequences of {TOKENS} tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the training by then")
    parser.add_argument("--documents", type=int, default=None, help="read the first so many documents (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    training, held_out = (part[: arguments.documents] for part in split())
    tokenizer = train_tokenizer(training)
    stream, judged = (encode(tokenizer, part) for part in (training, held_out))
    print(f"{len(training)} documents of {stream.numel():,} tokens; {len(held_out)} of {judged.numel():,} held out")
    model = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train(model, stream, judged, arguments.steps, arguments.minutes * 60)
    model.save_pretrained(arguments.output)
    write_tokenizer(tokenizer, arguments.output)


def train_tokenizer(training: list[Document]) -> Tokenizer:
    """Train a byte-pair tokenizer, with Gemma's special tokens at their ids and unused tokens at the end."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - UNUSED, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator((document.text for document in training), trainer)
    learned = json.loads(bare.to_str())["model"]
    vocabulary: dict[str, int] = learned["vocab"]
    # No merge produces these tokens, so they never occur in texts; a short text may give fewer merges than fit.
    vocabulary |= {f"<unused{number}>": number for number in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in learned["merges"]], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    tokenizer.add_special_tokens([*SPECIAL])
    return tokenizer


def encode(tokenizer: Tokenizer, part: list[Document]) -> Tensor:
    """Return all documents as one row of token ids, each between `<bos>` and `<eos>`."""
    encoded = tokenizer.encode_batch([document.text for document in part])
    return torch.tensor([token for item in encoded for token in (*item.ids, CONFIG["eos_token_id"])])


def train(model: Gemma3ForCausalLM, stream: Tensor, judged: Tensor, steps: int, seconds: float) -> None:
    """Train with AdamW, warm-up and a cosine decay to a twentieth; print the held-out loss ten times."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
    start, told = time.monotonic(), 0.0
    for step, ids_BT in enumerate(batches(stream)):
        progress = max(step / steps, (time.monotonic() - start) / seconds)
        if progress >= told or progress >= 1:
            told = progress + 0.1
            loss = held_out_loss(model, judged)
            print(f"step {step:5}, {time.monotonic() - start:6.1f} s: held-out loss {loss:.3f}", flush=True)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate(progress)
        loss_of(model, ids_BT).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def rate(progress: float) -> float:
    """Return the learning rate, relative to its peak, after a fraction of the training."""
    cosine = (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
    return min(1.0, (progress + 1e-3) / WARM_UP) if progress < WARM_UP else LAST + (1 - LAST) * cosine


def batches(stream: Tensor) -> Iterator[Tensor]:
    """Yield random stretches of the row of tokens, [8, 257], without end."""
    while True:
        starts = torch.randint(0, stream.numel() - TOKENS, (SEQUENCES,))
        yield torch.stack([stream[at : at + TOKENS + 1] for at in starts.tolist()])


def loss_of(model: Gemma3ForCausalLM, ids_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next token, in nats."""
    logits = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: Gemma3ForCausalLM, judged: Tensor) -> float:
    """Return the mean loss on evenly spaced stretches of the held-out text."""
    count = min(HELD_OUT_SEQUENCES, judged.numel() // (TOKENS + 1))
    starts = [number * (judged.numel() - TOKENS) // count for number in range(count)]
    ids_NT = torch.stack([judged[at : at + TOKENS + 1] for at in starts])
    return sum(float(loss_of(model, part)) * len(part) for part in ids_NT.split(SEQUENCES)) / count


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
