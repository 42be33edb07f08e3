"""The folder of a run: its files, its lock, and what it may contain before the run starts."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from t5g2convert.adaptation.train.checkpoint_manifest import (
    CHECKPOINTS_FOLDER,
)
from t5g2convert.checkpoint.atomic_write import lock_folder
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.errors import CheckpointError, OutputError

RUN_FILE: Final = "run.json"
METRICS_FILE: Final = "metrics.jsonl"
EVALUATION_FILE: Final = "evaluation.jsonl"
TENSORBOARD_FOLDER: Final = "tensorboard"
PLOT_FILE: Final = "loss.svg"
EXPORT_FOLDER: Final = "model"
ADAPTER_FOLDER: Final = "adapter"
LOG_ENDINGS: Final = (".log", ".out", ".err")
"""Endings of the files that batch systems write, often into the folder of the run."""


def check_own_files(run: Path) -> None:
    """Refuse a run's folder with links, pipes or other things in place of the run's files: nothing is written through.

    Raises:
        OutputError: A file of the run is not a regular file, or a folder is not a folder.
    """
    expected = {
        RUN_FILE: stat.S_ISREG, METRICS_FILE: stat.S_ISREG, EVALUATION_FILE: stat.S_ISREG, PLOT_FILE: stat.S_ISREG,
        CHECKPOINTS_FOLDER: stat.S_ISDIR, TENSORBOARD_FOLDER: stat.S_ISDIR,
    }  # fmt: skip
    try:
        for name, is_right in expected.items():
            path = run / name
            if os.path.lexists(path) and not is_right(path.lstat().st_mode):
                kind = "folder" if is_right is stat.S_ISDIR else "file"
                raise OutputError(
                    f"is not a {kind} of the run's own", where=path, hint="move it away, then start again"
                )
        for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER):
            linked = [item for item in (run / name).glob("*") if item.is_symlink()]
            if linked:
                raise OutputError("is a link, but a run contains none", where=linked[0], hint="move it away")
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=run) from None


def check_bytes(model: Path, exported: Path) -> None:
    """Refuse an export if the bytes read from the model differ from the model's manifest, if it has one.

    Raises:
        CheckpointError: They differ.
    """
    if not (model / MANIFEST_FILE).is_file():
        return
    recorded = read_manifest(model).files
    for name, file in read_manifest(exported).source.files.items():
        expected = recorded[name].sha256 if name in recorded else ""
        if expected is not None and file.sha256 != expected:
            raise CheckpointError(
                f"{name} differs from its sha256 in {MANIFEST_FILE}", where=model, hint="it was modified or damaged"
            )


def parts_of_run(run: Path) -> tuple[Path, ...]:
    """Return the parts of a run's folder that no output may replace."""
    return tuple(
        run / name for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, RUN_FILE, METRICS_FILE, EVALUATION_FILE)
    )


def check_vacant(run: Path) -> None:
    """Refuse a folder that is not empty; the log files of a batch system may be there already.

    Raises:
        OutputError: It is not empty, or not a folder.
    """
    try:
        if run.exists() and (not run.is_dir() or any(item.suffix not in LOG_ENDINGS for item in run.iterdir())):
            raise OutputError(
                "exists and is not an empty folder", where=run, hint="--resume continues a run that stopped"
            )
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=run) from None


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run's folder while the block runs; create it if it is absent, and remove it again if it stayed empty.

    The lock is on the folder itself and ends with the process that holds it: its data workers give it up, since they
    outlive a process that is killed by some seconds. Other machines see it too, if their file system has locks.

    Raises:
        OutputError: Another process holds it, or the folder cannot be created or locked.
    """
    made: list[Path] = []
    try:
        fd = _lock(run, made)
    except OSError as error:
        raise OutputError(f"cannot be locked: {error.strerror}", where=run) from error
    _held.add(fd)
    try:
        yield
    finally:
        _held.remove(fd)
        # Removed while it is locked: a process that waits for the lock sees that the name now has another folder.
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        os.close(fd)


_held: Final = set[int]()


def _give_up() -> None:
    """Close the locks that a forked process has inherited."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_give_up)


def _lock(run: Path, made: list[Path]) -> int:
    while True:
        for folder in (*reversed(run.parents), run):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.insert(0, folder)
        try:
            fd = lock_folder(run)
        except BlockingIOError:
            raise OutputError(
                "another process is training in this folder", where=run, hint="stop it first, or choose another folder"
            ) from None
        if fd is not None:
            return fd
