import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from t5g2convert import convert
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.cli.demo import build_demo_source
from tests.cli.commandline import CommandLine
from tests.processes.memory import run_and_measure
from tests.project.test_package import HEAVY, modules_after


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "model", flush=False)
    return folder / "model"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Write a text, a JSONL with and without pictures, and a Parquet file."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    rows = [{"text": "a line"}, {"text": ""}, {"text": "<start_of_image>red", "images": ["red.png"]}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.table({"text": ["row one", "row two"]}), folder / "c.parquet")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    return folder


def test_json_reports_what_was_packed(t5g2: CommandLine, model: Path, inputs: Path, tmp_path: Path) -> None:
    run = t5g2("pack", model, tmp_path / "out", inputs, "--json", "--shard-tokens", 9)
    assert (run.code, run.err) == (0, "")
    packed = Packed.open(tmp_path / "out", verify=True)
    assert json.loads(run.out) == {
        "output": str(tmp_path / "out"),
        "documents": 4,
        "tokens": 7 + 7 + 8 + 8,
        "image_documents": 1,
        "image_tokens": 12,
        "pairs": 0,
        "pair_tokens": 0,
        "images": 1,
        "empty": 1,
        "skipped": 0,
        "shards": 6,
        "tokenizer_sha256": sha256_of(model / "tokenizer.json"),
        "sha256": packed.sha256,
        "highest": 255,
        "special": {"1": 5, "3": 2, "253": 1, "254": 1, "255": 4},
    }


def test_files_that_are_not_read_are_counted(t5g2: CommandLine, model: Path, inputs: Path, tmp_path: Path) -> None:
    (inputs / "notes.md").touch()
    run = t5g2("pack", model, tmp_path / "out", inputs)
    assert run.err == "note: 1 file(s) are not read as documents: 1 .md\n"
    (inputs / "b.jsonl").unlink()
    run = t5g2("pack", model, tmp_path / "text", inputs, "--json")
    assert json.loads(run.out)["notes"] == ["2 file(s) are not read as documents: 1 .md, 1 .png"]


def test_no_torch_is_loaded(model: Path, inputs: Path, tmp_path: Path) -> None:
    loaded = modules_after(["pack", str(model), str(tmp_path / "out"), str(inputs)], tmp_path)
    assert loaded & HEAVY == {"numpy"}
    assert {"tokenizers", "pyarrow", "PIL"} <= loaded
    assert not loaded & {"datasets", "pandas", "matplotlib", "lightning_fabric"}


def test_without_json_one_line_reports_it(t5g2: CommandLine, model: Path, inputs: Path, tmp_path: Path) -> None:
    run = t5g2("pack", model, tmp_path / "out", inputs / "a.txt", inputs / "b.jsonl")
    assert (run.code, run.err) == (0, "")
    assert f"packed 2 documents (14 tokens; 1 more with images, 12 tokens) into {tmp_path}/out\n" in run.out
    assert "skipped 1 empty documents" in run.out


def test_a_data_set_in_place_of_files(t5g2: CommandLine, model: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.jsonl").write_text('{"body": "ab"}\n' * 3)
    run = t5g2("pack", model, tmp_path / "out", "--dataset", tmp_path / "set", "--column", "body", "--json")
    assert (run.code, json.loads(run.out)["tokens"]) == (0, 9)


def test_inputs_can_be_given_only_once(t5g2: CommandLine, model: Path, inputs: Path, tmp_path: Path) -> None:
    assert t5g2("pack", model, tmp_path / "out").code == 2
    run = t5g2("pack", model, tmp_path / "out", inputs, "--dataset", "x/y")
    assert (run.code, run.err) == (2, "t5g2: pass either files and folders to pack, or --dataset, not both\n")


def test_bad_documents_are_listed_and_nothing_is_left(
    t5g2: CommandLine, model: Path, inputs: Path, tmp_path: Path
) -> None:
    (inputs / "b.jsonl").write_text('{"text": "good"}\n{"text": 3}\n{"text": "a", "images": ["no.png"]}\n')
    (inputs / "d.txt").write_bytes(b"\xff\x1b[2J")
    run = t5g2("pack", model, tmp_path / "out", inputs)
    assert run.code == 3
    assert run.err.splitlines() == [
        f"t5g2: {inputs}/b.jsonl:2: 3 documents cannot be packed (mend them, or skip up to N with --skip-bad N)",
        f"  {inputs}/b.jsonl:2: the text is of type int",
        f"  {inputs}/b.jsonl:3: {inputs}/no.png is missing",
        f"  {inputs}/d.txt:1: is not UTF-8: invalid start byte at byte 0",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def rows(path: Path, count: int) -> Path:
    """Write a JSONL of `count` documents of 2,000 characters."""
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"text": f"document {number} " + "abc " * 495}) + "\n")
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(model: Path, tmp_path: Path) -> None:
    peaks, documents = [], (3000, 12_000)
    for count in documents:
        corpus = rows(tmp_path / "corpus.jsonl", count)
        out, peak = run_and_measure("pack", model, tmp_path / f"out{count}", corpus, "--json", "--no-flush")
        assert json.loads(out)["documents"] == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 40_000_000, peaks
    assert (tmp_path / "out12000/text-00000.bin").stat().st_size > 80_000_000, "and the corpus is larger than that"


def test_a_signal_leaves_nothing(model: Path, tmp_path: Path) -> None:
    corpus = rows(tmp_path / "corpus.jsonl", 10_000)
    staged = tmp_path / ".out.t5g2-staging/text-00000.bin"
    command = [sys.executable, "-m", "t5g2convert", "pack", model, tmp_path / "out", corpus]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not staged.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (143, "t5g2: stopped by signal 15\n")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_bar_is_drawn_only_on_a_terminal(model: Path, inputs: Path, tmp_path: Path) -> None:
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-m", "t5g2convert", "pack", model, tmp_path / "out", inputs, "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=child, check=True)
    os.close(child)
    assert b"pack" in os.read(parent, 10_000)
    os.close(parent)
    assert json.loads(run.stdout)["documents"] == 4
