"""The commands with sources that need a note or an option."""

import json
from pathlib import Path

import torch

from tests.cli.commandline import CommandLine
from tests.conftest import TwinFolder
from tests.models.twins import respell


def test_a_head_is_refused_and_its_hint_followed(t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    respell(twin_folder("text-8"), source, lambda held: {**held, "score.weight": torch.zeros(2, 24)})
    for command in (["plan", source], ["convert", source, tmp_path / "out"]):
        refused = t5g2(*command)
        assert refused.code == 3
        assert "score.weight is a head for classification or rewards: --drop-heads drops it" in refused.err
    assert not (tmp_path / "out").exists()
    planned = t5g2("plan", source, "--drop-heads", "--json")
    assert json.loads(planned.out)["options"] == {"drop_heads": True}
    done = t5g2("convert", source, tmp_path / "out", "--drop-heads", "--verify")
    assert done.code == 0, done.err
    assert "note: score.weight is dropped: a head for classification or rewards, as --drop-heads requests" in done.err
    assert t5g2("verify", tmp_path / "out", "--source", source).code == 0
    assert t5g2("inspect", source).code == 0


def test_shieldgemma_is_called_by_its_name(t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    respell(twin_folder("images-8"), source, lambda held: held)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "shieldgemma2"}))
    refused = t5g2("plan", source)
    assert refused.code == 3
    assert "(ShieldGemma 2, an image classifier made from a Gemma 3, which does not generate text)" in refused.err


def test_a_map_is_shown_with_the_options_that_its_drops_wait_for(t5g2: CommandLine) -> None:
    shown = t5g2("mappings", "show", "gemma3").out
    assert "with --drop-heads only" in " ".join(shown.split())
    assert "v_head.summary.weight" in shown
