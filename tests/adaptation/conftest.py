"""A tiny model with images, packed real text, and one run of 60 steps that many tests read."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.adaptation.finetunings import pair_rows
from tests.adaptation.trainings import RUN_OPTIONS, adapt, runs_in_this_process, write_text


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return a function that makes a folder once, in the test process that needs it first."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "adaptation"
    root.mkdir(exist_ok=True)

    def folder(name: str, build: Callable[[Path], None]) -> Path:
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.done").exists():
                shutil.rmtree(root / name, ignore_errors=True)
                (root / name).mkdir()
                build(root / name)
                (root / f"{name}.done").touch()
        return root / name

    return folder


Shared = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def small(shared: Shared) -> Path:
    """`parent`, a Gemma 3 of two layers with images; `model`, its conversion; `data`, packed for it."""
    return shared("small", _write_small)


def _write_small(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    from t5g2convert import convert
    from t5g2convert.adaptation.data.documents import read_files
    from t5g2convert.adaptation.data.pack import pack
    from t5g2convert.cli import demo

    config: dict[str, Any] = deepcopy(demo.DEMO_CONFIG)
    config["text_config"] |= {"num_hidden_layers": 2, "sliding_window_pattern": 2}
    config["vision_config"]["num_hidden_layers"] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_CONFIG", config)
        demo.build_demo_source(folder / "parent")
    convert(folder / "parent", folder / "model")
    texts = folder / "texts"
    texts.mkdir()
    write_text(texts)
    noise = np.random.default_rng(0)
    rows = []
    for number in range(12):
        Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(texts / f"{number}.png")
        text = f"<start_of_image> Number {number} of twelve pictures of noise."
        rows.append({"text": text, "images": [f"{number}.png"]})
    (texts / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(folder / "model", folder / "data", read_files([texts], "text", lambda _: None))


@pytest.fixture(scope="session")
def two_corpora(shared: Shared, small: Path) -> Path:
    """A list of two corpora: `one`, a copy of the small model's data, and `two`, text only; 3 to 1."""

    def build(folder: Path) -> None:
        from t5g2convert.adaptation.data.documents import read_files
        from t5g2convert.adaptation.data.pack import pack

        shutil.copytree(small / "data", folder / "one")
        lines = (small / "texts/inspect.txt").read_text().splitlines()
        rows = (json.dumps({"text": line}) for line in lines if line)
        (folder / "lines.jsonl").write_text("".join(f"{row}\n" for row in rows))
        pack(small / "model", folder / "two", read_files([folder / "lines.jsonl"], "text", lambda _: None))
        (folder / "corpora.yaml").write_text("corpora: [{data: one, weight: 0.75}, {data: two, weight: 0.25}]\n")

    return shared("two_corpora", build) / "corpora.yaml"


@pytest.fixture(scope="session")
def trained(shared: Shared, small: Path) -> Path:
    """`run`, 60 steps in one process, every fourth with images; `output.json`, its output."""

    def build(folder: Path) -> None:
        done = adapt(small, folder / "run", *RUN_OPTIONS, "--micro-batch", "8", "--json")
        (folder / "output.json").write_text(done.stdout)

    return shared("trained", build)


@pytest.fixture(scope="session")
def pairs(shared: Shared, small: Path) -> Path:
    """40 pairs packed for the small model, every fourth with an image and one of these with two."""

    def build(folder: Path) -> None:
        from t5g2convert.adaptation.data.pack import pack

        pack(small / "model", folder / "data", pair_rows(small / "texts"))

    return shared("pairs", build) / "data"


@pytest.fixture
def one_process() -> Iterator[None]:
    """Restore the environment and destroy the process group after runs in this process."""
    with runs_in_this_process():
        yield
