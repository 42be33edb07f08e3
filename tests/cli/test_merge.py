import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from t5g2convert import convert
from tests.adaptation.adapters import write_adapter
from tests.cli.commandline import CommandLine


@pytest.fixture
def model(demo_source: Path, tmp_path: Path) -> Path:
    """Write a conversion, and next to it `adapter`."""
    convert(demo_source, tmp_path / "model", flush=False)
    write_adapter(tmp_path / "model", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    return tmp_path / "model"


def test_an_adapter_is_merged_and_verified(model: Path, t5g2: CommandLine, tmp_path: Path) -> None:
    arguments = ("merge", model, tmp_path / "adapter", tmp_path / "out")
    shown = t5g2(*arguments)
    assert shown.code == 0
    assert "merged 36 tensors (rank 4) and copied 215" in shown.out
    assert "note: the adapter also changes the vision tower: 4 of its 36 targets" in shown.err
    refused = t5g2(*arguments, "--json")
    assert (refused.code, refused.error["message"]) == (5, "exists and is not empty")
    done = json.loads(t5g2(*arguments, "--json", "--overwrite", "--dtype", "float32").out)
    assert (done["targets"], done["ranks"], done["tensors"]) == (
        36,
        [4],
        len(load_file(tmp_path / "out/model.safetensors")),
    )
    assert 0 < done["update_lost"] < 1e-3
    judged = t5g2("verify", tmp_path / "out", "--source", model, "--adapter", tmp_path / "adapter")
    assert (judged.code, "verified in float32" in judged.out) == (0, True)
    asked = t5g2("verify", tmp_path / "out", "--source", model)
    assert (asked.code, "pass the adapter with --adapter" in asked.err) == (2, True)


def test_what_cannot_be_merged_is_refused_in_one_line(model: Path, t5g2: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    refused = t5g2("merge", model, tmp_path / "adapter", tmp_path / "out")
    assert refused.code == 3
    assert "use_dora is True: only plain LoRA can be merged" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    swapped = t5g2("merge", tmp_path / "adapter", model, tmp_path / "out")
    assert swapped.code == 3
    assert "is not a peft adapter: it has no adapter_config.json" in swapped.err


def test_the_card_says_what_was_merged(model: Path, t5g2: CommandLine, tmp_path: Path) -> None:
    t5g2("merge", model, tmp_path / "adapter", tmp_path / "out")
    card = t5g2("card", tmp_path / "out").out
    assert "# T5Gemma 2 with a merged LoRA adapter" in card
    assert "$ t5g2 merge SOURCE ADAPTER OUTPUT" in card
    assert "rank 4 and scale 2" in card
