import shutil
from pathlib import Path

import pytest

from tests.publish.folders import write_kinds


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, by its name; not to be changed."""
    folder = tmp_path_factory.mktemp("kinds")
    write_kinds(folder)
    return folder


@pytest.fixture
def converted(kinds: Path, tmp_path: Path) -> Path:
    """A conversion with images, free to be changed."""
    return Path(shutil.copytree(kinds / "images", tmp_path / "converted"))
