"""Fixtures shared by all tests."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

from t5g2convert import convert
from t5g2convert.cli.demo import DEMO_CONFIG, build_demo_source
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.schema import WeightMap
from tests.processes import small_shards as small_shards

# Generated cases are the same in every run, so failures can be reproduced.
settings.register_profile("t5g2", derandomize=True, deadline=None)
settings.load_profile("t5g2")

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Tests run in parallel; more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run only the first case of a `sampled` test; `make test-all` runs all."""
    seen = set()
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            function = (item.path, getattr(item, "originalname", item.name))
            if function in seen:
                item.add_marker("slow")
            seen.add(function)


@pytest.fixture(autouse=True)
def _verified_on_request(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify a conversion only with --verify, so that a test may write a wrong one, except in tests of the default."""
    if "verified_by_default" not in request.fixturenames:
        monkeypatch.setattr("t5g2convert.cli.convert.VERIFIED_BELOW", 0)


@pytest.fixture
def verified_by_default() -> None:
    """Verify small conversions without --verify, as outside of tests."""


@pytest.fixture(scope="session")
def gemma3_map() -> WeightMap:
    """The shipped map."""
    return find_map("gemma3").map


@pytest.fixture(scope="session")
def demo_config() -> Mapping[str, Any]:
    """The config of the demo's Gemma 3: with images, 8 layers."""
    return DEMO_CONFIG


@pytest.fixture
def demo_source(tmp_path: Path) -> Path:
    """Write the demo's tiny Gemma 3 with images and tokenizer, without torch; the test may damage it."""
    folder = tmp_path / "demo-source"
    build_demo_source(folder)
    return folder


TwinFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder shared by all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def twin_folder(shared_folder: Path) -> TwinFolder:
    """Return the folder of a twin by name, written by the first worker that needs it; do not change it."""

    def write(name: str, folder: Path) -> None:
        # Imported here: transformers takes seconds, and most tests do not need it.
        from tests.models.twins import BY_NAME, write_twin

        write_twin(BY_NAME[name], folder)

    return partial(_written_once, shared_folder / "twins", write)


@pytest.fixture(scope="session")
def converted_twin(twin_folder: TwinFolder, shared_folder: Path) -> TwinFolder:
    """Return the folder of a twin's conversion, written by the first worker that needs it; do not change it."""

    def write(name: str, folder: Path) -> None:
        convert(twin_folder(name), folder)

    return partial(_written_once, shared_folder / "converted", write)


@pytest.fixture(scope="session")
def demo_model(shared_folder: Path) -> Path:
    """The demo's T5Gemma 2, written by the first worker that needs it; do not change it.

    It has 256 tokens, one for each printable character of ASCII, and images of 4 tokens.
    """

    def write(_: str, folder: Path) -> None:
        build_demo_source(folder.with_name("source"))
        convert(folder.with_name("source"), folder, flush=False)

    return _written_once(shared_folder / "demo", write, "model")


def _written_once(root: Path, write: Callable[[str, Path], object], name: str) -> Path:
    root.mkdir(exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.written").exists():
            shutil.rmtree(root / name, ignore_errors=True)
            write(name, root / name)
            (root / f"{name}.written").touch()
    return root / name


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts of mutants and faults at the end of a run."""
    if counts := _recorded(terminalreporter, "mutants"):
        caught = ", ".join(f"{name} {counts[name]}" for name in ("integrity", "provenance", "config", "parity"))
        terminalreporter.write_line(
            f"mutants: {counts['tried']} tried, {counts['survived']} survived; caught by {caught}"
        )
    if counts := _recorded(terminalreporter, "faults"):
        lost = counts.pop("lost", 0)
        caught = ", ".join(f"{fault} {count}" for fault, count in counts.most_common())
        terminalreporter.write_line(f"faults: {counts.total()} injected ({caught}), {lost} outputs lost or damaged")
    if counts := _recorded(terminalreporter, "bad_inputs"):
        terminalreporter.write_line(f"bad inputs: {counts.total()} tried")
    if counts := _recorded(terminalreporter, "hostile_texts"):
        terminalreporter.write_line(f"hostile texts: shown {counts.total()} times, obeyed never")


def _recorded(terminalreporter: pytest.TerminalReporter, wanted: str) -> Counter[str]:
    """Return the sum of what tests recorded under a name: counts by kind, or one number."""
    counts: Counter[str] = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        # The call's report has only the call's properties, the last report has all.
        for name, value in report.user_properties if getattr(report, "when", None) == "teardown" else ():
            if name == wanted:
                counts.update(value if isinstance(value, dict) else {wanted: value})
    return counts
