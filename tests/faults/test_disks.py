"""Real full disks, real file limits, real read-only folders."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import plan
from tests.faults.scene import SHARD_BYTES, contents, leftovers, write_source
from tests.folders import OLD, write_old

UNSHARE: Final = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]

AS_NOBODY: Final = """
import os, sys
from t5g2convert.cli.main import main
from tests.faults.server import warm_up

warm_up(sys.argv[2])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
main(sys.argv[1:])
"""


def outcomes(source: Path, tmp_path: Path, *disks: str) -> list[dict[str, Any]]:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not here")
    probe = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip(f"nothing may be mounted here: {probe.stderr.decode().strip()}")
    arguments = [str(source), str(tmp_path / "disk"), str(SHARD_BYTES), *disks]
    command = [*UNSHARE, sys.executable, "-m", "tests.faults.disks", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    assert not (tmp_path / "disk").is_mount()
    return list(json.loads(done.stdout))


def one_line(stderr: str) -> bool:
    return len(stderr.splitlines()) == 1 and stderr.startswith("t5g2: ") and "a bug in t5g2" not in stderr


@pytest.mark.slow
def test_O2_a_disk_that_fills_up_at_any_page(
    source: Path, clean: dict[str, bytes], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The disk claims to be large enough but is too small, by one page less each time, until all fits."""
    pages = sum(-(-len(data) // 4096) for data in clean.values()) + 1  # one is the journal's
    ended = outcomes(source, tmp_path, *(f"lied {4096 * number}" for number in range(1, pages + 1)))
    sizes = {name: len(data) for name, data in clean.items()}
    lost = [disk for disk in ended if disk["files"] not in (None, sizes)]
    record_property("faults", {"full disk": pages - 1, "lost": len(lost)})
    assert lost == []
    assert ended[-1]["code"] == 0
    assert ended[-1]["left"] == ["new", "new/out"]
    where = set()
    for disk in ended[:-1]:
        assert disk["code"] == 5, disk
        assert one_line(disk["stderr"]), disk
        assert "No space left on device" in disk["stderr"], disk
        assert disk["left"] == [], disk
        where |= {name for name in sizes if f"/{name}: " in disk["stderr"]}
    assert {"model-00001-of-00003.safetensors", "config.json", "t5g2.json"} <= where, "it came at different writes"


def test_O2_a_disk_that_is_too_small_is_known_before_the_start(source: Path, tmp_path: Path) -> None:
    (disk,) = outcomes(source, tmp_path, "honest 1048576")
    assert disk["code"] == 5
    assert one_line(disk["stderr"])
    have, need = (int(number.replace(",", "")) for number in re.findall(r"(\d[\d,]*)(?: bytes free|$)", disk["stderr"]))
    assert have == 1 << 20
    assert need > plan(source).nbytes
    assert disk["left"] == []


def test_O2_a_disk_that_is_mounted_read_only(source: Path, tmp_path: Path) -> None:
    (disk,) = outcomes(source, tmp_path, "readonly 134217728")
    assert disk["code"] == 5
    assert one_line(disk["stderr"])
    assert "Read-only file system" in disk["stderr"]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a source with a tokenizer larger than its other files."""
    folder = tmp_path_factory.mktemp("wordy") / "source"
    write_source(folder)
    (folder / "tokenizer.json").write_text(f'{{"version": "1.0", "words": "{"word " * 20_000}"}}\n')
    return folder


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("limit", "where"),
    [
        (100, "model-00001-of-00003.safetensors"),
        (1_500, "model-00001-of-00003.safetensors"),
        (5_000, "model-"),
        (50_000, "tokenizer.json"),
    ],
)
def test_O2_a_file_larger_than_the_limit_on_files(wordy: Path, tmp_path: Path, limit: int, where: str) -> None:
    target = tmp_path / "new/out"
    command = [
        sys.executable,
        "-m",
        "tests.processes.small_shards",
        "convert",
        "--no-verify",
        "--no-card",
        wordy,
        target,
        "--max-shard-size",
        str(SHARD_BYTES),
    ]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 5
    assert one_line(done.stderr)
    assert where in done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def public(source: Path) -> Iterator[Path]:
    """Return a world-readable folder with a source; pytest's own folders are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(source, folder / "source")
        yield folder


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_O2_a_folder_that_may_not_be_written(public: Path, overwrite: bool) -> None:
    target = public / "locked/out"
    target.mkdir(parents=True)
    if overwrite:
        write_old(target)
        for path in (target, *target.rglob("*")):
            os.chown(path, 65534, 65534) if os.geteuid() == 0 else None
    target.parent.chmod(0o555)
    try:
        command = [
            sys.executable,
            "-c",
            AS_NOBODY,
            "convert",
            public / "source",
            target,
            "--no-verify",
            "--no-card",
            *["--overwrite"] * overwrite,
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    finally:
        target.parent.chmod(0o755)
    assert done.returncode == 5
    assert one_line(done.stderr)
    assert "Permission denied" in done.stderr
    assert leftovers(target) == set()
    assert contents(target) == (OLD if overwrite else {})
