import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from t5g2convert.checkpoint.header import read_header
from t5g2convert.conversion.output.recovery import JOURNAL_FILE, STAGING_SUFFIX
from t5g2convert.errors import Interrupted
from t5g2convert.mapping.library import mappings_folder
from t5g2convert.version import __version__
from tests.cli.commandline import CommandLine, Result, unsafe
from tests.folders import OLD, write_old
from tests.processes.forked import run_t5g2

HOSTILE: Final = {
    "ansi": "\x1b[31mred",
    "control": "bell\x07\rback\x08",
    "c1": "\x9b31mred",
    "newline": "first\nt5g2: second",
    "bidi": "\u202eoverride",
    "title": "\x1b]0;title\x07",
}
"""Text with terminal escapes, or that looks like a line of ours."""

MARKUP: Final = ["[bold]x", "[/]", "[link=https://example.org]y", ":smile:"]


def assert_one_line_error(result: Result, code: int) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.startswith("t5g2: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1


def rewrite_names(folder: Path, names: dict[str, str], extra: tuple[str, ...] = ()) -> None:
    """Rename tensors of a single-file checkpoint, and add tensors of one float32 each."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    header = {names.get(name, name): entry for name, entry in header.items()}
    for name in extra:
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += bytes(4)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "t5g2" in path.name)


# Usage


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--nope", "SOURCE"], "--nope"),
        (["nope"], "nope"),
        (["plan"], "source"),
        (["convert", "SOURCE"], "output"),
        (["inspect", "SOURCE", "another"], "another"),
        (["mappings", "nope"], "nope"),
        (["mappings", "show"], "name"),
        (["convert", "SOURCE", "OUTPUT", "--mapping"], "--mapping"),
        (["plan", "SOURCE", "--dtype", "int8"], "int8"),
        (["plan", "SOURCE", "--dtype", ""], "keep"),
        (["convert", "SOURCE", "OUTPUT", "--dtype", "BF16"], "BF16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_exit_2(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    places = {"SOURCE": str(demo_source), "OUTPUT": str(tmp_path / "out")}
    result = t5g2(*(places.get(item, item) for item in arguments))
    assert_one_line_error(result, 2)
    assert says.lower() in result.err.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["0", "0.4", "-1", "", "lots", "5XB", "1e9", "1,5GB", "nan", "GB", "9" * 400 + "GB"])
def test_an_invalid_size_is_exit_2(t5g2: CommandLine, demo_source: Path, tmp_path: Path, size: str) -> None:
    for command in (["plan", demo_source], ["convert", demo_source, tmp_path / "out"]):
        assert_one_line_error(t5g2(*command, "--max-shard-size", size), 2)
    assert not (tmp_path / "out").exists()


def test_without_a_command_the_help_can_be_read(t5g2: CommandLine) -> None:
    for arguments, title in (([], "Convert:"), (["mappings"], "Commands:")):
        result = t5g2(*arguments)
        assert result.code in (0, 2)
        assert title in [line.strip(" ╭─╮") for line in (result.out + result.err).splitlines()]


# Bad checkpoints


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)


def _cut_in_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def _lfs(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 490610\n"
    (folder / "model.safetensors").write_text(text)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def _other_family(folder: Path) -> None:
    set_config(folder, model_type="gemma4")


def _endless_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


BAD_CHECKPOINTS: Final = {
    "gone": (_gone, "no such folder"),
    "a-file": (_a_file, "is a file"),
    "endless-link": (_endless_link, "demo-source"),
    "no-config": (_no_config, "config.json"),
    "no-weights": (_no_weights, "model.safetensors"),
    "other-family": (_other_family, "Gemma 4"),
    "truncated": (_cut, "found"),
    "truncated-in-header": (_cut_in_header, "found 100"),
    "git-lfs": (_lfs, "git lfs pull"),
}


@pytest.mark.parametrize("damage", BAD_CHECKPOINTS)
@pytest.mark.parametrize("command", ["inspect", "plan", "convert"])
def test_a_bad_checkpoint_is_exit_3(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, command: str, damage: str
) -> None:
    break_it, says = BAD_CHECKPOINTS[damage]
    break_it(demo_source)
    output = [tmp_path / "out"] if command == "convert" else []
    result = t5g2(command, demo_source, *output)
    assert_one_line_error(result, 3)
    assert says in result.err
    assert str(demo_source) in result.err
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("command", ["inspect", "plan", "convert"])
def test_a_source_name_that_is_too_long_is_exit_3(t5g2: CommandLine, tmp_path: Path, command: str) -> None:
    output = [tmp_path / "out"] if command == "convert" else []
    assert_one_line_error(t5g2(command, tmp_path / ("x" * 300), *output), 3)


def test_a_t5gemma2_folder_can_be_inspected_but_not_converted(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    assert t5g2("convert", demo_source, tmp_path / "out").code == 0
    assert t5g2("inspect", tmp_path / "out").code == 0
    result = t5g2("plan", tmp_path / "out")
    assert_one_line_error(result, 3)
    assert "T5Gemma 2, an encoder-decoder already" in result.err


def test_many_offenders_are_cut_for_people_and_complete_for_scripts(t5g2: CommandLine, demo_source: Path) -> None:
    names = [f"stranger.{number}" for number in range(30)]
    rewrite_names(demo_source, {}, tuple(names))
    result = t5g2("plan", demo_source)
    assert result.code == 3
    assert result.out == ""
    lines = result.err.splitlines()
    assert lines[0].startswith("t5g2: ")
    assert len(lines) == 22
    assert all(line.startswith("  ") for line in lines[1:])
    assert "10 more; --json lists all" in lines[-1]
    details = t5g2("plan", demo_source, "--json").error["details"]
    assert all(any(name in detail for detail in details) for name in names)


# Bad maps


def test_a_bad_map_is_exit_4(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    assert_one_line_error(t5g2("mappings", "show", "gemma4"), 4)
    assert_one_line_error(t5g2("plan", demo_source, "--mapping", tmp_path / "none.yaml"), 4)
    assert_one_line_error(t5g2("convert", demo_source, tmp_path / "out", "--mapping", "gemma"), 4)
    assert "did you mean gemma3?" in t5g2("mappings", "check", "gema3").err
    assert not (tmp_path / "out").exists()


def test_a_fault_in_a_map_is_shown_with_its_place_and_a_caret(t5g2: CommandLine, tmp_path: Path) -> None:
    text = (mappings_folder() / "gemma3.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("merged_attention: true", "merged_atention: true", 1))
    line = 1 + path.read_text().splitlines().index("    merged_atention: true")
    result = t5g2("mappings", "check", path)
    assert result.code == 4
    assert result.out == ""
    assert result.err.splitlines() == [
        f"t5g2: {path}:{line}:5: unknown key 'merged_atention'",
        "      merged_atention: true",
        "      ^ (did you mean merged_attention?)",
    ]


def test_a_map_that_does_not_fill_the_target_is_exit_4(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    document = yaml.safe_load((mappings_folder() / "gemma3.yaml").read_text())
    document["weights"] = [row for row in document["weights"] if "scaled_row" not in (row.get("op") or {})]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    assert t5g2("mappings", "check", path).code == 0
    for arguments in (["plan", demo_source, "--mapping", path], ["mappings", "check", path, "--against", demo_source]):
        result = t5g2(*arguments)
        assert result.code == 4
        assert result.out == ""
        assert "model.encoder.embed_tokens.eoi_embedding" in result.err


# Bad outputs


def test_O1_an_output_that_is_not_empty_is_exit_5(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    result = t5g2("convert", demo_source, output)
    assert_one_line_error(result, 5)
    assert "not empty" in result.err
    assert "--overwrite" in result.err
    assert (output / "mine.txt").read_text() == "keep"
    assert t5g2("demo", "--out", tmp_path).code == 0, "the demo writes to folders of its own"
    assert_one_line_error(t5g2("demo", "--out", tmp_path), 5)


def test_O1_an_output_that_is_a_file_is_exit_5_even_with_overwrite(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("keep")
    for options in ([], ["--overwrite"]):
        assert_one_line_error(t5g2("convert", demo_source, tmp_path / "out", *options), 5)
        assert_one_line_error(t5g2("convert", demo_source, tmp_path / "out/below", *options), 5)
    assert (tmp_path / "out").read_text() == "keep"


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["new", "overwrite"])
@pytest.mark.parametrize("through_link", [False, True], ids=["plain", "link"])
@pytest.mark.parametrize("relation", ["equal", "inside", "deep-inside", "around"])
def test_O1_an_output_that_touches_the_source_is_exit_5(
    t5g2: CommandLine, tmp_path: Path, demo_source: Path, relation: str, through_link: bool, options: list[str]
) -> None:
    source = tmp_path / "models/gemma"
    source.parent.mkdir()
    demo_source.rename(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    base = tmp_path / "models"
    if through_link:
        (tmp_path / "link").symlink_to(base)
        base = tmp_path / "link"
    below = {"equal": "gemma", "inside": "gemma/out", "deep-inside": "gemma/a/b", "around": ""}[relation]
    result = t5g2("convert", source, base / below, *options)
    assert_one_line_error(result, 5)
    assert "source" in result.err
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert leftovers(tmp_path) == leftovers(source.parent) == []


def test_O1_a_broken_link_is_exit_5(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "endless").symlink_to(tmp_path / "endless")
    for name in ("dangling", "endless"):
        assert_one_line_error(t5g2("convert", demo_source, tmp_path / name), 5)
        assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("length", [250, 300])
def test_an_output_name_that_is_too_long_is_exit_5(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, length: int
) -> None:
    result = t5g2("convert", demo_source, tmp_path / ("x" * length))
    assert_one_line_error(result, 5)
    assert "too long" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["demo-source"]


# The form of errors


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_an_error_with_json_is_one_document_on_stdout(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, code: int
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    arguments: list[str | Path] = {
        2: ["plan", demo_source, "--nope"],
        3: ["inspect", tmp_path / "nothing"],
        4: ["mappings", "show", "gemma4"],
        5: ["convert", demo_source, tmp_path / "full"],
    }[code]
    plain, result = t5g2(*arguments), t5g2(*arguments, "--json")
    assert result.code == plain.code == code
    assert result.err == plain.err
    assert json.loads(result.out).keys() == {"error"}
    assert list(result.error) == ["code", "message", "where", "hint", "details"]
    assert result.error["code"] == code
    assert result.error["message"] in result.err
    assert result.error["details"] == []
    where = {2: None, 3: str(tmp_path / "nothing"), 4: None, 5: str(tmp_path / "full")}
    assert result.error["where"] == where[code]
    assert result.error["hint"] in result.err


def test_debug_adds_the_traceback_before_the_line(t5g2: CommandLine, tmp_path: Path) -> None:
    plain = t5g2("inspect", tmp_path / "nothing")
    assert "Traceback" not in plain.err
    result = t5g2("inspect", tmp_path / "nothing", "--debug")
    assert result.code == 3
    assert result.out == ""
    assert result.err.startswith("Traceback")
    assert "CheckpointError" in result.err
    assert result.err.endswith(plain.err)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["plain", "json"])
def test_an_unexpected_exception_is_a_bug_and_exit_1(
    t5g2: CommandLine, demo_source: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    def fail(path: Path, **_: object) -> None:
        raise ZeroDivisionError("by \x1b[31mzero")

    monkeypatch.setattr("t5g2convert.mapping.inspection.open_source", fail)
    result = t5g2("inspect", demo_source, *options)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert result.err.startswith("t5g2: a bug in t5g2: ZeroDivisionError: by \\x1b[31mzero")
    assert "--debug" in result.err
    if options:
        assert result.error["code"] == 1
    else:
        assert result.out == ""


# Text from outside


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tensor_name_is_escaped(t5g2: CommandLine, demo_source: Path, name: str) -> None:
    rewrite_names(demo_source, {}, (name,))
    escaped = name.encode("unicode_escape").decode()
    for arguments in (["inspect", demo_source], ["inspect", demo_source, "--tensors"]):
        result = t5g2(*arguments)
        assert result.code == 0
        assert not unsafe(result.out + result.err)
        assert f"unexpected: {escaped}\n" in result.out
    result = t5g2("plan", demo_source)
    assert result.code == 3
    assert not unsafe(result.out + result.err)
    assert escaped in result.err
    assert len(result.err.splitlines()) == 2, "the error and its one offender"


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_that_an_error_quotes_is_escaped(t5g2: CommandLine, demo_source: Path, name: str) -> None:
    (demo_source / "model.safetensors").rename(demo_source / "one.safetensors")
    index = {name: "one.safetensors"}
    (demo_source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for options in ([], ["--debug"]):
        result = t5g2("inspect", demo_source, *options)
        assert result.code == 3
        assert name.encode("unicode_escape").decode() in result.err
        assert not unsafe(result.out + result.err)
        if not options:
            assert result.err.count("\n") == 1


@pytest.mark.parametrize("name", MARKUP)
def test_markup_in_a_name_is_shown_as_it_is(t5g2: CommandLine, demo_source: Path, tmp_path: Path, name: str) -> None:
    rewrite_names(demo_source, {}, (name,))
    folder = tmp_path / name.replace("/", "|")
    demo_source.rename(folder)
    result = t5g2("inspect", folder, "--tensors")
    assert result.code == 0
    assert f"unexpected: {name}\n" in result.out
    assert any(line.startswith(f" {name} ") for line in result.out.splitlines())
    assert folder.name in result.out
    result = t5g2("plan", folder)
    assert result.code == 3
    assert name in result.err


@pytest.mark.sampled
@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_folder_name_is_escaped(t5g2: CommandLine, demo_source: Path, tmp_path: Path, name: str) -> None:
    escaped = name.encode("unicode_escape").decode()
    source = tmp_path / name
    demo_source.rename(source)
    good = [
        ["inspect", source],
        ["plan", source, "--tensors"],
        ["mappings", "check", "gemma3", "--against", source],
        ["convert", source, tmp_path / f"{name}-out"],
    ]
    for arguments in good:
        result = t5g2(*arguments)
        assert result.code == 0
        assert not unsafe(result.out + result.err)
        assert escaped in result.out
    for arguments in (["inspect", source / "nothing"], ["convert", source, source], ["plan", source, f"--{name}"]):
        result = t5g2(*arguments)
        assert result.code in (2, 3, 5)
        assert not unsafe(result.out + result.err)
        assert result.err.count("\n") == 1


@pytest.mark.sampled
@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_folder_name_of_the_demo_is_escaped(t5g2: CommandLine, tmp_path: Path, name: str) -> None:
    result = t5g2("demo", "--out", tmp_path / name)
    assert result.code == 0
    assert not unsafe(result.out + result.err)
    assert name.encode("unicode_escape").decode() in result.out


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_string_is_escaped(t5g2: CommandLine, demo_source: Path, value: str) -> None:
    set_config(demo_source, model_type=value)
    result = t5g2("inspect", demo_source)
    assert_one_line_error(result, 3)
    assert not unsafe(result.err)


@pytest.mark.parametrize("key", ["because", "title", "spelling", "from"])
def test_a_hostile_map_is_escaped(t5g2: CommandLine, tmp_path: Path, key: str) -> None:
    document = yaml.safe_load((mappings_folder() / "gemma3.yaml").read_text())
    document["drop"][0]["because"] += "\x1b[31m" * (key == "because")
    document["title"] += "\x1b[31m" * (key == "title")
    document["roots"]["text"] += ["\x1b[31m"] * (key == "spelling")
    document["drop"][0]["from"] += "\x1b[31m" * (key == "from")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    result = t5g2("mappings", "show", path)
    assert result.code == 0
    assert "x1b[31m" in result.out
    assert not unsafe(result.out + result.err)


def test_json_holds_hostile_names_exactly(t5g2: CommandLine, demo_source: Path) -> None:
    rewrite_names(demo_source, {}, tuple(HOSTILE.values()))
    result = t5g2("inspect", demo_source, "--json")
    assert result.out.isascii()
    assert not unsafe(result.out)
    assert set(json.loads(result.out)["unexpected"]) == set(HOSTILE.values())


# The process


def test_version() -> None:
    run = run_t5g2("--version")
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{__version__}\n", "")


def test_the_command_and_the_module_are_the_same(demo_source: Path) -> None:
    script = Path(sys.executable).with_name("t5g2")
    one = subprocess.run([script, "inspect", demo_source, "--json"], capture_output=True, text=True, check=True)
    other = run_t5g2("inspect", demo_source, "--json")
    assert json.loads(one.stdout) == json.loads(other.stdout)
    assert one.stderr == other.stderr == ""


def test_help_names_every_command_and_is_plain_text() -> None:
    run = run_t5g2("--help")
    assert run.returncode == 0
    assert run.stderr == ""
    for command in ("demo", "inspect", "plan", "convert", "mappings"):
        assert f"\n  {command} " in run.stdout
    assert not unsafe(run.stdout)


@pytest.mark.sampled
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["plan", "mappings"])
def test_a_terminal_without_unicode_gets_an_answer(demo_source: Path, command: str, encoding: str) -> None:
    arguments = ["mappings", "show", "gemma3"] if command == "mappings" else [command, str(demo_source)]
    run = subprocess.run(
        [sys.executable, "-m", "t5g2convert", *arguments],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        encoding=encoding,
    )
    assert run.stderr == ""
    assert run.returncode == 0


def run_without_reader(*arguments: str | Path, unbuffered: bool) -> subprocess.CompletedProcess[str]:
    """Run with a stdout that its reader has closed."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, *["-u"] * unbuffered, "-m", "t5g2convert", *map(str, arguments)],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(writing)


@pytest.mark.sampled
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("options", [["--tensors"], ["--tensors", "--json"], []], ids=" ".join)
def test_a_reader_that_closes_early_is_not_an_error(demo_source: Path, options: list[str], unbuffered: bool) -> None:
    run = run_without_reader("plan", demo_source, *options, unbuffered=unbuffered)
    assert run.stderr == ""
    assert run.returncode == 0, "1 is a bug in this tool"


@pytest.mark.sampled
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_an_error_without_a_reader_keeps_its_code(tmp_path: Path, unbuffered: bool) -> None:
    run = run_without_reader("inspect", tmp_path / "nothing", "--json", unbuffered=unbuffered)
    assert run.stderr.startswith("t5g2: ")
    assert run.stderr.count("\n") == 1
    assert run.returncode == 3


def test_head_gets_its_line(demo_source: Path) -> None:
    line = f"{sys.executable} -m t5g2convert plan {demo_source} --tensors | head -1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout.startswith("demo-source: gemma3 to t5gemma2")
    assert run.stdout.count("\n") == 1
    assert run.stderr == ""


# Signals

SLOW_WRITES: Final = """
import os, sys, time
import tests.processes.small_shards
from t5g2convert.cli.main import main
from t5g2convert.conversion.write import shards

pwrite = shards.os.pwrite

def slow(*arguments):
    time.sleep(0.1)
    return pwrite(*arguments)

shards.os.pwrite = slow
main(sys.argv[1:])
"""

STUCK_CLEANING: Final = """
import shutil, sys, time
from pathlib import Path

marker = Path(sys.argv.pop(1))

def stuck(*arguments, **options):
    marker.touch()
    time.sleep(3600)

shutil.rmtree = stuck
"""


def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


SIGNALS: Final = [pytest.param(signal.SIGINT, 130, id="SIGINT"), pytest.param(signal.SIGTERM, 143, id="SIGTERM")]


@pytest.mark.sampled
@pytest.mark.parametrize("options", [[], ["--no-hash"], ["--json"]], ids=["hash", "no-hash", "json"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_O3_a_signal_removes_everything(
    demo_source: Path, tmp_path: Path, number: signal.Signals, code: int, options: list[str]
) -> None:
    output = tmp_path / "new/folder/out"
    with start(SLOW_WRITES, "convert", demo_source, output, *options) as process:
        wait_for(output.with_name(f".out{STAGING_SUFFIX}") / "model.safetensors", process)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert err == f"t5g2: stopped by signal {int(number)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["demo-source"]
    if "--json" in options:
        assert json.loads(out)["error"]["code"] == code
    else:
        assert out == ""


@pytest.mark.sampled
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_O3_a_signal_leaves_the_old_folder_as_it_was(
    demo_source: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "out"
    write_old(output)
    with start(SLOW_WRITES, "convert", demo_source, output, "--overwrite") as process:
        wait_for(tmp_path / f".out{STAGING_SUFFIX}" / "model.safetensors", process)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"demo-source", "out"}
    assert {path.name for path in output.rglob("*") if path.is_file()} == {Path(name).name for name in OLD}


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_O3_a_signal_wrapped_in_another_error_is_still_a_signal(
    t5g2: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """Python wraps exceptions raised while it builds a class."""

    def built(*_: object, **__: object) -> None:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
        raise RuntimeError("Error calling __set_name__")

    monkeypatch.setattr("t5g2convert.mapping.inspection.inspect", built)
    result = t5g2("inspect", tmp_path)
    assert (result.code, result.err) == (code, f"t5g2: stopped by signal {int(number)}\n")
    monkeypatch.setattr("t5g2convert.mapping.inspection.inspect", lambda *_, **__: 1 // 0)
    assert "a bug in t5g2: ZeroDivisionError" in t5g2("inspect", tmp_path).err


@pytest.mark.parametrize("wrapped", [False, True], ids=["its own", "wrapped"])
@pytest.mark.parametrize(
    ("loads", "option"), [("tokenizers.Tokenizer.from_file", "--text"), ("PIL.Image.open", "--image")]
)
def test_O3_a_signal_while_a_library_loads_a_file_is_not_the_files_fault(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    loads: str, option: str, wrapped: bool,
) -> None:  # fmt: skip
    def load(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Interrupted as error:
            if wrapped:
                raise RuntimeError("the library says that it was stopped") from error
            raise

    assert t5g2("convert", demo_source, tmp_path / "out").code == 0
    (tmp_path / "given").write_text("a text")
    monkeypatch.setattr(loads, load)
    result = t5g2("verify", tmp_path / "out", "--source", demo_source, option, tmp_path / "given")
    assert (result.code, result.err) == (130, "t5g2: stopped by signal 2\n")


@pytest.mark.sampled
def test_O3_a_second_signal_ends_the_process_at_once(demo_source: Path, tmp_path: Path) -> None:
    marker = tmp_path / "cleaning"
    with start(STUCK_CLEANING + SLOW_WRITES, marker, "convert", demo_source, tmp_path / "out") as process:
        wait_for(tmp_path / f".out{STAGING_SUFFIX}" / "model.safetensors", process)
        process.send_signal(signal.SIGINT)
        wait_for(marker, process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_O3_with_resume_a_signal_keeps_finished_shards_and_the_next_run_continues(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    options = ["--max-shard-size", "60kB", "--resume"]
    t5g2("convert", demo_source, tmp_path / "whole", "--max-shard-size", "60kB")
    with start(SLOW_WRITES, "convert", demo_source, tmp_path / "out", *options) as process:
        wait_for(tmp_path / f".out{STAGING_SUFFIX}" / JOURNAL_FILE, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    assert process.returncode == code
    hint = "finished shards are kept; continue with --resume"
    assert err == f"t5g2: stopped by signal {int(number)} ({hint})\n"
    again = t5g2("convert", demo_source, tmp_path / "out", *options, "--json")
    assert again.code == 0
    assert json.loads(again.out)["kept"]
    assert {path.name for path in tmp_path.iterdir()} == {"demo-source", "whole", "out"}
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_resume_without_sha256_is_a_wrong_command_line(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    result = t5g2("convert", demo_source, tmp_path / "out", "--resume", "--no-hash")
    assert result.code == 2
    assert "--resume needs sha256" in result.err


def test_I9_nan_is_refused_by_name_and_allowed_on_request(t5g2: CommandLine, demo_source: Path, tmp_path: Path) -> None:
    path = demo_source / "model.safetensors"
    entry = read_header(path).tensors["language_model.model.layers.2.mlp.up_proj.weight"]
    data = bytearray(path.read_bytes())
    data[entry.start + 2 : entry.start + 4] = b"\xc0\x7f"
    path.write_bytes(data)
    refused = t5g2("convert", demo_source, tmp_path / "out")
    assert refused.code == 3
    assert refused.err.splitlines() == [
        f"t5g2: {demo_source}: 1 tensor(s) hold NaN or infinity (--allow-nonfinite copies them unchanged)",
        "  language_model.model.layers.2.mlp.up_proj.weight[0, 1] is NaN",
    ]
    assert not (tmp_path / "out").exists()
    allowed = t5g2("convert", demo_source, tmp_path / "out", "--allow-nonfinite")
    assert allowed.code == 0
    assert "1 tensor(s) hold NaN or infinity, copied as they are: " in allowed.err
