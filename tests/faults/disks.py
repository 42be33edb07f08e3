"""Run inside a mount namespace: conversions onto small disks, each made for one conversion.

Arguments: source, a folder to mount at, bytes of a shard, and the disks with their sizes in bytes: `lied 8192` for one
that claims to be large enough, `honest 8192`, `readonly 8192`. Prints a JSON list with one outcome per disk.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from t5g2convert.cli.main import main
from tests.faults.scene import contents
from tests.faults.server import warm_up
from tests.processes import small_shards as small_shards


def convert(source: str, target: Path, shard: str, *, overstates_space: bool, stderr: Path) -> int:
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        if overstates_space:
            # As on a disk that somebody else fills after the check.
            shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 40)  # type: ignore[assignment,return-value]
        try:
            main(["convert", "--no-verify", "--no-card", source, str(target), "--max-shard-size", shard])
        except SystemExit as end:
            # The rest of this file runs in the parent.
            os._exit(int(end.code or 0))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(kind: str, size: str, source: str, mount: Path, shard: str, stderr: Path) -> dict[str, Any]:
    options = f"size={size},{'ro' if kind == 'readonly' else 'rw'}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(mount)], check=True)
    try:
        code = convert(source, mount / "new/out", shard, overstates_space=kind == "lied", stderr=stderr)
        found = contents(mount / "new/out")
        left = sorted(str(path.relative_to(mount)) for path in mount.rglob("*") if path.parent.name != "out")
        digest = None if found is None else {name: len(data) for name, data in found.items()}
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    return {"disk": f"{kind} {size}", "code": code, "stderr": stderr.read_text(), "files": digest, "left": left}


if __name__ == "__main__":
    source, mount, shard, *disks = sys.argv[1:]
    Path(mount).mkdir()
    warm_up(source)
    stderr = Path(mount).with_name("stderr")
    print(json.dumps([outcome(*disk.split(), source, Path(mount), shard, stderr) for disk in disks]))
