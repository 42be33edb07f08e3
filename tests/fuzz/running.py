"""Shared by both fuzz targets: seeds from `tests/attacks`, and the report of a failing input."""

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

ATTACKS = Path(__file__).parents[1] / "attacks"
FOUND = Path("build/fuzz")


def fuzz(folder: str, suffix: str, sound: Mapping[str, bytes], judge: Callable[[Path], None]) -> None:
    """Call `judge` repeatedly with a mutated file; it raises where the program is wrong.

    Args:
        folder: Folder of `tests/attacks` with the seeds.
        suffix: Ending of the files.
        sound: More seeds, by file name: inputs that are accepted.
        judge: Reads the file that it is given.
    """
    FOUND.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="t5g2-fuzz-") as temporary:
        corpus, path = Path(temporary) / "corpus", Path(temporary) / f"input{suffix}"
        shutil.copytree(ATTACKS / folder, corpus)
        for name, content in sound.items():
            (corpus / name).write_bytes(content)

        def once(content: bytes) -> None:
            path.write_bytes(content)
            try:
                judge(path)
            except BaseException:
                _keep(path.read_bytes(), folder, suffix)
                raise

        limits = ["-max_len=8192", "-timeout=10", f"-artifact_prefix={FOUND}/", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(corpus)], once)
        atheris.Fuzz()


def _keep(content: bytes, folder: str, suffix: str) -> None:
    kept = FOUND / f"{folder}-{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
    kept.write_bytes(content)
    print(
        f"\nFound: {kept}\nMake it smaller, copy it to tests/attacks/{folder}/ under a name that says what is wrong, "
        "and say in tests/attacks/expected.yaml what it must get.",
        flush=True,
    )
