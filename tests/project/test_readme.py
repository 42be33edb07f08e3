"""The commands in the README run unchanged, and print the output shown there and in the converting pages."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples.benchmark_sources import CONFIGS
from t5g2convert.checkpoint.header import read_header
from t5g2convert.checkpoint.manifest import read_manifest, seal
from t5g2convert.cli.demo import DEMO_CONFIG, build_demo_source
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONVERTING, VERIFYING = ((ROOT / "docs" / name).read_text() for name in ("converting.md", "verifying.md"))


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:].partition(" #")[0].strip() for line in lines]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints under the names in the README."""
    folder = tmp_path_factory.mktemp("readme")
    build_demo_source(folder / "gemma-3-4b-pt")
    text = {**DEMO_CONFIG["text_config"], "hidden_size": 640, "num_hidden_layers": 18, "sliding_window": 512}
    (folder / "books").mkdir()
    (folder / "books/novel.txt").write_text(README)
    (folder / "gemma-3-270m").mkdir()
    write_synthetic_source(folder / "gemma-3-270m", find_map("gemma3").map, text, seed=0)
    return folder


def run(command: list[str], folder: Path, *, code: int = 0) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_commands_run_in_their_order(workplace: Path) -> None:
    ours = [command for command in commands() if command.startswith("t5g2 ")]
    shown = [command.split()[1] for command in ours]
    assert shown == [
        "convert",
        "convert",
        "verify",
        "pack",
        "adapt",
        "average",
    ]
    for command in ours:
        run([*command.split(), *(SMALL if command.startswith("t5g2 adapt") else [])], workplace)
    assert (workplace / "run/average/t5g2.json").is_file()
    assert (workplace / "t5gemma-2-4b-4b/t5g2.json").is_file()


def test_the_python_blocks_run(workplace: Path, tmp_path: Path) -> None:
    (loading,), (converting,) = blocks("python"), blocks("python", CONVERTING)
    build_demo_source(tmp_path / "gemma-3-4b-pt")
    assert "'encoder': 186160" in run([sys.executable, "-c", converting], tmp_path)
    (tmp_path / "t5gemma-2-4b-4b").rename(tmp_path / "t5gemma-2-270m-270m")
    run([sys.executable, "-c", loading], tmp_path)


SMALL = [
    "--devices",
    "1",
    "--steps",
    "5",
    "--save-every",
    "1",
    "--encoder-length",
    "32",
    "--decoder-length",
    "32",
    "--batch-tokens",
    "32",
    "--accelerator",
    "cpu",
]
"""What makes of the README's training one that ends here; of an option that comes twice the last counts."""


def shown(beginning: str, page: str = VERIFYING) -> list[str]:
    """Return the lines of the text block with this beginning, without table padding."""
    (block,) = (block for block in blocks("text", page) if block.strip().startswith(beginning))
    return unmeasured(block)


def unmeasured(text: str) -> list[str]:
    """Return the lines without padding and without differences, which vary with the processor."""
    measured = r"difference [\d.e-]+ \([\d.e-]+ of the largest value\); KL [\d.e-]+, top-1 agreement [\d.]+%"
    return [re.sub(measured, "a difference", line.strip()) for line in text.strip().splitlines()]


def test_the_shown_verifications_match_the_output(tmp_path: Path) -> None:
    build_demo_source(tmp_path / "source")
    run(["t5g2", "convert", "source", "out"], tmp_path)
    judged = run(["t5g2", "verify", "out", "--source", "source"], tmp_path)
    assert [line for line in unmeasured(judged) if line.startswith("passed")] == shown("passed")

    path = tmp_path / "out/model.safetensors"
    one, other = (
        read_header(path).tensors[f"model.decoder.layers.{layer}.self_attn.q_proj.weight"] for layer in (4, 5)
    )
    data = bytearray(path.read_bytes())
    data[one.start : one.end], data[other.start : other.end] = data[other.start : other.end], data[one.start : one.end]
    path.write_bytes(data)
    manifest = read_manifest(tmp_path / "out").document()
    manifest["files"][path.name]["sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / "out/t5g2.json").write_bytes(seal(manifest))
    judged = run(["t5g2", "verify", "out", "--source", "source"], tmp_path, code=6)
    assert [line for line in unmeasured(judged) if line.startswith("FAILED")] == shown("FAILED")


def test_the_drawing_matches_the_demo(workplace: Path) -> None:
    (drawing,) = (block for block in blocks("text", CONVERTING) if "Which tensors go where" in block)
    printed = "\n".join(line.rstrip() for line in run(["t5g2", "demo"], workplace).splitlines())
    assert drawing.strip() in printed


def test_the_parameters_of_a_270m_match_plan(tmp_path: Path) -> None:
    write_synthetic_source(tmp_path, find_map("gemma3").map, CONFIGS["270m"], seed=None)
    printed = [line.strip() for line in run(["t5g2", "plan", str(tmp_path)], tmp_path).splitlines()]
    for line in shown("part", README):
        assert line in printed


def test_the_verification_of_a_270m_matches_the_output(tmp_path: Path) -> None:
    """Its figures are from real weights, which tests do not have; all numbers compare as equal here."""
    build_demo_source(tmp_path / "demo")
    text = {**CONFIGS["270m"], "vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    (tmp_path / "source").mkdir()
    write_synthetic_source(tmp_path / "source", find_map("gemma3").map, text, seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "demo" / name, tmp_path / "source")
    run(["t5g2", "convert", "source", "out"], tmp_path)
    printed = unmeasured(run(["t5g2", "verify", "out", "--source", "source"], tmp_path))
    printed = [re.sub(r"\d+", "N", line) for line in printed if line.startswith("passed")]
    # A small vocabulary has neither an end-of-image row nor an id for the moved image token.
    lines = re.sub(r"\d+", "N", "\n".join(shown("passed", README)))
    for phrase in ("N is a row of it, scaled, ", " but for <image_soft_token>, now N, as declared"):
        lines = lines.replace(phrase, "")
    assert printed == lines.split("\n")


def test_the_row_is_in_the_map() -> None:
    (row,) = yaml.safe_load(blocks("yaml", (ROOT / "docs/weight-map.md").read_text())[0])
    assert row in yaml.safe_load(find_map("gemma3").path.read_text())["weights"]


def test_it_is_short() -> None:
    assert README.count("\n") <= 120


def test_make_knows_the_targets_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_that_the_readme_links_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
