"""What convert does after the shards: the default verification, the model card, the time taken, the next command."""

import json
import re
import sys
from pathlib import Path

import pytest

from t5g2convert.cli import convert as command
from tests.cli.commandline import CommandLine, document


def test_a_small_conversion_is_verified_unless_left_out(
    verified_by_default: None, t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    done = document(t5g2("convert", demo_source, tmp_path / "out", "--json"))
    assert done["verification"]["passed"]
    assert done["parameters"]["total"] < command.VERIFIED_BELOW
    assert done["seconds"] > 0
    assert "verification" not in document(t5g2("convert", demo_source, tmp_path / "left", "--no-verify", "--json"))


def test_a_large_conversion_is_verified_on_request(
    verified_by_default: None, t5g2: CommandLine, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = document(t5g2("plan", demo_source, "--json"))["parameters"]["total"]
    monkeypatch.setattr(command, "VERIFIED_BELOW", total)
    assert "verification" not in document(t5g2("convert", demo_source, tmp_path / "out", "--json"))
    assert "verification" in document(t5g2("convert", demo_source, tmp_path / "asked", "--verify", "--json"))


def test_values_that_are_not_finite_are_not_verified_by_default(
    verified_by_default: None, t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    done = document(t5g2("convert", demo_source, tmp_path / "out", "--allow-nonfinite", "--json"))
    assert "verification" not in done


def test_without_torch_a_conversion_is_written_with_a_note(
    verified_by_default: None, t5g2: CommandLine, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = t5g2("convert", demo_source, tmp_path / "out")
    assert result.code == 0
    assert "note: not verified: torch cannot be imported (ModuleNotFoundError); t5g2 doctor says more" in result.err
    assert (tmp_path / "out/config.json").exists()


def test_the_card_has_the_verification_and_the_manifest_does_not_list_it(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    (demo_source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert t5g2("convert", demo_source, tmp_path / "out", "--verify").code == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "\nlicense: mit\n" in text
    assert "decoder_parity" in text
    assert "README.md" not in json.loads((tmp_path / "out/t5g2.json").read_text())["files"]
    assert t5g2("verify", tmp_path / "out", "--source", demo_source).code == 0


def test_without_a_card_the_folder_has_none(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    assert t5g2("convert", demo_source, tmp_path / "out", "--no-card").code == 0
    assert not (tmp_path / "out/README.md").exists()
    assert t5g2("extract", tmp_path / "out", tmp_path / "part", "--part", "decoder").code == 0
    assert (tmp_path / "part/README.md").exists()


def test_only_a_card_that_nobody_edited_is_replaced(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    again = ("convert", demo_source, tmp_path / "out", "--overwrite")
    assert t5g2(*again).code == 0
    assert t5g2(*again).code == 0
    assert t5g2("card", tmp_path / "out", "--repo", "me/mine", "--write").code == 0
    assert "me/mine" in (tmp_path / "out/README.md").read_text()
    assert t5g2(*again).code == 0
    card = tmp_path / "out/README.md"
    card.write_text(card.read_text() + "I measured it.\n")
    result = t5g2(*again)
    assert result.code == 5
    assert "contains files that t5g2 did not write, and is not replaced: README.md" in result.err
    assert "I measured it." in card.read_text()
    assert t5g2("card", tmp_path / "out", "--write").code == 0
    assert "I measured it." in card.read_text()


def test_the_same_conversion_has_the_same_card(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    cards = []
    for name in ("a", "b"):
        t5g2("convert", demo_source, tmp_path / name)
        cards.append((tmp_path / name / "README.md").read_bytes())
    assert cards[0] == cards[1]


def test_the_last_line_is_the_next_command_and_the_time_is_printed(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my model"
    result = t5g2("convert", demo_source, out)
    assert re.search(r" in \d+\.\d s\n", result.out)
    assert result.out.splitlines()[-1] == f"next: t5g2 verify '{out}' --source {demo_source}"
    shown = t5g2("convert", demo_source, out, "--overwrite", "--verify").out
    assert shown.splitlines()[-1].startswith(f"next: t5g2 generate '{out}' --hide-encoder --decoder-prompt ")
    part = t5g2("extract", out, tmp_path / "part", "--part", "decoder", "--verify").out
    assert part.splitlines()[-1] == f"next: t5g2 upload {tmp_path / 'part'} your-name/part"
