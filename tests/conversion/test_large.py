"""Many tensors, long headers, and files larger than memory: all in bounded memory."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from safetensors import safe_open

from t5g2convert.checkpoint.file_names import SINGLE_FILE
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.processes.memory import run_and_measure

LAYERS: Final = 7_692
"""13 tensors each: 100,000 together, within the deepest model that is taken for one (10,000 layers)."""

TINY: Final = {
    "model_type": "gemma3_text", "vocab_size": 16, "hidden_size": 2, "intermediate_size": 2,
    "num_hidden_layers": LAYERS, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
    "sliding_window": 4, "eoi_token_index": 3,
}  # fmt: skip

# Measured: 147 MB, 369 MB, 941 MB and 368 MB. A target tensor has a name, a range and a place, some 1.2 kB in all, and
# there are 200,000 of them; the JSON of a plan is 91 MB of text. What must not happen is that anything is quadratic.
INSPECT_LIMIT: Final = 250e6
PLAN_LIMIT: Final = 600e6


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a source of 100,000 tensors; do not change it."""
    from t5g2convert.mapping.library import find_map

    folder = tmp_path_factory.mktemp("many")
    write_synthetic_source(folder, find_map("gemma3").map, TINY, seed=None)
    return folder


@pytest.mark.slow
def test_I14_100000_tensors_are_inspected_and_planned_in_bounded_memory(many: Path) -> None:
    printed, peak = run_and_measure("inspect", many, "--json")
    found = json.loads(printed)
    assert found["missing"] == found["unexpected"] == []
    assert found["config"]["num_hidden_layers"] == LAYERS
    assert peak < INSPECT_LIMIT
    printed, peak = run_and_measure("plan", many)
    assert f"{13 * LAYERS + 1} tensors" in printed
    assert peak < PLAN_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-hash"]], ids=["hash", "no-hash"])
def test_I14_100000_tensors_are_converted_in_bounded_memory(options: list[str], many: Path, tmp_path: Path) -> None:
    printed, peak = run_and_measure(
        "convert", "--no-verify", "--no-card", many, tmp_path / "out", "--no-flush", "--json", *options
    )
    assert peak < PLAN_LIMIT
    with safe_open(tmp_path / "out" / SINGLE_FILE, "np") as file:
        names = set(file.keys())
        assert len(names) == json.loads(printed)["tensors"]
        for stack in ("encoder", "decoder"):
            start = f"model.{stack}.layers."
            assert sum(name.startswith(start) for name in names) == 13 * LAYERS
            assert file.get_slice(f"{start}{LAYERS - 1}.mlp.up_proj.weight").get_shape() == [2, 2]


def write_header(path: Path, names: list[str]) -> int:
    """Write a file of one-byte tensors with these names; return the header size."""
    fields = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]} for number, name in enumerate(names)
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(names)))
    return len(text)


@pytest.mark.slow
def test_I14_a_header_of_24_MB_is_read_in_bounded_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    names = [f"model.layers.{number}.{'very_long_name.' * 12}weight" for number in range(100_000)]
    assert write_header(tmp_path / SINGLE_FILE, ["model.norm.weight", *names]) > 24_000_000
    printed, peak = run_and_measure("inspect", tmp_path, "--json")
    assert len(json.loads(printed)["unexpected"]) == 100_000
    # The header, its text, its fields as Python objects (1 kB each) and the answer.
    assert peak < 500e6


_LIMITED: Final = """
import resource, sys
kind, limit = getattr(resource, sys.argv.pop(1)), int(sys.argv.pop(1))
resource.setrlimit(kind, (limit, limit))
from t5g2convert.cli.main import main
main(sys.argv[1:])
"""


def limited(kind: str, limit: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _LIMITED, kind, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_I14_100000_unknown_tensors_are_refused_with_first_names_and_count(tmp_path: Path, many: Path) -> None:
    """As many are missing as unused: matching them must not take quadratic time."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    names = [f"model.layers.{number}.{'very_long_name.' * 12}weight" for number in range(100_000)]
    write_header(tmp_path / SINGLE_FILE, ["model.norm.weight", *names])
    run = limited("RLIMIT_DATA", 700_000_000, "plan", tmp_path)
    assert run.returncode == 3, run.stderr[-500:]
    lines = run.stderr.splitlines()
    assert "99997 missing, 100000 unused, 2 misshapen" in lines[0]
    assert len(lines) == 22
    assert "more; --json lists all" in lines[-1]


LIMITS: Final = [pytest.param("RLIMIT_DATA", 96_000_000), pytest.param("RLIMIT_AS", 320_000_000)]
"""What the process may have: its own data, or all that is mapped, the libraries' files and stacks of threads too."""


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "limit"), LIMITS)
def test_I14_a_file_larger_than_memory_is_planned(
    kind: str, limit: int, demo_config: Mapping[str, Any], gemma3_map: WeightMap, tmp_path: Path
) -> None:
    text = {**demo_config["text_config"], "vocab_size": 262_208, "hidden_size": 16_384, "intermediate_size": 2_000_000}
    write_synthetic_source(tmp_path, gemma3_map, {**demo_config, "text_config": text}, seed=None)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 2_000 * limit
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > 100 * limit
    for command in ("inspect", "plan"):
        run = limited(kind, limit, command, tmp_path, "--json")
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["parameters"]["total"] > 0.49 * size


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-hash"]], ids=["hash", "no-hash"])
@pytest.mark.parametrize(("kind", "limit"), LIMITS)
def test_I14_a_source_larger_than_memory_is_converted(
    kind: str,
    limit: int,
    options: list[str],
    demo_config: Mapping[str, Any],
    gemma3_map: WeightMap,
    tmp_path: Path,
) -> None:
    # Nearly all of it is the embedding table, written once.
    rows = 4 * limit // (2 * 512)
    text = {**demo_config["text_config"], "vocab_size": rows, "hidden_size": 512}
    (tmp_path / "source").mkdir()
    write_synthetic_source(tmp_path / "source", gemma3_map, {**demo_config, "text_config": text}, seed=None)
    assert (tmp_path / "source" / SINGLE_FILE).stat().st_size > 4 * limit
    run = limited(
        kind,
        limit,
        "convert",
        "--no-verify",
        "--no-card",
        tmp_path / "source",
        tmp_path / "out",
        "--no-flush",
        *options,
    )
    assert run.returncode == 0, run.stderr
    with safe_open(tmp_path / "out" / SINGLE_FILE, "np") as file:
        assert file.get_slice("model.encoder.embed_tokens.weight").get_shape() == [rows, 512]
