"""Dates in many written forms to ISO 8601: seeded pairs for `t5g2 finetune`, and how many a model gets exactly right.

    python examples/dates.py make FOLDER [--train 20000] [--held-out 1000]
    python examples/dates.py few-shot FOLDER GEMMA3 [--shots 8] [--rows 200]
    python examples/dates.py score FOLDER T5GEMMA2 [--rows 200]

`make` writes train.jsonl and held-out.jsonl, rows such as {"input": "the 3rd of March, 1987", "target": "1987-03-03"};
no date is in both. `few-shot` shows a decoder-only Gemma 3 some rows of train.jsonl and then a held-out date; `score`
gives a T5Gemma 2 the held-out date alone. Both decode greedily, and print the share of exact matches.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Final

FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)
TRAIN, HELD_OUT = "train.jsonl", "held-out.jsonl"

ROMAN: Final = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII")
ONES: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS: Final = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS: Final = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
)  # fmt: skip

Row = dict[str, str]


def th(day: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, ..."""
    return f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def ordinal(day: int) -> str:
    """Return first, ..., thirty-first."""
    if day <= 20:
        return ORDINALS[day - 1]
    return "thirtieth" if day == 30 else f"{TENS[day // 10 - 2]}-{ORDINALS[day % 10 - 1]}"


def number(value: int) -> str:
    """Return zero, ..., ninety-nine."""
    if value < 20:
        return ONES[value]
    return TENS[value // 10 - 2] + (f"-{ONES[value % 10]}" if value % 10 else "")


def spoken(year: int) -> str:
    """Return a year as it is said: nineteen hundred, nineteen oh five, two thousand and five, twenty eighteen."""
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010:
        return "two thousand" + (f" and {ONES[rest]}" if rest else "")
    if rest == 0:
        return f"{number(century)} hundred"
    return f"{number(century)} {'oh ' if rest < 10 else ''}{number(rest)}"


FORMS: Final[tuple[Callable[[date], str], ...]] = (
    lambda d: f"the {th(d.day)} of {d:%B}, {d.year}",
    lambda d: f"the {ordinal(d.day)} of {d:%B} {d.year}",
    lambda d: f"the {ordinal(d.day)} of {d:%B}, {spoken(d.year)}",
    lambda d: f"{d:%B} the {ordinal(d.day)}, {spoken(d.year)}",
    lambda d: f"{d:%B} {d.day}, {d.year}",
    lambda d: f"{d:%B} {th(d.day)}, {d.year}",
    lambda d: f"{d:%b} {d.day}, {d.year}",
    lambda d: f"{d:%b}. {th(d.day)} {d.year}",
    lambda d: f"{d.day} {d:%B} {d.year}",
    lambda d: f"{th(d.day)} {d:%b} {d.year}",
    lambda d: f"{d:%A}, {d.day} {d:%B} {d.year}",
    lambda d: f"{d:%A}, {d:%B} {th(d.day)}, {d.year}",
    lambda d: f"{d:%a} {d.day} {d:%b} {d.year}",
    lambda d: f"{d:%d-%b-%Y}".upper(),
    lambda d: f"{d.year}/{d.month}/{d.day}",
    lambda d: f"{d.year}, {d:%B} {d.day}",
    lambda d: f"{d.day}.{d.month}.{d.year}",
    lambda d: f"{d.day}.{ROMAN[d.month - 1]}.{d.year}",
    lambda d: f"{d:%Y%m%d}",
)
SHORT_FORMS: Final[tuple[Callable[[date], str], ...]] = (
    lambda d: f"{d.day} {d:%b} {d:%y}",
    lambda d: f"{th(d.day)} {d:%B} '{d:%y}",
    lambda d: f"{d:%a}, {d:%b} {d.day} '{d:%y}",
)
"""Forms with two digits of the year, which stand for 1950 to 2049."""


def main() -> None:
    """Make the rows, or measure a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "few-shot", "score"])
    parser.add_argument("folder", type=Path, help="the folder of train.jsonl and held-out.jsonl")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--train", type=int, default=20_000, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=1000, help="rows to measure with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shots", type=int, default=8, help="examples in the prompt")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows to measure, from the first")
    parser.add_argument("--batch", type=int, default=20, help="rows that run at once")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.what == "make":
        make(folder, arguments.train, arguments.held_out, arguments.seed)
        return
    if arguments.model is None:
        parser.error("a model is missing")
    rows = read(folder / HELD_OUT)[: arguments.rows]
    if arguments.what == "score":
        written = answers(arguments.model, rows, arguments.batch)
    else:
        written = few_shot(arguments.model, read(folder / TRAIN)[: arguments.shots], rows, arguments.batch)
    report(rows, written)


def make(folder: Path, train: int, held_out: int, seed: int) -> None:
    """Write both files: the same for the same seed, and the held-out rows whatever `train` is."""
    chosen = random.Random(seed)
    dates = [FIRST + timedelta(days) for days in range((LAST - FIRST).days + 1)]
    chosen.shuffle(dates)
    if not 0 < held_out < len(dates):
        raise SystemExit(f"--held-out must be between 1 and {len(dates) - 1:,}, the number of dates")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / HELD_OUT, (row(each, chosen) for each in dates[:held_out]))
    rest = dates[held_out:]
    write(folder / TRAIN, (row(rest[number % len(rest)], chosen) for number in range(train)))


def row(each: date, chosen: random.Random) -> Row:
    """Return a pair for a date, in a form that is drawn."""
    forms = FORMS + SHORT_FORMS if 1950 <= each.year < 2050 else FORMS
    return {"input": chosen.choice(forms)(each), "target": each.isoformat()}


def write(path: Path, rows: Iterator[Row]) -> None:
    """Write rows, one on each line."""
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """Read rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def few_shot(model: Path, shots: list[Row], rows: list[Row], batch: int) -> list[str]:
    """Return what a decoder-only model writes after the examples and each row's date."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On the left, so that the generated tokens follow the prompt of each row.
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    decoder = AutoModelForCausalLM.from_pretrained(model).eval()
    beginning = "".join(f"Date: {shot['input']}\nISO: {shot['target']}\n\n" for shot in shots)
    texts = []
    for at in range(0, len(rows), batch):
        prompts = [f"{beginning}Date: {each['input']}\nISO:" for each in rows[at : at + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            tokens = decoder.generate(**inputs, max_new_tokens=14, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip().split("\n")[0] for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


def answers(model: Path, rows: list[Row], batch: int) -> list[str]:
    """Return what an encoder-decoder writes for each row's date."""
    from t5g2convert.reference.generation.generator import Generator, Prompt
    from t5g2convert.reference.options import GenerateOptions

    generator = Generator(model, GenerateOptions(temperature=0, max_new_tokens=14, batch=batch))
    return [found.text.strip() for found in generator.texts(Prompt(each["input"]) for each in rows)]


def report(rows: list[Row], written: list[str]) -> None:
    """Print the first wrong answers, and the share of exact matches."""
    pairs = list(zip(rows, written, strict=True))
    wrong = [(each, text) for each, text in pairs if text != each["target"]]
    for each, text in wrong[:10]:
        print(f"{each['input']!r}: {text!r} in place of {each['target']}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} exactly right ({1 - len(wrong) / len(rows):.1%})")


if __name__ == "__main__":
    main()
