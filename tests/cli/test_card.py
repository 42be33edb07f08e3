"""`t5g2 card` on the command line."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from t5g2convert import convert
from t5g2convert.cli.demo import build_demo_source
from tests.cli.commandline import CommandLine

SOURCE_CARD = "---\nlicense: gemma\n---\n# Gemma 3\n"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    build_demo_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", flush=False)
    (tmp_path / "theirs.md").write_text(SOURCE_CARD)
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_card_is_printed_and_nothing_is_written(t5g2: CommandLine, work: Path) -> None:
    before = files(work / "out")
    result = t5g2("card", work / "out", "--source-card", work / "theirs.md", "--repo", "me/mine")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("---\nlicense: gemma\n")
    assert "# `mine`" in result.out
    assert files(work / "out") == before


def test_the_written_card_equals_the_printed_one(t5g2: CommandLine, work: Path) -> None:
    printed = t5g2("card", work / "out").out
    result = t5g2("card", work / "out", "--write")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"wrote {work / 'out/README.md'}\n"
    assert (work / "out/README.md").read_text() == printed
    assert not [name for name in files(work / "out") if name.startswith(".")]


def test_a_written_card_keeps_the_verification_valid(t5g2: CommandLine, work: Path) -> None:
    t5g2("card", work / "out", "--write")
    result = t5g2("verify", work / "out", "--source", work / "source")
    assert result.code == 0, result.out
    t5g2("card", work / "out", "--write")
    card = (work / "out/README.md").read_text()
    assert "Verified against its source" in card
    assert "| `decoder_parity` | passed |" in card
    t5g2("card", work / "out", "--write")
    assert (work / "out/README.md").read_text() == card
    assert t5g2("verify", work / "out", "--source", work / "source").code == 0
    assert t5g2("extract", work / "source", work / "no", "--part", "encoder").code == 3
    assert t5g2("extract", work / "out", work / "encoder", "--part", "encoder", "--no-card").code == 0
    assert "README.md" not in files(work / "encoder"), "a card is not carried over to another model"


def test_custom_text_stays_unless_everything_is_replaced(t5g2: CommandLine, work: Path) -> None:
    own = "---\nlanguage: no\n---\n# Mine \u200d\n"
    (work / "out/README.md").write_text(own)
    printed = t5g2("card", work / "out").out
    assert "# Mine \\u200d\n" in printed, "control characters are not for a terminal"
    assert "language: no\n" in printed
    assert (work / "out/README.md").read_text() == own
    t5g2("card", work / "out", "--write")
    assert "# Mine \u200d\n" in (work / "out/README.md").read_text()
    t5g2("card", work / "out", "--write", "--replace")
    assert "Mine" not in (work / "out/README.md").read_text()


def test_line_ends_stay(t5g2: CommandLine, work: Path) -> None:
    (work / "out/README.md").write_bytes(b"# Mine\r\n")
    assert "\\r" not in t5g2("card", work / "out").out
    t5g2("card", work / "out", "--write")
    data = (work / "out/README.md").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") > 20


def _link(path: Path) -> None:
    path.symlink_to(path.with_name("config.json"))


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_link, "is a link"),
        (_dangling, "is a broken symlink"),
        (Path.mkdir, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.write_bytes(b"\xff"), "is not UTF-8"),
        (lambda path: path.write_bytes(b"x" * (5 << 20)), "too large for a card"),
        (lambda path: path.write_text("---\na: [\n---\n"), "metadata are not valid YAML"),
    ],
    ids=["link", "dangling", "folder", "pipe", "bytes", "large", "yaml"],
)
def test_a_file_that_is_not_a_card_is_not_overwritten(
    make: Callable[[Path], object], reason: str, t5g2: CommandLine, work: Path
) -> None:
    make(work / "out/README.md")
    result = t5g2("card", work / "out", "--write")
    assert (result.code, result.out, result.err.count("\n")) == (5, "", 1)
    assert reason in result.err
    assert not [name for name in files(work / "out") if name.startswith(".README")]


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "is missing"), (b"\xff", "is not UTF-8"), (b"---\n- a\n---\n", "are not a mapping")]
)
def test_an_invalid_source_card_is_refused(content: bytes | None, reason: str, t5g2: CommandLine, work: Path) -> None:
    if content is not None:
        (work / "bad.md").write_bytes(content)
    result = t5g2("card", work / "out", "--source-card", work / "bad.md")
    assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
    assert reason in result.err


def test_a_folder_that_is_not_ours_gets_no_card(t5g2: CommandLine, work: Path) -> None:
    assert t5g2("card", work / "source").code == 3
    assert t5g2("card", work / "gone").code == 3
    result = t5g2("card", work / "out", "--repo", "mine")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "expected org/name" in result.err


def test_a_folder_that_cannot_be_written_is_an_error(
    t5g2: CommandLine, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = t5g2("card", work / "out", "--write")
    assert (result.code, result.err.count("\n")) == (5, 1)
    assert "cannot be written: No space left on device" in result.err
    assert not [name for name in files(work / "out") if "README" in name]
