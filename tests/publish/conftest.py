import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5g2convert import convert
from t5g2convert.cli.demo import build_demo_source
from tests.hub.server import running
from tests.publish.folders import write_kinds
from tests.publish.scene import Scene


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of each kind by name; do not change them."""
    folder = tmp_path_factory.mktemp("kinds")
    write_kinds(folder)
    return folder


@pytest.fixture
def converted(kinds: Path, tmp_path: Path) -> Path:
    """Return a conversion with images that the test may change."""
    return Path(shutil.copytree(kinds / "images", tmp_path / "converted"))


@pytest.fixture(scope="session")
def demo_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Return `src`, a tiny Gemma 3 with images, and `out`, its conversion; do not change them."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo_source(folder / "src")
    convert(folder / "src", folder / "out", flush=False)
    return folder


@pytest.fixture
def scene(tmp_path: Path, demo_folders: Path) -> Iterator[Scene]:
    with running() as hub:
        shutil.copytree(demo_folders, tmp_path / "work")
        token = f"hf_{secrets.token_hex(17)}"
        hub.users[token] = "ann"
        yield Scene(hub, tmp_path / "work", token)
