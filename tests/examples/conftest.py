"""Run examples, and the small model that several of them take."""

from pathlib import Path

import pytest

from tests.processes.forked import Preload, python

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str | Path) -> str:
    """Run an example that must succeed, and return what it prints."""
    command = [str(EXAMPLES / script), *map(str, arguments)]
    done = python(command, preload=Preload.TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the small Gemma 3 after two training steps, with the training's output."""
    folder = tmp_path_factory.mktemp("tiny-parent") / "parent"
    printed = run("tiny_parent/train.py", folder, "--steps", "2", "--documents", "12")
    (folder.parent / "said").write_text(printed)
    return folder
