"""Dates in many written forms to ISO 8601: seeded pairs for `t5g2 finetune`.

    python examples/dates.py FOLDER [--train 20000] [--held-out 1000]

FOLDER gets train.jsonl and held-out.jsonl, rows such as {"input": "the 3rd of March, 1987", "target": "1987-03-03"}; no
date is in both. exact_match.py measures models on them.
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
    """Make the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=20_000, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=1000, help="rows to measure with")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    make(chosen.folder, chosen.train, chosen.held_out, chosen.seed)


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


if __name__ == "__main__":
    main()
