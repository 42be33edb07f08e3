"""Fine-tune a T5Gemma 2 to translate, from pairs to translations, with the commands of t5g2.

    python examples/translation.py MODEL OUT [--steps 100] [--lr 1e-4]

The pairs are English and German sentences of a small grammar: agreement of verbs, articles in two cases, negation, and
the verb in second place after an adverb. Held-out sentences are none of those trained on, but of the same words. OUT
gets the pairs, the packed data, the run and its model, and curves of the evaluations. Printed are, by `t5g2 finetune`,
the loss, exact match and chrF of held-out sentences, and by `t5g2 generate` some translations.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Final

NOUNS: Final = {
    "house": ("das", "Haus"),
    "dog": ("der", "Hund"),
    "cat": ("die", "Katze"),
    "book": ("das", "Buch"),
    "tree": ("der", "Baum"),
    "flower": ("die", "Blume"),
    "car": ("das", "Auto"),
    "table": ("der", "Tisch"),
    "clock": ("die", "Uhr"),
    "garden": ("der", "Garten"),
}
ADJECTIVES: Final = {"old": "alt", "new": "neu", "small": "klein", "big": "groß", "red": "rot", "beautiful": "schön"}
SUBJECTS: Final = {"I": ("ich", 0), "she": ("sie", 1), "we": ("wir", 2), "they": ("sie", 2)}
VERBS: Final = {
    "see": ("sehe", "sieht", "sehen"),
    "buy": ("kaufe", "kauft", "kaufen"),
    "love": ("liebe", "liebt", "lieben"),
    "find": ("finde", "findet", "finden"),
    "draw": ("zeichne", "zeichnet", "zeichnen"),
}
ADVERBS: Final = {"": "", "today": "heute", "now": "jetzt", "sometimes": "manchmal"}

Sentence = tuple[str, str]


def main() -> None:
    """Write pairs, pack, fine-tune, and translate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=6000, help="sentences to train on")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    chosen = parser.parse_args()
    model, out = chosen.model, chosen.out
    out.mkdir(parents=True)
    every = list(sentences())
    random.Random(0).shuffle(every)
    held_out, rest = every[: chosen.held_out], every[chosen.held_out :]
    for name, part in (("held-out", held_out), ("train", rest[: chosen.pairs])):
        rows = (json.dumps({"input": english, "target": german}) for english, german in part)
        (out / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        t5g2("pack", model, out / f"packed-{name}", out / f"{name}.jsonl", "--show", 1)
    t5g2(
        "finetune", model, out / "packed-train", out / "run", "--eval", out / "packed-held-out", "--generate-eval",
        "--generate-samples", chosen.held_out, "--steps", chosen.steps, "--eval-every", chosen.eval_every,
        "--batch-pairs", chosen.batch, "--lr", chosen.lr, "--warmup", chosen.steps // 10, "--precision",
        chosen.precision, "--keep", 1,
    )  # fmt: skip
    (out / "prompts.txt").write_text("".join(f"{english}\n" for english, _ in held_out[:8]))
    t5g2("generate", out / "run/model", "--prompts", out / "prompts.txt", "--temperature", 0, "--max-new-tokens", 24)
    draw(out / "run/evaluation.jsonl", out / "translation.svg")


def t5g2(*arguments: str | Path | float) -> None:
    """Print and run a command."""
    command = [str(argument) for argument in arguments]
    print("$ t5g2", *command, flush=True)
    subprocess.run([sys.executable, "-m", "t5g2convert", *command], check=True)


def draw(evaluations: Path, picture: Path) -> None:
    """Draw the losses and the share of exact translations over the steps; equal numbers give equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    every = [json.loads(line) for line in evaluations.read_text().splitlines()]
    steps = [each["step"] for each in every]
    # By default the names of elements have a random salt, and the file has today's date.
    with matplotlib.rc_context({"svg.hashsalt": "t5g2", "svg.fonttype": "none", "font.family": ["sans-serif"]}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        losses, exact = figure.subplots(1, 2)
        for seen, label in (("tasks", "encoder visible"), ("hidden", "encoder hidden")):
            losses.plot(steps, [each[seen]["pairs"] for each in every], label=label, marker="o", markersize=3)
        exact.plot(steps, [100 * each["generated"]["exact"] for each in every], marker="o", markersize=3)
        losses.set(xlabel="step", ylabel="held-out loss, nats for each token of the target")
        exact.set(xlabel="step", ylabel="held-out sentences translated exactly, %")
        for axes in (losses, exact):
            axes.grid(alpha=0.3)
        losses.legend(frameon=False)
        figure.savefig(picture, format="svg", metadata={"Date": None})


def sentences() -> Iterator[Sentence]:
    """Yield every sentence with its translation."""
    for (noun, (article, german)), (one, eins), (two, zwei) in product(
        NOUNS.items(), ADJECTIVES.items(), ADJECTIVES.items()
    ):
        if one != two:
            yield f"The {one} {noun} is {two}.", f"{article.capitalize()} {eins}e {german} ist {zwei}."
    for parts in product(ADVERBS, SUBJECTS, VERBS, ADJECTIVES, NOUNS, (False, True)):
        yield statement(*parts)


def statement(adverb: str, subject: str, verb: str, adjective: str, noun: str, negative: bool) -> Sentence:
    """Return a sentence with subject, verb and object."""
    who, person = SUBJECTS[subject]
    third = subject == "she"
    does = ("does not " if third else "do not ") if negative else ""
    english = f"{adverb} {subject} {does}{verb}{'s' if third and not negative else ''} the {adjective} {noun}."
    article, german = NOUNS[noun]
    # The accusative differs in the masculine alone.
    case = f"den {ADJECTIVES[adjective]}en" if article == "der" else f"{article} {ADJECTIVES[adjective]}e"
    verb_and_subject = f"{VERBS[verb][person]} {who}" if adverb else f"{who} {VERBS[verb][person]}"
    translation = f"{ADVERBS[adverb]} {verb_and_subject} {case} {german}{' nicht' if negative else ''}."
    return beginning(english), beginning(translation)


def beginning(text: str) -> str:
    """Return a sentence with a capital letter at its beginning."""
    text = text.strip()
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    main()
