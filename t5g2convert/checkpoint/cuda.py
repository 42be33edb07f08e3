"""Graphics cards, found without torch: importing it takes seconds."""

import ctypes
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from t5g2convert.printable import printable

DRIVER: Final = "libcuda.so.1"

# `cuda: Optional[str] = '12.8'` in torch/version.py; None there has no quotes.
_BUILD: Final = re.compile(r"""^cuda(?::[^=\n]*)?\s*=\s*['"]([^'"\n]+)['"]""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Cuda:
    """Graphics cards.

    Attributes:
        torch: The CUDA that torch was built for; None for a build without.
        driver: The CUDA that the driver knows; None where there is no driver.
        devices: The names of the cards.
    """

    torch: str | None
    driver: str | None
    devices: tuple[str, ...]


def find_cuda() -> Cuda:
    """The CUDA of torch and of the driver, which is asked itself."""
    build = _torch_build()
    try:
        driver: Any = ctypes.CDLL(DRIVER)
        version, count = ctypes.c_int(), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version)):
            return Cuda(build, None, ())
        if driver.cuDeviceGetCount(ctypes.byref(count)):
            return Cuda(build, None, ())
        names = [_device_name(driver, number) for number in range(count.value)]
    except (OSError, AttributeError):
        return Cuda(build, None, ())
    return Cuda(build, f"{version.value // 1000}.{version.value % 1000 // 10}", tuple(names))


def _device_name(driver: Any, number: int) -> str:
    text = ctypes.create_string_buffer(128)
    failed = driver.cuDeviceGetName(text, len(text), number)
    return "unknown" if failed else printable(text.value.decode(errors="replace"))


def _torch_build() -> str | None:
    """The CUDA that torch was built for, as its version.py says; torch is not imported."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        build = _BUILD.search(Path(found.origin).with_name("version.py").read_text())
    except (OSError, ValueError):
        return None
    return None if build is None else printable(build[1])
