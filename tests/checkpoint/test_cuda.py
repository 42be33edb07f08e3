"""Graphics cards by their driver; a library of our own stands for it, as tests have none."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from t5g2convert.checkpoint import cuda
from t5g2convert.checkpoint.cuda import Cuda, find_cuda

SOURCE: Final = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return COUNT; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device ? "Card \\x1b[31m" : "Card 0", size);
    return device * NAME;
}
"""


def driver(folder: Path, init: int = 0, count: int = 0, name: int = 0) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "driver.c").write_text(SOURCE)
    places = [f"-DINIT={init}", f"-DCOUNT={count}", f"-DNAME={name}"]
    subprocess.run([compiler, "-shared", "-fPIC", *places, "-o", folder / "driver.so", folder / "driver.c"], check=True)
    return str(folder / "driver.so")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cuda, "_torch_build", lambda: "12.6")
    return "12.6"


def test_the_driver_tells_its_version_and_its_cards(
    build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "DRIVER", driver(tmp_path))
    assert find_cuda() == Cuda(build, "12.8", ("Card 0", "Card \\x1b[31m"))


def test_a_card_without_a_name_is_counted(build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DRIVER", driver(tmp_path, name=1))
    assert find_cuda() == Cuda(build, "12.8", ("Card 0", "unknown"))


@pytest.mark.parametrize("fault", [{"init": 100}, {"count": 1}])
def test_a_driver_that_fails_is_none(
    fault: dict[str, int], build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "DRIVER", driver(tmp_path, **fault))
    assert find_cuda() == Cuda(build, None, ())


def test_no_driver_is_none(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DRIVER", "libnothing-like-this.so.1")
    assert find_cuda() == Cuda(build, None, ())
    monkeypatch.setattr(cuda, "DRIVER", "libc.so.6")
    assert find_cuda() == Cuda(build, None, ()), "a library that is no driver"


def test_the_build_is_torch_s_own_word() -> None:
    import torch

    assert cuda._torch_build() == torch.version.cuda


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "12.8"),
        ('cuda = "13.0"\n', "13.0"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.1'\n", None),
        ("", None),
        ("xcuda = '1'\n", None),
    ],
)
def test_the_build_stands_in_version_py(
    text: str, build: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(text)

    class Found:
        origin = str(tmp_path / "torch/__init__.py")

    monkeypatch.setattr(cuda, "find_spec", lambda name: Found)
    assert cuda._torch_build() == build
    (tmp_path / "torch/version.py").unlink()
    assert cuda._torch_build() is None
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert cuda._torch_build() is None
