from collections import Counter
from pathlib import Path

import pytest

from t5g2convert.adaptation.ul2.mixture import DEFAULT_MIXTURE, read_mixture
from t5g2convert.errors import MappingError

PAPER = DEFAULT_MIXTURE.read_text()


def fault(text: str, folder: Path) -> tuple[str, str]:
    """Return the message of the error for a file, and the line and column it names."""
    path = folder / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(MappingError) as caught:
        read_mixture(path)
    where = str(caught.value.where)
    assert where.startswith(f"{path}:")
    return str(caught.value), where.removeprefix(f"{path}:")


def test_the_default_is_the_papers() -> None:
    mixture = read_mixture()
    assert [(task.mean_span, task.rate, task.weight) for task in mixture.tasks] == [
        (3, 0.15, 1),
        (12, 0.5, 1),
        (32, 0.15, 1),
        (32, 0.5, 1),
        (None, 0.75, 4),
    ]
    assert mixture.block == 8
    assert Counter(mixture.cycle) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 4}
    assert [task.sentinel for task in mixture.tasks] == [True, True, True, True, False]
    assert mixture.mode_tokens == frozenset()


def test_a_file_gives_another_mixture(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "format: 1\ntasks:\n"
        "  - {name: short, kind: spans, mean_span: 2.5, rate: 0.2, weight: 3, mode_token: 256002}\n"
        "  - {name: rest, kind: prefix, rate: 0.5, weight: 2, mode_token: 256003}\n"
    )
    mixture = read_mixture(path)
    assert (mixture.block, mixture.cycle) == (5, (0, 0, 0, 1, 1))
    assert mixture.mode_tokens == {256_002, 256_003}
    assert mixture.tasks[1].sentinel


@pytest.mark.parametrize(
    ("found", "instead", "reason", "line"),
    [
        ("rate: 0.15", "rate: 1.0", "rate: Input should be less than 1", 6),
        ("rate: 0.15", "rate: 0.0", "rate: Input should be greater than 0", 6),
        ("mean_span: 3,", "mean_span: 0.5,", "mean_span: Input should be greater than or equal to 1", 6),
        ("mean_span: 3,", "", "spans need a mean_span", 6),
        ("mean_span: 3, rate: 0.15", "mean_span: 1, rate: 0.6", "leave too few tokens between them", 6),
        ("rate: 0.75", "mean_span: 3, rate: 0.75", "a prefix task has one span", 10),
        ("rate: 0.15, weight: 1}", "rate: 0.15, weight: 1, sentinel: false}", "spans need sentinels", 6),
        ("weight: 4", "weight: 0", "weight: Input should be greater than or equal to 1", 10),
        ("weight: 4", "weight: 1001", "weight: Input should be less than or equal to 1000", 10),
        ("weight: 4", "weight: 1.0", "weight: Input should be a valid integer", 10),
        ("weight: 4", "wieght: 4", "(did you mean weight?)", 10),
        ("weight: 4", "weight: 4, mode_token: -1", "mode_token: Input should be greater than or equal to 0", 10),
        ("kind: prefix", "kind: suffix", "kind: Input should be 'spans' or 'prefix'", 10),
        ("name: prefix", "name: spans-3-15", "two tasks have the name 'spans-3-15'", 6),
        ("name: prefix", 'name: "a b"', "name: String should match pattern", 10),
        ("format: 1", "format: 2", "format: Input should be 1", 4),
        ("format: 1", "formats: 1", "(did you mean format?)", 4),
    ],
)
def test_a_fault_is_reported_with_its_position(
    found: str, instead: str, reason: str, line: int, tmp_path: Path
) -> None:
    assert found in PAPER
    said, place = fault(PAPER.replace(found, instead, 1), tmp_path)
    assert reason in said
    assert int(place.partition(":")[0]) == line


@pytest.mark.parametrize(("written", "first"), [("<unused7>", "<unused7>"), (262_143, 262_143), ("null", None)])
def test_a_mixture_names_its_first_sentinel(written: str | int, first: str | int | None, tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text(PAPER.replace("format: 1", f"format: 1\nfirst_sentinel: {written}"))
    assert read_mixture(tmp_path / "mixture.yaml").first_sentinel == first
    assert read_mixture().first_sentinel is None


@pytest.mark.parametrize("written", ["-1", "1.5", '""', "[1]"])
def test_a_first_sentinel_is_a_name_or_an_id(written: str, tmp_path: Path) -> None:
    said, place = fault(PAPER.replace("format: 1", f"format: 1\nfirst_sentinel: {written}"), tmp_path)
    assert said.startswith("first_sentinel") or "first_sentinel" in said
    assert place.startswith("5:")


def test_a_mixture_without_tasks_is_refused(tmp_path: Path) -> None:
    assert "at least 1 item" in fault("format: 1\ntasks: []\n", tmp_path)[0]
    assert fault("[]\n", tmp_path)[1] == "1:1"
