"""Every example runs."""

import subprocess
import sys
from pathlib import Path

from t5g2convert import inspect
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        "benchmark_convert.py",
        "benchmark_forward.py",
        "benchmark_graft.py",
        "benchmark_sources.py",
        "benchmark_verify.py",
        "convert_with_transformers.py",
    }


def test_the_benchmark_measures_everyone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "benchmark_convert.py"),
        "tiny",
        "27b",
        "--rounds",
        "1",
        "--folder",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("cp ", "cp, then sync", "t5g2 convert --no-hash --no-flush", "transformers, meta device"):
        assert any(line.startswith(name) for line in run.stdout.splitlines()), run.stdout
    assert "27b: planned in " in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_forward_benchmark_measures_everyone_with_every_dtype(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmark_forward.py")
    command = [sys.executable, script, "tiny", "--rounds", "1", "--folder", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for dtype in ("float32", "bfloat16"):
        assert f"tiny-tiny, {dtype}: 512 tokens in, 64 out, one pass" in run.stdout
        assert f"tiny-tiny, {dtype}: 512 tokens in, 64 written greedily" in run.stdout
    for name in ("t5g2 reference", "transformers, sdpa", "transformers, eager"):
        assert sum(line.startswith(f"{name}  ") for line in run.stdout.splitlines()) == 4, run.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_verify_benchmark_verifies(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "benchmark_verify.py"), "tiny", "--folder", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    row = next(line for line in run.stdout.splitlines() if line.startswith("tiny"))
    assert float(row.split()[-1]) > 100
    assert list(tmp_path.iterdir()) == []


def test_the_script_by_hand_gives_the_same_parameters(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_synthetic_source(source, find_map("gemma3").map, TEXT, seed=0)
    script = EXAMPLES / "convert_with_transformers.py"
    subprocess.run([sys.executable, str(script), str(source), str(tmp_path / "out")], check=True, capture_output=True)
    found = inspect(tmp_path / "out").parameters
    assert found["encoder"] == found["decoder"] == inspect(source).parameters["decoder"]
