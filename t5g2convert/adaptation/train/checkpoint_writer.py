"""Torch's safetensors writer of checkpoints, with the sha256 of every file taken while it is written."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedWriter, FileIO, UnsupportedOperation
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

Commit = Callable[[Mapping[str, str]], None]


class HashedFile(BufferedWriter):
    """A new file that is written from start to end, with the sha256 of its bytes.

    Attributes:
        sha256: The hash of all bytes written so far.

    Args:
        path: The file.

    Raises:
        OSError: The file exists, or cannot be created.
        UnsupportedOperation: On use: a byte would be written a second time, so that the hash would be wrong.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "x"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write and hash bytes."""
        self.sha256.update(data)
        return super().write(data)

    def seek(self, *_: int) -> int:
        """Refuse to write anywhere but at the end."""
        raise UnsupportedOperation("a file that is hashed while it is written cannot be rewound")

    def truncate(self, *_: int | None) -> int:
        """Refuse to take bytes back."""
        raise UnsupportedOperation("a file that is hashed while it is written cannot be truncated")


class HashedFiles(FileSystem):
    """The file system to which torch writes.

    Attributes:
        digests: sha256 of every file that was written, by name.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Create a file; torch writes nothing but new files with this writer."""
        assert mode == "wb", mode
        with HashedFile(Path(path)) as stream:
            yield stream
        self.digests[Path(path).name] = stream.sha256.hexdigest()


class CheckpointWriter(HuggingFaceStorageWriter):
    """Write one set of files per process, and commit them when all processes have written theirs.

    Torch gathers the results of all processes on rank 0 and calls `finish` there; the digests travel with them. An
    error of any process, or of the commit, is raised on all.

    Args:
        folder: The staged folder, which exists.
        files: The number of the file that each tensor is written to, from 1.
        commit: Called on rank 0 with the sha256 of every file, by name.
    """

    def __init__(self, folder: Path, files: dict[str, int], commit: Commit) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self.fs: HashedFiles = HashedFiles()
        self._commit = commit

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the files of this process; a result says in which file a tensor is, and that file's sha256."""
        written = super().write_data(plan, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result([replace(each, storage_data=self._file(each)) for each in written])
        return done

    def _file(self, result: WriteResult) -> tuple[str, str]:
        name = result.storage_data.relative_path
        return name, self.fs.digests[name]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the checkpoint; called on rank 0."""
        super().finish(metadata, results)
        self._commit(dict(sorted(result.storage_data for each in results for result in each)))
