"""`verify`, `extract`, `compare` and `generate` on a model fine-tuned with transformers."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file

from tests.cli.commandline import CommandLine
from tests.parity.elsewhere import ENCODER, Tensors, change, copied, names, train, write_start


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Write `parent`, a Gemma 3; `start`, its conversion; and fine-tuned models of three classes."""
    root = tmp_path_factory.mktemp("elsewhere")
    start = write_start(root)
    for kind in ("whole", "inner", "classifier"):
        train(start, root / kind, kind=kind)
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog and then some more of it " * 4)
    return root


def test_a_sound_one_is_exit_0_and_a_lost_encoder_exit_6(scene: Path, t5g2: CommandLine, tmp_path: Path) -> None:
    done = t5g2("verify", scene / "whole", "--source", scene / "start", "--json", "--junit", tmp_path / "junit.xml")
    assert done.code == 0
    document = json.loads(done.out)
    assert (document["passed"], document["complete"]) == (True, True)
    assert list(document["skipped"]) == ["integrity"]
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")

    lost = copied(scene / "whole", tmp_path / "lost")
    old = load_file(scene / "start/model.safetensors")

    def put_back(tensors: Tensors) -> None:
        tensors.update({name: old[name].float() for name in names(old, ENCODER)})

    change(lost, put_back)
    done = t5g2("verify", lost, "--source", scene / "start", "--html", tmp_path / "page.html")
    assert done.code == 6
    assert "FAILED" in done.out
    assert "not verified" in done.out
    assert "transformers#48805" in " ".join((tmp_path / "page.html").read_text().split())
    done = t5g2("verify", lost, "--source", scene / "start", "--json")
    failed = [check["name"] for check in json.loads(done.out)["checks"] if not check["passed"]]
    assert (done.code, failed) == (6, ["encoder"])
    # The hint's command works.
    assert t5g2("verify", lost, "--source", scene / "start", "--frozen", "encoder").code == 0
    assert t5g2("verify", lost, "--source", scene / "start", "--frozen", "tower").code == 2


@pytest.mark.parametrize("kind", ["whole", "inner", "classifier"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_parts_are_extracted_and_verified(kind: str, part: str, scene: Path, t5g2: CommandLine, tmp_path: Path) -> None:
    done = t5g2("extract", scene / kind, tmp_path / "out", "--part", part, "--verify")
    assert done.code == 0, done.err
    assert ("the head of a classifier is left behind" in done.err) == (kind == "classifier")


@pytest.mark.parametrize("kind", ["whole", "inner", "classifier"])
def test_it_is_inspected_run_and_compared(kind: str, scene: Path, t5g2: CommandLine) -> None:
    inspected = json.loads(t5g2("inspect", scene / kind, "--json").out)
    assert (inspected["missing"], inspected["unexpected"]) == ([], [])
    assert t5g2("generate", scene / kind, "--prompt", "hello", "--max-new-tokens", "2").code == 0
    compared = t5g2("compare", scene / "parent", scene / kind, "--text", scene / "text.txt", "--json")
    assert compared.code == 0, compared.err
    assert json.loads(compared.out)["decoder_alone"]["kl"] > 0


def test_its_card_is_made_with_its_start(scene: Path, t5g2: CommandLine) -> None:
    refused = t5g2("card", scene / "whole")
    assert refused.code == 3
    assert "--source" in refused.err
    card = t5g2("card", scene / "whole", "--source", scene / "start")
    assert card.code == 0
    assert "T5Gemma 2, trained elsewhere" in card.out
