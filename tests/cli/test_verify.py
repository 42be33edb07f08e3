import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from t5g2convert import convert
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.mapping.library import mappings_folder
from tests.cli.commandline import CommandLine, Result, assert_one_line_error, document, unsafe
from tests.conftest import TwinFolder
from tests.folders import contents

CHECKS = ["integrity", "provenance", "config", "tokenizer", "vision_parity", "decoder_parity", "encoder_parity", "runs"]
HOSTILE = ["<script>alert(1)</script>", "\x1b[31mred\x07", "[bold]markup[/]", "\u202eoverride", "a\nt5g2: line"]


@pytest.fixture(scope="module")
def source(twin_folder: TwinFolder) -> Path:
    return twin_folder("images-8")


@pytest.fixture
def output(converted_twin: TwinFolder, tmp_path: Path) -> Path:
    """Return a conversion of `source` that the test may damage."""
    shutil.copytree(converted_twin("images-8"), tmp_path / "out")
    return tmp_path / "out"


def damage(output: Path, name: str = "model.decoder.layers.5.mlp.gate_proj.weight", value: float = 0.5) -> None:
    tensors = load_file(output / "model.safetensors")
    tensors[name] = tensors[name] + value
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


def add_tensors(folder: Path, names: list[str]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for name in names:
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += bytes(4)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# verify


def test_a_sound_conversion_is_verified(t5g2: CommandLine, source: Path, output: Path) -> None:
    result = t5g2("verify", output, "--source", source)
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert [row[1] for row in rows if row and row[0] == "passed"] == CHECKS
    assert "\nverified in bfloat16 on cpu\n" in result.out
    assert "FAILED" not in result.out


def test_json_is_one_document_and_nothing_else(t5g2: CommandLine, source: Path, output: Path) -> None:
    result = t5g2("verify", output, "--source", source, "--json")
    assert (result.code, result.err) == (0, "")
    found = document(result)
    assert found["passed"] is True
    assert [check["name"] for check in found["checks"]] == CHECKS
    assert all(check.keys() >= {"name", "passed", "detail"} for check in found["checks"])
    assert (found["output"], found["source"]) == (str(output), str(source))
    assert (found["dtype"], found["device"], found["tolerance"]) == ("bfloat16", "cpu", 0.0)


def test_without_a_source_skipped_checks_are_listed(t5g2: CommandLine, output: Path) -> None:
    result = t5g2("verify", output)
    assert (result.code, result.err) == (6, "")
    assert result.out.count("not made") == 6
    assert "intact, but not compared with its source; pass it with --source" in result.out
    assert t5g2("verify", output, "--json").code == 6
    alone = t5g2("verify", output, "--integrity-only", "--json")
    assert alone.code == 0
    found = document(alone)
    assert [check["name"] for check in found["checks"]] == ["integrity", "runs"]
    assert found["source"] is None


def test_swapped_arguments_are_recognised(t5g2: CommandLine, source: Path, output: Path) -> None:
    result = t5g2("verify", source, "--source", output)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"the output and --source are swapped: {source} is a gemma3" in result.err
    assert f"t5g2 verify {output} --source {source}" in result.err


def test_integrity_only_takes_no_source(t5g2: CommandLine, source: Path, output: Path) -> None:
    assert_one_line_error(t5g2("verify", output, "--source", source, "--integrity-only"), 2)


def test_remarks_go_to_stderr_and_into_the_json(t5g2: CommandLine, source: Path, output: Path) -> None:
    plain = t5g2("verify", output, "--source", source, "--dtype", "float32")
    assert plain.code == 0
    assert plain.err.startswith("note: the end-of-image token was left out")
    assert "verified in float32 on cpu" in plain.out
    result = t5g2("verify", output, "--source", source, "--dtype", "float32", "--json")
    assert result.err == ""
    assert f"note: {document(result)['remarks'][0]}\n" == plain.err


def test_a_faulty_conversion_is_exit_6(t5g2: CommandLine, source: Path, output: Path) -> None:
    damage(output)
    result = t5g2("verify", output, "--source", source)
    assert result.code == 6
    assert re.findall(r"FAILED\s+(\w+)", result.out) == ["integrity", "provenance", "decoder_parity"]
    assert "layers.5 (full_attention), mlp.gate_proj" in result.out
    assert "\nnot verified in bfloat16 on cpu\n" in result.out
    as_json = t5g2("verify", output, "--source", source, "--json")
    assert (as_json.code, as_json.err) == (6, "")
    found = document(as_json)
    assert found["passed"] is False
    assert [check["name"] for check in found["checks"] if not check["passed"]] == [
        "integrity",
        "provenance",
        "decoder_parity",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_of_a_model_that_is_not_finite_is_json(
    value: float, t5g2: CommandLine, source: Path, output: Path
) -> None:
    damage(output, value=value)
    result = t5g2("verify", output, "--source", source, "--json")
    assert result.code == 6
    assert "decoder_parity" in [check["name"] for check in document(result)["checks"] if not check["passed"]]
    assert t5g2("verify", output, "--source", source).code == 6


@pytest.mark.parametrize("options", [[], ["--json"], ["--debug"]])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["MISSING"], 3),
        (["FILE", "--source", "SOURCE"], 3),
        (["OUTPUT", "--source", "MISSING"], 3),
        (["OUTPUT", "--source", "OUTPUT"], 3),
        (["OUTPUT", "--source", "SOURCE", "--mapping", "nope"], 4),
        (["OUTPUT", "--source", "SOURCE", "--tolerance", "1"], 2),
        (["OUTPUT", "--source", "SOURCE", "--tolerance", "-1e-3"], 2),
        (["OUTPUT", "--source", "SOURCE", "--tolerance", "nan"], 2),
        (["OUTPUT", "--source", "SOURCE", "--tolerance", "much"], 2),
        (["OUTPUT", "--source", "SOURCE", "--dtype", "int8"], 2),
        (["OUTPUT", "--source", "SOURCE", "--dtype", ""], 2),
        (["OUTPUT", "--source", "SOURCE", "--device", "tpu"], 2),
        (["OUTPUT", "--source", "SOURCE", "--image", "FILE"], 2),
        (["OUTPUT", "--source", "SOURCE", "--image", "MISSING"], 2),
        (["OUTPUT", "SOURCE"], 2),
        ([], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_errors_have_their_own_exit_codes(
    arguments: list[str], code: int, options: list[str], t5g2: CommandLine, source: Path, output: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    places = {"OUTPUT": output, "SOURCE": source, "MISSING": tmp_path / "missing", "FILE": tmp_path / "file"}
    before = contents(output)
    result = t5g2("verify", *(places.get(item, item) for item in arguments), *options)
    assert result.code == code, result.err
    assert "a bug in t5g2" not in result.err
    if options == ["--json"]:
        assert result.error["code"] == code
    else:
        assert result.out == ""
    if not options:
        assert_one_line_error(result, code)
    assert contents(output) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_is_exit_2(t5g2: CommandLine, source: Path, output: Path) -> None:
    before = contents(output)
    assert_one_line_error(t5g2("verify", output, "--source", source, "--device", "cuda"), 2)
    assert contents(output) == before


def test_no_record_leaves_the_manifest(t5g2: CommandLine, source: Path, output: Path) -> None:
    before = contents(output)
    assert t5g2("verify", output, "--source", source, "--no-record").code == 0
    assert contents(output) == before
    assert t5g2("verify", output, "--source", source).code == 0
    assert read_manifest(output).document()["verification"]["passed"] is True
    assert t5g2("verify", output, "--source", source, "--record").code == 0


# Reports


def test_junit_has_every_check(t5g2: CommandLine, source: Path, output: Path, tmp_path: Path) -> None:
    damage(output)
    assert t5g2("verify", output, "--source", source, "--junit", tmp_path / "x.xml").code == 6
    suite = ElementTree.parse(tmp_path / "x.xml").getroot()
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "8", "failures": "3", "errors": "0", "skipped": "0"}
    assert [case.get("name") for case in suite.findall("testcase")] == CHECKS
    assert t5g2("verify", output, "--junit", tmp_path / "x.xml").code == 6
    suite = ElementTree.parse(tmp_path / "x.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("8", "1", "6")


def test_html_loads_nothing_and_has_a_plot_for_every_parity(
    t5g2: CommandLine, source: Path, output: Path, tmp_path: Path
) -> None:
    assert t5g2("verify", output, "--source", source, "--html", tmp_path / "x.html").code == 0
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|<img|<iframe|\bsrc=|\bhref=|url\(|@import", text)
    assert text.count("<svg") == text.count("</svg>") == 3
    for check in CHECKS:
        assert check in text
    assert "10 of 10 stages equal" in text


def test_reports_are_written_in_addition_to_the_json(
    t5g2: CommandLine, source: Path, output: Path, tmp_path: Path
) -> None:
    html, junit = tmp_path / "x.html", tmp_path / "x.xml"
    result = t5g2("verify", output, "--source", source, "--html", html, "--junit", junit, "--json")
    assert document(result)["passed"] is True
    assert html.stat().st_size > 1000
    assert junit.stat().st_size > 500


@pytest.mark.parametrize("option", ["--junit", "--html"])
def test_a_report_that_cannot_be_written_is_exit_5(
    option: str, t5g2: CommandLine, source: Path, output: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing/report"):
        assert_one_line_error(t5g2("verify", output, "--source", source, option, path), 5)
        as_json = t5g2("verify", output, "--source", source, option, path, "--json")
        assert (as_json.code, as_json.error["code"], as_json.error["where"]) == (5, 5, str(path))


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--source", "nowhere"], 3), (["--dtype", "int3"], 2), (["--tolerance", "2"], 2)]
)
def test_O13_reports_stay_unchanged_when_there_is_nothing_to_report(
    t5g2: CommandLine, output: Path, tmp_path: Path, arguments: list[str], code: int
) -> None:
    (tmp_path / "x.xml").write_text("the last report")
    options = ["--junit", tmp_path / "x.xml", "--html", tmp_path / "x.html"]
    assert t5g2("verify", output, *arguments, *options).code == code
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {
        "x.xml": "the last report"
    }


def test_O13_a_report_that_fails_halfway_leaves_the_last_one(
    t5g2: CommandLine, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.xml"
    path.write_text("the last report")
    fsync = os.fsync

    def full(fd: int) -> None:
        if os.fstat(fd).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    result = t5g2("verify", output, "--no-record", "--junit", path)
    assert (result.code, result.err) == (5, f"t5g2: {path}: cannot be written: No space left on device\n")
    assert {item.name: item.read_text() for item in tmp_path.iterdir() if item.is_file()} == {
        "x.xml": "the last report"
    }


def test_a_report_keeps_its_mode_and_its_link_and_may_be_a_device(
    t5g2: CommandLine, output: Path, tmp_path: Path
) -> None:
    (tmp_path / "real.html").touch(0o600)
    (tmp_path / "x.html").symlink_to("real.html")
    assert t5g2("verify", output, "--integrity-only", "--html", tmp_path / "x.html", "--junit", "/dev/null").code == 0
    assert (tmp_path / "x.html").is_symlink()
    assert (tmp_path / "real.html").stat().st_mode & 0o777 == 0o600
    assert "</html>" in (tmp_path / "real.html").read_text()
    assert not Path("/dev/null").is_file()


def test_a_report_replaces_no_model_file_and_no_other_report(t5g2: CommandLine, output: Path, tmp_path: Path) -> None:
    before = (output / "config.json").read_bytes()
    assert_one_line_error(t5g2("verify", output, "--junit", output / "config.json"), 5)
    assert_one_line_error(t5g2("verify", output, "--html", output / "more.txt"), 2)
    assert_one_line_error(t5g2("verify", output, "--html", tmp_path / "x", "--junit", tmp_path / "x"), 2)
    assert (output / "config.json").read_bytes() == before


# Text from outside


def test_hostile_tensor_names_reach_no_terminal_and_no_page(
    t5g2: CommandLine, source: Path, output: Path, tmp_path: Path
) -> None:
    add_tensors(output, HOSTILE)
    html, junit = tmp_path / "x.html", tmp_path / "x.xml"
    result = t5g2("verify", output, "--source", source, "--html", html, "--junit", junit)
    assert result.code == 6
    assert unsafe(result.out + result.err) == set()
    assert "t5g2: line" not in [line.strip() for line in result.out.splitlines()]
    ElementTree.parse(junit)
    assert unsafe(junit.read_text(encoding="utf-8")) == set()
    text = html.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert unsafe(text) == set()
    found = document(t5g2("verify", output, "--source", source, "--json"))
    offenders = [line for check in found["checks"] for line in check.get("offenders", ())]
    for name in HOSTILE:
        assert any(name in line for line in offenders)


@pytest.mark.parametrize("name", [*HOSTILE, os.fsdecode(b"latin-\xfc")], ids=ascii)
def test_hostile_paths_reach_no_terminal_and_no_page(
    name: str, t5g2: CommandLine, source: Path, output: Path, tmp_path: Path
) -> None:
    odd = tmp_path / name.replace("/", "_")
    output.rename(odd)
    html, junit = tmp_path / "x.html", tmp_path / "x.xml"
    result = t5g2("verify", odd, "--source", source, "--html", html, "--junit", junit)
    assert result.code == 0, result.err
    assert unsafe(result.out + result.err) == set()
    ElementTree.parse(junit)
    text = html.read_text(encoding="utf-8")
    assert "<script" not in text
    assert unsafe(text) == set()
    (odd / "config.json").write_text("{}")
    failed = t5g2("verify", odd, "--source", source, "--html", html, "--junit", junit)
    assert failed.code == 6, failed.err
    assert unsafe(failed.out + failed.err) == set()
    assert read_manifest(odd).document()["verification"]["passed"] is False


# convert --verify


@pytest.fixture
def swapped(tmp_path: Path) -> Path:
    """Write a map that loads, but swaps two tensors of the decoder."""
    content = yaml.safe_load((mappings_folder() / "gemma3.yaml").read_text())
    rows = {row["from"]: row["to"] for row in content["weights"] if "from" in row}
    one, other = (rows[f"{{text}}layers.{{layer}}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    one["decoder"], other["decoder"] = other["decoder"], one["decoder"]
    path = tmp_path / "swapped.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


Swap = Callable[..., Result]


def files_next_to(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_convert_verify_records_the_result(t5g2: CommandLine, source: Path, tmp_path: Path) -> None:
    result = t5g2("convert", source, tmp_path / "out", "--verify")
    assert (result.code, result.err) == (0, "note: the source has no tokenizer.json: the output cannot tokenize text\n")
    for check in CHECKS:
        assert f" {check} " in result.out
    assert "verified in bfloat16 on cpu" in result.out
    assert f"to {tmp_path / 'out'} in " in result.out
    recorded = read_manifest(tmp_path / "out").document()["verification"]
    assert recorded["passed"] is True
    assert [check["name"] for check in recorded["checks"]] == CHECKS
    assert files_next_to(tmp_path) == ["out"]
    assert t5g2("verify", tmp_path / "out", "--source", source).code == 0


def test_convert_verify_json_is_one_document(t5g2: CommandLine, source: Path, tmp_path: Path) -> None:
    result = t5g2("convert", source, tmp_path / "out", "--verify", "--json")
    assert (result.code, result.err) == (0, "")
    found = document(result)
    assert found["output"] == found["verification"]["output"] == str(tmp_path / "out")
    assert found["verification"]["passed"] is True
    assert found["verification"]["source"] == str(source)
    assert "verification" not in document(t5g2("convert", source, tmp_path / "plain", "--json"))


def test_O8_verified_conversions_of_the_same_input_are_byte_identical(
    t5g2: CommandLine, source: Path, tmp_path: Path
) -> None:
    for name in ("one", "elsewhere/two"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert t5g2("convert", source, tmp_path / name, "--verify").code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "elsewhere/two")
    t5g2("convert", source, tmp_path / "three")
    assert t5g2("verify", tmp_path / "three", "--source", source).code == 0
    assert t5g2("card", tmp_path / "three", "--write").code == 0
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convert_verify_of_a_cast_notes_it(dtype: str, t5g2: CommandLine, source: Path, tmp_path: Path) -> None:
    result = t5g2("convert", source, tmp_path / "out", "--verify", "--dtype", dtype)
    assert result.code == 0, result.out
    # float16 may overflow although the weights do not: verify uses float32.
    assert "verified in float32 on cpu" in result.out
    assert "cast from bfloat16" in result.err


def test_a_failed_verification_leaves_no_output(t5g2: CommandLine, source: Path, swapped: Path, tmp_path: Path) -> None:
    before = files_next_to(tmp_path)
    result = t5g2("convert", source, tmp_path / "out", "--mapping", swapped, "--verify")
    assert result.code == 6
    assert result.out == ""
    assert result.err.startswith("t5g2: ")
    assert "decoder_parity" in result.err
    assert "layers.0" in result.err
    assert files_next_to(tmp_path) == before
    as_json = t5g2("convert", source, tmp_path / "out", "--mapping", swapped, "--verify", "--json")
    assert as_json.code == as_json.error["code"] == 6
    assert as_json.error["where"] == str(tmp_path / "out")
    assert any(detail.startswith("decoder_parity: ") for detail in as_json.error["details"])
    assert files_next_to(tmp_path) == before
    assert t5g2("convert", source, tmp_path / "out", "--mapping", swapped).code == 0


def test_a_failed_verification_keeps_the_older_output(
    t5g2: CommandLine, source: Path, swapped: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", flush=False)
    before = contents(tmp_path / "out")
    result = t5g2("convert", source, tmp_path / "out", "--mapping", swapped, "--verify", "--overwrite")
    assert result.code == 6
    assert contents(tmp_path / "out") == before
    assert files_next_to(tmp_path) == ["out", "swapped.yaml"]
    assert t5g2("convert", source, tmp_path / "out", "--verify", "--overwrite", "--dtype", "float32").code == 0
    assert contents(tmp_path / "out") != before
    assert files_next_to(tmp_path) == ["out", "swapped.yaml"]
