"""The example that measures exact matches."""

from pathlib import Path

import pytest

from t5g2convert import convert
from tests.examples.conftest import run


def test_only_exact_matches_count(capsys: pytest.CaptureFixture[str]) -> None:
    from exact_match import report

    rows = [{"input": "3.3.1987", "target": "1987-03-03"}, {"input": "4.3.1987", "target": "1987-03-04"}]
    report(rows, ["1987-03-03", "1987-03-04."])
    assert capsys.readouterr().out.splitlines() == [
        "'4.3.1987': '1987-03-04.' in place of '1987-03-04'",
        "1 of 2 exactly right (50.0%)",
    ]


@pytest.mark.slow
def test_a_parent_and_its_conversion_are_measured(tiny_parent: Path, tmp_path: Path) -> None:
    run("dates.py", tmp_path, "--train", "20", "--held-out", "6")
    convert(tiny_parent, tmp_path / "model")
    # After two steps of training, neither writes a date.
    options = (tmp_path / "held-out.jsonl", "--rows", "5", "--batch", "2", "--max-new-tokens", "14")
    shots = ("--shots", tmp_path / "train.jsonl", "--labels", "Date", "ISO")
    for arguments in ((tiny_parent, *options, *shots), (tmp_path / "model", *options)):
        lines = run("exact_match.py", *arguments).splitlines()
        assert len(lines) == 6
        assert lines[-1] == "0 of 5 exactly right (0.0%)"
