import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

CHECKOUT = Path(__file__).resolve().parents[2]


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist with the installed hatchling, without network."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.iterdir()
    return built


def wheel_contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel") / "dist"
    folder.mkdir()
    return build("wheel", CHECKOUT, folder)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist") / "dist"
    folder.mkdir()
    return build("sdist", CHECKOUT, folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with only the wheel."""
    target = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*command, "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def run_installed(installed: Path, cwd: Path, *command: str) -> str:
    """Run Python with the wheel's `t5g2convert` and this environment's third-party packages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    run = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(installed)},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_wheel_holds_the_package_its_maps_and_nothing_else(wheel: Path) -> None:
    names = set(wheel_contents(wheel))
    info = next(name for name in names if name.endswith(".dist-info/METADATA")).partition("/")[0]
    assert {name.partition("/")[0] for name in names} == {"t5g2convert", info}
    sources = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "t5g2convert").rglob("*.py")}
    maps = {f"t5g2convert/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "mappings").glob("*.yaml")}
    assert "t5g2convert/mappings/gemma3.yaml" in maps
    data = {"t5g2convert/py.typed", "t5g2convert/adaptation/ul2/ul2.yaml"}
    assert {name for name in names if name.startswith("t5g2convert/")} == sources | maps | data


def test_the_wheel_carries_each_map_byte_for_byte(wheel: Path) -> None:
    contents = wheel_contents(wheel)
    for path in (CHECKOUT / "mappings").glob("*.yaml"):
        assert contents[f"t5g2convert/{path.relative_to(CHECKOUT)}"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_wheel_has_the_licence_the_command_and_the_readme(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA")).partition("/")[0]
        assert archive.read(f"{info}/licenses/LICENSE") == (CHECKOUT / "LICENSE").read_bytes()
        assert archive.read(f"{info}/entry_points.txt").decode().split("\n")[:2] == [
            "[console_scripts]",
            "t5g2 = t5g2convert.__main__:main",
        ]
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "\nName: t5g2convert\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert metadata.endswith((CHECKOUT / "README.md").read_text())


def test_the_sdist_has_the_files_that_a_packager_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "mappings/gemma3.yaml", "t5g2convert/py.typed",
                   "tests/conftest.py", "constraints.txt", "Makefile"):  # fmt: skip
        assert needed in names
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []
    assert not {name.partition("/")[0] for name in names} & {".venv", ".hypothesis", ".ruff_cache", "dist", "build"}


def test_a_wheel_from_the_sdist_is_the_wheel_from_the_checkout(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "dist").mkdir()
    again = build("wheel", unpacked, tmp_path / "dist")
    assert again.name == wheel.name
    assert wheel_contents(again) == wheel_contents(wheel)


def test_the_installed_wheel_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    script = (
        "import t5g2convert, json\n"
        "from t5g2convert.mapping.library import mappings_folder\n"
        "print(json.dumps([t5g2convert.__file__, str(mappings_folder()), t5g2convert.__version__]))"
    )
    module, maps, version = json.loads(run_installed(installed, tmp_path, "-c", script))
    assert Path(module).is_relative_to(installed)
    assert Path(maps) == (installed / "t5g2convert/mappings").resolve()
    printed = run_installed(installed, tmp_path, str(installed / "bin/t5g2"), "--version")
    assert printed == f"{version}\n"


def test_the_installed_wheel_reads_the_papers_mixture(installed: Path, tmp_path: Path) -> None:
    script = "from t5g2convert.adaptation.ul2.mixture import read_mixture; print(read_mixture().block)"
    assert run_installed(installed, tmp_path, "-c", script) == "8\n"


@pytest.mark.slow
def test_the_installed_wheel_makes_the_demo_and_a_model_that_loads(installed: Path, tmp_path: Path) -> None:
    shown = run_installed(installed, tmp_path, "-m", "t5g2convert", "demo", "--out", "kept")
    assert "251 tensors" in shown
    arguments = ["convert", "kept/gemma3-tiny", "again", "--mapping", "gemma3", "--json", "--verify"]
    done = json.loads(run_installed(installed, tmp_path, "-m", "t5g2convert", *arguments))
    assert done["tensors"] == 251
    with safe_open(tmp_path / "again/model.safetensors", "pt") as file:
        assert len(file.keys()) == 251
    for folder in ("kept/t5gemma2-tiny", "again"):
        model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert type(model).__name__ == "T5Gemma2ForConditionalGeneration"
        assert AutoTokenizer.from_pretrained(tmp_path / folder)("a b").input_ids
    first, second = ((tmp_path / folder / "t5g2.json").read_bytes() for folder in ("kept/t5gemma2-tiny", "again"))
    assert first == second
