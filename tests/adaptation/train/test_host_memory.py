from pathlib import Path

import pytest

from t5g2convert.adaptation.train.host_memory import free_memory


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal:  4000 kB\nMemFree:  1000 kB\nMemAvailable:  2000 kB\nHugePages_Total: 0\n"}
VERSION_2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": "5\n",
    "sys/fs/cgroup/job/step/memory.stat": "anon 5\n",
    "sys/fs/cgroup/job/memory.max": "1000000\n",
    "sys/fs/cgroup/job/memory.current": "700000\n",
    "sys/fs/cgroup/job/memory.stat": "anon 100\ninactive_file 200000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/docker/abc\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "900000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "950000\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 60000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 2000 * 1024),
        (MEMINFO | VERSION_2, 500_000),
        (MEMINFO | VERSION_1, 10_000),
        (MEMINFO | VERSION_1 | {"sys/fs/cgroup/memory/memory.stat": "\n"}, 2000 * 1024),
        (MEMINFO | VERSION_1 | {"sys/fs/cgroup/memory/memory.stat": "cache 1\n"}, 0),
        ({"proc/meminfo": "MemTotal:  4000 kB\n"}, None),
        ({}, None),
    ],
)
def test_the_free_memory_is_the_least_of_machine_and_groups(
    files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    write(tmp_path, files)
    assert free_memory(tmp_path) == expected
