"""What values of options mean."""

from pathlib import Path

import pytest

from t5g2convert.cli import options
from tests.cli.commandline import CommandLine
from tests.small_shards import SMALLEST_FOR_USERS


@pytest.fixture
def t5g2(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.mark.parametrize("size", ["1", "5", "500", "30KB", "0.9M", "999999", "976KiB"])
def test_a_shard_below_1_mb_is_exit_2_and_says_how_sizes_are_written(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setattr(options, "SMALLEST_SHARD", SMALLEST_FOR_USERS)
    for command in (
        ["plan", demo_source],
        ["convert", demo_source, tmp_path / "out"],
        ["extract", demo_source, tmp_path / "out", "--part", "encoder"],
    ):
        result = t5g2(*command, "--max-shard-size", size)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert f"{size!r} is below 1 MB" in result.err
        assert "write 5G, 500MB or 4GiB" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5G", 5 * 10**9),
        ("5g", 5 * 10**9),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("5gib", 5 * 2**30),
        ("5Gi", 5 * 2**30),
        ("500M", 500 * 10**6),
        ("500MB", 500 * 10**6),
        ("500 MiB", 500 * 2**20),
        ("1.5G", 1_500_000_000),
        ("1MB", 10**6),
        ("1000K", 10**6),
        ("1000000", 10**6),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_decimal_with_b_and_binary_with_ib(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "SMALLEST_SHARD", SMALLEST_FOR_USERS)
    assert SMALLEST_FOR_USERS == 10**6
    assert options.parse_size(text) == size
