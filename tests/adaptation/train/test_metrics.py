import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from t5g2convert.adaptation.train.metrics import Metrics, open_log, plot_losses, read_metrics, truncate
from t5g2convert.errors import CheckpointError, OutputError

STEP = Metrics(
    step=1, kind="text", loss=2.5, tasks={"a": 2.0, "b": 3.0}, labels={"a": 10, "b": 10}, grad_norm=1.0, lr=1e-3,
    tokens=40, tokens_per_second=100.0,
)  # fmt: skip


def steps(count: int) -> list[Metrics]:
    return [replace(STEP, step=number + 1, tasks={"a": 2.0 / (number + 1), "b": 3.0}) for number in range(count)]


def write(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps(count)))


def test_a_log_is_read_as_written_and_continues_where_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for start, stop in ((0, 5), (3, 7)):
        with open_log(path, tmp_path / "board", start=start) as log:
            for step in steps(stop)[start:]:
                log.add(step)
    assert read_metrics(path) == steps(7)
    assert len(list((tmp_path / "board").iterdir())) >= 1


def test_a_run_that_starts_again_purges_earlier_tensorboard_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stop in (5, 2):
        with open_log(tmp_path / "metrics.jsonl", tmp_path / "board", start=0) as log:
            for step in steps(stop):
                log.add(step)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [scalar.step for scalar in board.Scalars("loss")] == [1, 2]


def test_an_incomplete_line_is_cut_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    with path.open("a") as file:
        file.write('{"step": 4, "ki')
    truncate(path, 10)
    assert read_metrics(path) == steps(3)


def test_a_damaged_log_is_reported_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 2)
    path.write_text(path.read_text() + "[]\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:3: is not a valid log line"):
        read_metrics(path)


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), open_log(tmp_path / "file/metrics.jsonl", tmp_path / "board", start=0):
        pass


def test_the_line_of_a_step_has_all_its_metrics() -> None:
    assert STEP.line == "step 1  loss 2.5000  (a 2.000, b 3.000)  grad norm 1.000  lr 1.00e-03  100 tokens/s"


@pytest.mark.parametrize("count", [0, 1, 7, 260])
def test_a_plot_has_the_same_bytes_for_the_same_steps(count: int, tmp_path: Path) -> None:
    for name in ("one.svg", "other.svg"):
        plot_losses(steps(count), tmp_path / name)
    one = (tmp_path / "one.svg").read_bytes()
    assert one == (tmp_path / "other.svg").read_bytes()
    assert b"<dc:date>" not in one
    plot_losses(steps(count + 1), tmp_path / "more.svg")
    assert (tmp_path / "more.svg").read_bytes() != one


def test_a_plot_names_its_tasks_and_says_when_it_cannot_be_written(tmp_path: Path) -> None:
    plot_losses(steps(3), tmp_path / "loss.svg")
    text = (tmp_path / "loss.svg").read_text()
    assert all(f">{word}<" in text for word in ("a", "b", "step"))
    with pytest.raises(OutputError):
        plot_losses(steps(3), tmp_path / "absent/loss.svg")


def test_T5_invalid_utf8_is_reported_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] = 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: is not UTF-8: invalid start byte at byte"):
        read_metrics(path)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: is not UTF-8"):
        truncate(path, 3)
    assert path.read_bytes() == data


def test_T5_anything_after_the_step_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    path.write_bytes(path.read_bytes() + bytes(1000))
    truncate(path, 3)
    assert read_metrics(path) == steps(3)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_T5_nothing_is_written_through_a_link(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    mine, path = tmp_path / "mine", tmp_path / "metrics.jsonl"
    write(mine, 2)
    before = mine.read_bytes()
    link(path, mine)
    with open_log(path, tmp_path / "board", start=1) as log:
        log.add(STEP)
    plot = tmp_path / "loss.svg"
    link(plot, mine)
    plot_losses(steps(3), plot)
    assert mine.read_bytes() == before


@pytest.mark.parametrize("change", [{"tasks": {"a": 1.0}}, {"step": -1}, {"tokens": 2**70}, {"more": 1}, {"kind": "x"}])
def test_T5_invalid_values_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({**asdict(STEP), **change}) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:1: is not a valid log line"):
        read_metrics(path)


def test_T5_an_endless_line_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:1: is too long to be a log"):
        read_metrics(path)
