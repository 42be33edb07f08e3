from collections.abc import Iterator
from pathlib import Path

import pytest

from t5g2convert import convert
from tests.faults.scene import SHARD_BYTES, Scene, contents, write_source
from tests.faults.strace import STRACE, Tracer


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scene")


@pytest.fixture(scope="session")
def source(scene_folder: Path) -> Path:
    """Return a model of 5,000 parameters; do not change it."""
    folder = scene_folder / "source"
    write_source(folder)
    return folder


@pytest.fixture(scope="session")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files that its conversion gives."""
    folder = tmp_path_factory.mktemp("clean") / "out"
    convert(source, folder, max_shard_bytes=SHARD_BYTES)
    found = contents(folder)
    assert found is not None
    assert sum(name.endswith(".safetensors") for name in found) == 3
    return found


@pytest.fixture(scope="session")
def tracer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    if STRACE is None:
        pytest.skip("strace is not here")
    tracer = Tracer(tmp_path_factory.mktemp("trace"), source)
    if refused := tracer.refused():
        tracer.close()
        pytest.skip(f"strace may not trace here: {refused}")
    yield tracer
    tracer.close()


@pytest.fixture(scope="session")
def scene(tracer: Tracer, source: Path, clean: dict[str, bytes], scene_folder: Path) -> Scene:
    return Scene(tracer, source, clean, scene_folder)
