import json
from pathlib import Path

from tests.adaptation.test_sentinel_probe import trained
from tests.cli.commandline import CommandLine
from tests.conftest import TwinFolder


def test_the_ranges_are_shown(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path, t5g2: CommandLine
) -> None:
    output = trained(converted_twin("text-8"), tmp_path / "out", [280, 298, 299])
    shown = t5g2("probe-sentinels", twin_folder("text-8"), output)
    assert shown.code == 0
    assert "300 of 300 rows compared; 297 are exactly equal, 3 moved" in shown.out
    assert "299 down to 298" in shown.out
    assert "neither has a tokenizer.json" in shown.err
    document = json.loads(t5g2("probe-sentinels", twin_folder("text-8"), output, "--json").out)
    assert [item["last"] for item in document["ranges"]] == [299, 280]
    assert document["moved"] == 3
    assert document["premise"]["holds"]
    assert "used rows differ from unused ones: the farthest row moved" in shown.out
    assert t5g2("probe-sentinels", twin_folder("donor-wide"), output).code == 3


def test_no_answer_is_shown_where_the_premise_does_not_hold(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path, t5g2: CommandLine
) -> None:
    output = trained(converted_twin("text-8"), tmp_path / "out", [], drift=0.1)
    for model, reason in (
        (converted_twin("text-8"), "the farthest row did not move: the table was not trained"),
        (output, "to differ from unused rows, the farthest row must move more than"),
    ):
        shown = t5g2("probe-sentinels", twin_folder("text-8"), model)
        assert shown.code == 6
        assert f"t5g2: {model}: no answer: " in shown.err
        assert reason in shown.err
        assert "moved," not in shown.out
        assert "ids that moved" not in shown.out
        shown = t5g2("probe-sentinels", twin_folder("text-8"), model, "--json")
        assert shown.code == 6
        document = json.loads(shown.out)
        assert (document["moved"], document["ranges"], document["premise"]["holds"]) == (None, [], False)
        assert reason in document["premise"]["reason"]
