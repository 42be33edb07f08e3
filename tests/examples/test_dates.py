"""The example that makes pairs of dates."""

import json
from datetime import date
from pathlib import Path

from tests.examples.conftest import run


def make(folder: Path, *options: str) -> dict[str, list[dict[str, str]]]:
    run("dates.py", folder, *options)
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held-out")
    }


def test_a_date_is_written_in_every_form() -> None:
    from dates import FORMS, SHORT_FORMS

    assert [form(date(1987, 3, 3)) for form in FORMS + SHORT_FORMS] == [
        "the 3rd of March, 1987",
        "the third of March 1987",
        "the third of March, nineteen eighty-seven",
        "March the third, nineteen eighty-seven",
        "March 3, 1987",
        "March 3rd, 1987",
        "Mar 3, 1987",
        "Mar. 3rd 1987",
        "3 March 1987",
        "3rd Mar 1987",
        "Tuesday, 3 March 1987",
        "Tuesday, March 3rd, 1987",
        "Tue 3 Mar 1987",
        "03-MAR-1987",
        "1987/3/3",
        "1987, March 3",
        "3.3.1987",
        "3.III.1987",
        "19870303",
        "3 Mar 87",
        "3rd March '87",
        "Tue, Mar 3 '87",
    ]


def test_days_and_years_are_spelled_as_they_are_said() -> None:
    from dates import ordinal, spoken, th

    assert [th(day) for day in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st"]
    )
    assert [ordinal(day) for day in (5, 12, 20, 21, 30, 31)] == (
        ["fifth", "twelfth", "twentieth", "twenty-first", "thirtieth", "thirty-first"]
    )
    assert [spoken(year) for year in (1900, 1905, 1919, 1940, 1999, 2000, 2009, 2010, 2045)] == [
        "nineteen hundred",
        "nineteen oh five",
        "nineteen nineteen",
        "nineteen forty",
        "nineteen ninety-nine",
        "two thousand",
        "two thousand and nine",
        "twenty ten",
        "twenty forty-five",
    ]


def test_no_form_has_two_meanings() -> None:
    from dates import FIRST, FORMS, LAST, SHORT_FORMS

    days = [date.fromordinal(number) for number in range(FIRST.toordinal(), LAST.toordinal() + 1)]
    recent = [day for day in days if 1950 <= day.year < 2050]
    written = [(form(day), day) for form in FORMS for day in days]
    written += [(form(day), day) for form in SHORT_FORMS for day in recent]
    meanings: dict[str, date] = {}
    for text, day in written:
        assert meanings.setdefault(text, day) == day


def test_no_date_is_both_trained_on_and_held_out_and_a_seed_gives_the_same_rows(tmp_path: Path) -> None:
    rows = make(tmp_path / "one", "--train", "3000", "--held-out", "200")
    assert {name: len(part) for name, part in rows.items()} == {"train": 3000, "held-out": 200}
    dates = {name: {each["target"] for each in part} for name, part in rows.items()}
    assert len(dates["train"]) == 3000
    assert len(dates["held-out"]) == 200
    assert not dates["train"] & dates["held-out"]
    assert make(tmp_path / "two", "--train", "3000", "--held-out", "200") == rows
    assert make(tmp_path / "three", "--train", "10", "--held-out", "200")["held-out"] == rows["held-out"]
    assert make(tmp_path / "four", "--train", "10", "--held-out", "200", "--seed", "1")["held-out"] != rows["held-out"]
