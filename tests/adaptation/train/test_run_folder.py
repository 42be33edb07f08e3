import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from t5g2convert.adaptation.train.run_folder import locked
from t5g2convert.errors import OutputError


def _hold(run: Path, has_it: Event) -> None:
    with locked(run):
        (run / "file").touch()
        has_it.set()
        multiprocessing.Event().wait()


def test_a_run_locks_its_folder_until_its_process_is_dead(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    has_it = fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "run", has_it))
    other.start()
    assert has_it.wait(60)
    with (
        pytest.raises(OutputError, match="run: another process is training in this folder"),
        locked(tmp_path / "run"),
    ):
        pass
    other.kill()
    other.join()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run/file").exists()


def test_a_new_folder_that_stayed_empty_is_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"), locked(tmp_path / "a/b"):
        assert (tmp_path / "a/b").is_dir()
    assert [item.name for item in tmp_path.iterdir()] == ["mine"]
    with locked(tmp_path / "a/b"):
        (tmp_path / "a/b/file").touch()
    assert (tmp_path / "a/b/file").exists()


def test_a_file_cannot_be_locked_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(OutputError, match="cannot be locked"), locked(path):
            pass
