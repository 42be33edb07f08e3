"""Fine-tune a T5Gemma 2 on conversations with the commands of t5g2, and talk to it.

    python examples/chat.py MODEL OUT [--steps 300] [--lr 1e-4]

MODEL needs a chat template. In the conversations a user gives a name and a town, asks for a sum, and asks for name and
town: the answers need the earlier turns. Every turn of the assistant becomes a pair (`--all-turns`). The people of
held-out conversations have names that are not trained on. Printed are, by `t5g2 finetune`, the loss, exact match and
chrF of held-out answers, and by `t5g2 generate --chat` the answers to some first turns.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Final

NAMES: Final = (
    "Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Karla", "Leo", "Mina", "Noah",
    "Olga", "Paul", "Rosa", "Simon", "Tina", "Viktor",
)  # fmt: skip
STRANGERS: Final = ("Anna", "Boris", "Clara", "Daniel", "Elena", "Frank")
TOWNS: Final = ("Oslo", "Paris", "Rome", "Berlin", "Madrid", "Vienna", "Prague", "Lisbon", "Athens", "Dublin")

Message = dict[str, str]


def main() -> None:
    """Write conversations, pack, fine-tune, and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=30, help="conversations with other names")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    chosen = parser.parse_args()
    model, out = chosen.model, chosen.out
    out.mkdir(parents=True)
    drawn = random.Random(0)
    for name, people, count in (("held-out", STRANGERS, chosen.held_out), ("train", NAMES, chosen.conversations)):
        rows = (json.dumps({"messages": conversation(drawn, people)}) for _ in range(count))
        (out / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        t5g2("pack", model, out / f"packed-{name}", out / f"{name}.jsonl", "--all-turns", "--show", 1)
    t5g2(
        "finetune", model, out / "packed-train", out / "run", "--eval", out / "packed-held-out", "--generate-eval",
        "--steps", chosen.steps, "--eval-every", max(1, chosen.steps // 3), "--batch-pairs", chosen.batch,
        "--lr", chosen.lr, "--warmup", chosen.steps // 10, "--precision", chosen.precision,
    )  # fmt: skip
    asked = [f"Hello, my name is {name}." for name in STRANGERS[:3]] + ["What is 4 plus 5?"]
    (out / "prompts.txt").write_text("".join(f"{text}\n" for text in asked))
    prompts = ("--chat", "--prompts", out / "prompts.txt", "--temperature", 0, "--max-new-tokens", 24)
    t5g2("generate", out / "run/model", *prompts)


def t5g2(*arguments: str | Path | float) -> None:
    """Print and run a command."""
    command = [str(argument) for argument in arguments]
    print("$ t5g2", *command, flush=True)
    subprocess.run([sys.executable, "-m", "t5g2convert", *command], check=True)


def conversation(drawn: random.Random, people: tuple[str, ...]) -> list[Message]:
    """Return a conversation: a name, a town, a sum, and questions for what was said."""
    name, town = drawn.choice(people), drawn.choice(TOWNS)
    one, two = drawn.randint(1, 9), drawn.randint(1, 9)
    told = [
        (f"Hello, my name is {name}.", f"Nice to meet you, {name}!"),
        (f"I live in {town}.", f"{town} must be a nice place."),
    ]
    total = (f"What is {one} plus {two}?", f"{one} plus {two} is {one + two}.")
    asked = [("What is my name?", f"Your name is {name}."), ("Where do I live?", f"You live in {town}.")]
    told.insert(drawn.randint(0, 2), total)
    drawn.shuffle(asked)
    return [
        {"role": role, "content": text}
        for turn in told + asked
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


if __name__ == "__main__":
    main()
