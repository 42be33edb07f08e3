"""The memory of this machine that is still free, within the limits of its control groups."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")

_FILES: Final = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By the controller in /proc/self/cgroup, none for version 2: files of the limit and of the use, and the entry of
memory.stat with the cached files, which are given back when memory is needed."""


def free_memory(root: Path = ROOT) -> int | None:
    """Return how many bytes this process may still allocate without swapping; None if the system does not tell.

    Args:
        root: Folder that has /proc and /sys.
    """
    with suppress(OSError, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        if "MemAvailable" in fields:
            return max(0, min([1024 * int(fields["MemAvailable"].split()[0]), *_left_in_groups(root)]))
    return None


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what each control group with a limit leaves, from this process's group up to the root."""
    for folder, names in _groups(root):
        limit, used, cached = names
        with suppress(OSError, ValueError):  # the root has no limit, or the limit is "max"
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
            yield most - now + int(stat.get(cached, 0))


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in _FILES.keys() & controllers.split(","):
                top = root / "sys/fs/cgroup" / controller
                inside = Path(path.strip("/"))
                # In a container the path may be the machine's, which is not visible: the top is then the own group.
                for folder in (inside, *inside.parents):
                    yield top / folder, _FILES[controller]
