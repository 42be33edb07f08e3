"""The commands with --decoder-from and with layer selections."""

import json
from pathlib import Path

import pytest

from tests.cli.commandline import CommandLine
from tests.conftest import TwinFolder


def test_a_pair_is_planned_converted_and_verified(t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, other = twin_folder("text-8"), twin_folder("text-unlike-7")
    options = ["--decoder-from", other, "--embedding-from", "decoder-from", "--encoder-layers", "first:6"]
    options += ["--decoder-layers", "0,2:7:2"]
    planned = t5g2("plan", source, *options)
    assert planned.code == 0, planned.err
    words = " ".join(planned.out.split())
    assert words.startswith("text-8 with the decoder of text-unlike-7: gemma3_text to t5gemma2 ")
    lines = [line.strip() for line in planned.out.splitlines() if "▶" in line]
    (decoder,) = (line for line in lines if "▶ decoder " in line)
    (encoder,) = (line for line in lines if "▶ encoder " in line)
    assert decoder.startswith("53 tensors")
    assert decoder.endswith("53 tensors   the other parent's: merged attention over [decoder states; encoder output]")
    assert encoder.startswith("79 tensors")
    assert encoder.endswith("79 tensors   bidirectional attention")
    assert "the other parent's: one matrix" in planned.out
    document = json.loads(t5g2("plan", source, *options, "--json").out)
    assert document["options"] == {
        "embedding_from": "decoder-from",
        "encoder_layers": [0, 1, 2, 3, 4, 5],
        "decoder_layers": [0, 2, 4, 6],
    }
    assert {role: record["name"] for role, record in document["sources"].items()} == {
        "source": "text-8",
        "decoder_from": "text-unlike-7",
    }
    done = t5g2("convert", source, tmp_path / "out", *options, "--verify")
    assert done.code == 0, done.err
    assert "54 are the decoder's parent's byte for byte" in " ".join(done.out.split())
    judged = t5g2("verify", tmp_path / "out", "--source", source, "--decoder-from", other)
    assert judged.code == 0, judged.err
    assert "the decoder is compared with these of its parent's 7 layers: 0, 2, 4, 6" in judged.err
    assert "the source is computed with the decoder's parent's embedding table" in judged.err


def test_layers_used_by_both_stacks_are_read_once(t5g2: CommandLine, twin_folder: TwinFolder) -> None:
    planned = t5g2("plan", twin_folder("text-8"), "--decoder-layers", "4:6", "--encoder-layers", "0:8:4")
    lines = [line.strip() for line in planned.out.splitlines() if "▶" in line]
    # Layer 4 is layer 1 of the encoder and layer 0 of the decoder; the last norm is shared too.
    assert any(line.startswith("14 tensors") and "─┬─" in line and " encoder " in line for line in lines)
    assert any(line.startswith("13 tensors") and "───────▶ encoder" in line for line in lines)
    assert any(line.startswith("13 tensors") and "───────▶ decoder" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--decoder-layers", "12"], 2, "first:12 for the first 12 layers, 12:13 for only this one"),
        (["--encoder-layers", "3:1"], 2, "--encoder-layers '3:1' selects no layer"),
        (["--encoder-layers", "0,0"], 2, "layer 0 is selected twice"),
        (["--decoder-layers", "-1"], 2, "is not a selection of layers"),
        (["--decoder-layers", "first:9"], 4, "--decoder-layers takes layer 8, the decoder's parent has 8 layers"),
        (["--embedding-from", "decoder-from"], 2, "pass the decoder's parent with --decoder-from"),
        (["--embedding-from", "neither"], 2, "--embedding-from"),
        (["--decoder-from", "nowhere"], 3, "nowhere"),
        (["--decoder-from", "WIDE"], 4, "it has hidden_size 32, not 24"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_impossible_options_are_refused_in_one_line(
    command: str, options: list[str], code: int, says: str, t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    given = [str(twin_folder("donor-wide")) if option == "WIDE" else option for option in options]
    place = [tmp_path / "out"] if command == "convert" else []
    done = t5g2(command, twin_folder("text-8"), *place, *given)
    assert done.code == code, done.err
    assert says in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_verify_asks_for_a_missing_parent(t5g2: CommandLine, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source, other = twin_folder("text-8"), twin_folder("text-sharded")
    assert t5g2("convert", source, tmp_path / "out", "--decoder-from", other).code == 0
    lacking = t5g2("verify", tmp_path / "out", "--source", source)
    assert (lacking.code, lacking.out) == (2, "")
    assert "its decoder is from another checkpoint (pass that checkpoint with --decoder-from)" in lacking.err
    assert "need --source" in t5g2("verify", tmp_path / "out", "--decoder-from", other).err
    wrong = t5g2("verify", tmp_path / "out", "--source", source, "--decoder-from", twin_folder("text-13"))
    assert wrong.code == 6
    # Without a source the files are checked, and the model runs.
    alone = t5g2("verify", tmp_path / "out")
    assert alone.code == 6
    assert "intact, but not compared with its source" in alone.out
