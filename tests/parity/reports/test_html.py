import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.parity.reports.html import HEIGHT, html
from t5g2convert.parity.reports.report import Check, Drift, Figures, Report

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>\x1b[31mred\x07"
LOADING = {"src", "href", "srcset", "data", "action", "background", "poster", "xlink:href", "formaction", "style"}


class Page(HTMLParser):
    """Parse a page as a browser does."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str | None = None) -> str:
        return "".join(data for within, data in self.texts if tag is None or within == tag)


def report(*checks: Check, **changes: Any) -> Report:
    values: dict[str, Any] = {
        "output": Path("out"),
        "source": Path("source"),
        "dtype": "bfloat16",
        "device": "cpu",
        "tolerance": 0.0,
        "checks": checks,
        "skipped": {},
        "remarks": (),
        "parameters": {"embedding": 30, "encoder": 50, "decoder": 20, "vision": 0, "projector": 0, "total": 100},
    }
    return Report(**(values | changes))


def measured(*relative: float, name: str = "decoder_parity", departs: str | None = None) -> Check:
    drifts = tuple(Drift(f"layers.{number}", 3 * value, value) for number, value in enumerate(relative))
    return Check(name, not any(relative), "compared", figures=Figures(0, 0, 5, departs=departs, drifts=drifts))


def bars(text: str) -> list[float]:
    return [float(height) for height in re.findall(r'height="([\d.]+)" fill="var\(--bar\)"', text)]


def test_the_page_loads_nothing() -> None:
    text = html(report(measured(0.0, 0.5), Check("config", False, "x", offenders=("a", "b"))))
    read = Page(text)
    assert text.startswith("<!doctype html>\n")
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use"} & set(read.tags)
    assert {name for _, name, _ in read.attributes} & LOADING == set()
    assert [value for tag, name, value in read.attributes if (tag, name) == ("meta", "charset")] == ["utf-8"]


@pytest.mark.parametrize("passed", [True, False])
def test_the_page_shows_the_verdict_and_every_check(passed: bool) -> None:
    checks = [Check("integrity", True, "files are sound"), Check("config", passed, "settings judged")]
    read = Page(html(report(*checks, skipped={"vision_parity": "no images there"}, remarks=("mind the gap",))))
    verdict = "passed" if passed else "failed"
    assert verdict in read.text("h1")
    assert verdict in read.text("title")
    shown = read.text()
    for expected in (
        "integrity",
        "files are sound",
        "settings judged",
        "vision_parity",
        "no images there",
        "mind the gap",
    ):
        assert expected in shown
    assert ("td", "class", "failed") in read.attributes or passed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"tolerance": 0.0}, "exactly"), ({"tolerance": 0.001}, "within 0.001"), ({"source": None}, "without its source")],
)
def test_the_page_shows_the_options(changes: dict[str, Any], expected: str) -> None:
    shown = Page(html(report(Check("integrity", True, "x"), **changes))).text()
    assert expected in shown
    assert ("bfloat16 on cpu" in shown) == ("source" not in changes)


def test_every_comparison_gets_a_plot_with_a_bar_for_each_layer() -> None:
    one, other = measured(*[0.0] * 10), measured(*[0.0] * 4, name="encoder_parity")
    text = html(report(Check("integrity", True, "x"), one, other, Check("runs", True, "x")))
    read = Page(text)
    assert read.tags.count("svg") == 2
    assert len(bars(text)) == 14
    titles = [data for within, data in read.texts if within == "title"][1:]
    assert [title.partition(":")[0] for title in titles] == [
        f"layers.{number}" for count in (10, 4) for number in range(count)
    ]


def test_bars_grow_with_the_difference_and_stay_in_the_plot() -> None:
    values = [0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, 50.0, math.inf]
    heights = bars(html(report(measured(*values, departs="decoder layers.1 (full_attention), mlp"))))
    assert heights == sorted(heights)
    assert heights[:3] == [0, 0, 0]
    assert heights[3] == pytest.approx(HEIGHT / 3, abs=0.1)
    assert heights[4] == pytest.approx(HEIGHT * 2 / 3, abs=0.1)
    assert heights[5:] == [HEIGHT] * 3


def test_the_page_shows_the_first_difference() -> None:
    shown = Page(html(report(measured(0.0, 0.0, 0.5, departs="decoder layers.2 (full_attention)")))).text()
    assert "2 of 3" in shown
    assert "decoder layers.2 (full_attention)" in shown


def test_offenders_are_listed_up_to_a_limit() -> None:
    names = tuple(f"tensor-{number}" for number in range(300))
    text = html(report(Check("config", False, "300 faults", offenders=names)))
    read = Page(text)
    assert 100 <= read.tags.count("li") <= 300
    assert "tensor-0" in read.text("code")


def test_parameters_are_counted_by_part() -> None:
    shown = Page(html(report(Check("integrity", True, "x")))).text()
    assert "embedding3030.0%" in shown
    assert "total100" in shown


@pytest.mark.parametrize(
    "parameters", [{}, {"encoder": "<b>"}, {"<b>": 5}, {"encoder": None, "total": 5}, {"encoder": True}], ids=str
)
def test_invalid_parameter_counts_are_left_out(parameters: dict[str, Any]) -> None:
    text = html(report(Check("integrity", True, "x"), parameters=parameters))
    Page(text)
    assert "Parameters" not in text


PLACES: list[dict[str, Any]] = [
    {"output": Path(HOSTILE)},
    {"source": Path(HOSTILE)},
    {"device": HOSTILE},
    {"dtype": HOSTILE},
    {"remarks": (HOSTILE,)},
    {"skipped": {"runs": HOSTILE}},
    {"skipped": {HOSTILE: "x"}},
    {"checks": (Check("config", False, HOSTILE),)},
    {"checks": (Check(HOSTILE, False, "x"),)},
    {"checks": (Check("config", False, "x", offenders=(HOSTILE, HOSTILE)),)},
    {"checks": (measured(0.5, departs=HOSTILE),)},
    {"checks": (Check("a", True, "", figures=Figures(0, 0, 1, drifts=(Drift(HOSTILE, 0.0, 0.0),))),)},
]
"""Where text from outside can stand in a report."""


@pytest.mark.parametrize("changes", PLACES, ids=lambda changes: "-".join(changes))
def test_markup_from_outside_stays_text(changes: dict[str, Any]) -> None:
    read = Page(html(report(**({"checks": (Check("integrity", True, "x"),)} | changes))))
    assert not {"script", "img"} & set(read.tags)
    assert not any(name.startswith("on") for _, name, _ in read.attributes)
    everything = read.text() + "".join(value for _, _, value in read.attributes)
    assert "<script>alert(1)</script>\"'&<img src=x onerror=y>" in everything


@pytest.mark.parametrize("changes", PLACES, ids=lambda changes: "-".join(changes))
def test_the_page_contains_no_control_characters(changes: dict[str, Any]) -> None:
    text = html(report(**({"checks": (Check("integrity", True, "x"),)} | changes)))
    assert [letter for letter in text if letter != "\n" and not letter.isprintable()] == []


def test_a_path_that_is_not_utf8_can_be_written() -> None:
    text = html(report(Check("integrity", True, "x"), output=Path("out-\udcff")))
    assert "out-" in text.encode("utf-8").decode()
