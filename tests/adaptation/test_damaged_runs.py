"""T5: files of runs and of packed data are changed at random; they still work or are refused with one of our errors."""

import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from t5g2convert.adaptation.average import average
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.train.checkpoint_manifest import check_files, complete_checkpoints, read_checkpoint_manifest
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.train.checkpoints import State, load
from t5g2convert.adaptation.train.history import check_same, describe, newest, read_history
from t5g2convert.adaptation.train.metrics import Metrics, plot_losses, read_metrics, tokens_until, truncate
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.train.run_folder import check_own_files
from t5g2convert.errors import CheckpointError, DataError, OutputError, T5g2Error
from tests.adaptation.runs import CORPORA, SETTINGS, SHARD, write_checkpoint, write_manifest

NASTY: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**48, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "x", "\0",
    "../../x", "/dev/zero", "a" * 5000, "$\\frac{", [], {}, [[]], {"": None}, [1] * 300, "0" * 64,
]  # fmt: skip
"""Values that no valid file contains."""

TENSORS = {"model.encoder.norm.weight": torch.arange(6.0).view(3, 2), "model.decoder.norm.weight": torch.ones(4)}
SECONDS = 2.0
"""Limit of processor time for one attempt; each takes a few hundredths."""


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the data with bytes changed, removed, inserted or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) or 1)
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at : at + rng.randint(1, 9)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3:
                changed[at : at + 4] = b"\xff\xff\xff\x7f"
            case 4 if rng.random() < 0.1:
                del changed[at:]
    return bytes(changed)


def altered(document: Any, rng: random.Random) -> Any:
    """Return a JSON document with an invalid value, a key too many or a key too few."""
    if not isinstance(document, dict | list) or not document or rng.random() < 0.1:
        return rng.choice(NASTY)
    if isinstance(document, list):
        place = rng.randrange(len(document))
        return [*document[:place], altered(document[place], rng), *document[place + 1 :]]
    key = rng.choice(sorted(document))
    changed = {**document, key: altered(document[key], rng)}
    if rng.random() < 0.1:
        changed |= {rng.choice(["more", "", "../x"]): rng.choice(NASTY)}
    if rng.random() < 0.1:
        del changed[key]
    return changed


def mutated(data: bytes, rng: random.Random, *, lines: bool = False) -> bytes:
    """Return a JSON or JSONL file, damaged or altered."""
    if rng.random() < 0.4:
        return damaged(data, rng)
    if not lines:
        return json.dumps(altered(json.loads(data), rng)).encode()
    each = data.splitlines(keepends=True)
    place = rng.randrange(len(each))
    each[place] = json.dumps(altered(json.loads(each[place]), rng)).encode() + b"\n"
    return b"".join(each)


@contextmanager
def refused_in_time(*kinds: type[T5g2Error]) -> Iterator[None]:
    began, message = time.process_time(), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except kinds as error:
            message = str(error)
    assert "\n" not in message
    assert len(message) < 20_000
    assert time.process_time() - began < SECONDS


def fuzz(path: Path, tries: int, seed: int, use: Callable[[], object], *kinds: type[T5g2Error], **how: Any) -> None:
    """Change a file at random and use it, many times."""
    rng, original = random.Random(seed), path.read_bytes()
    use()
    for _ in range(tries):
        path.write_bytes(mutated(original, rng, **how))
        with refused_in_time(*kinds):
            use()
    path.write_bytes(original)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    document = describe(SETTINGS, model="a" * 64, model_folder=tmp_path / "model", corpora=CORPORA, versions={})
    write_checkpoint(folder / "checkpoints/step-00000020", TENSORS, 20)
    (folder / "run.json").write_text(json.dumps(document))
    steps = [Metrics(n, "text", 1.5, {"r": 1.5}, {"r": 100}, 1.0, 1e-3, 512, 1e4) for n in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps))
    return folder


def test_T5_a_damaged_run_json(run: Path, tmp_path: Path) -> None:
    description = describe(SETTINGS, model="a" * 64, model_folder=tmp_path, corpora=CORPORA, versions={})

    def use() -> None:
        check_own_files(run)
        try:
            read_history(run)
        finally:
            check_same(run, description)

    fuzz(run / "run.json", 300, 1, use, T5g2Error)


def test_T5_a_setting_that_was_edited_is_named(run: Path) -> None:
    path = run / "run.json"
    for name, value in {"warmup": 101, "lr": 0.5, "encoder_length": 65}.items():
        document = describe(SETTINGS, model="a" * 64, model_folder=run, corpora=CORPORA, versions={})
        document["settings"][name] = value
        path.write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=r"run\.json: settings: one( of the objective)? was modified after"):
            read_history(run)
        document["settings"][name] = "x"
        path.write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=rf"run\.json: settings.*{name}|run\.json: settings: "):
            read_history(run)


def test_T5_a_damaged_log(run: Path, tmp_path: Path) -> None:
    path = run / "metrics.jsonl"

    def use() -> None:
        steps = read_metrics(path)
        plot_losses(steps, tmp_path / "loss.svg")
        tokens_until(steps, 20, path)
        truncate(path, 20)

    fuzz(path, 60, 2, use, CheckpointError, lines=True)


def state() -> State:
    parameters = {name: nn.Parameter(torch.zeros_like(tensor)) for name, tensor in TENSORS.items()}
    return State(parameters, torch.optim.AdamW(parameters.values()))


def read_all(folder: Path) -> None:
    trained = CheckpointReader(folder)
    check_files(folder, trained.manifest)
    for name in trained.names:
        trained.read(name)


def test_T5_a_damaged_record(run: Path) -> None:
    def use() -> None:
        complete_checkpoints(run)
        newest(run, SETTINGS)
        read_all(run / "checkpoints/step-00000020")

    fuzz(run / "checkpoints/step-00000020/checkpoint.json", 300, 3, use, CheckpointError)


@pytest.mark.parametrize("part", ["header", "all"])
def test_T5_a_damaged_checkpoint_with_a_matching_manifest(run: Path, part: str) -> None:
    """The sha256 does not help against an attacker who can write it."""
    folder, name = run / "checkpoints/step-00000020", SHARD
    with refused_in_time():
        read_all(folder)
        load(folder, state())
    rng, original = random.Random(part), (folder / name).read_bytes()
    size = 8 + int.from_bytes(original[:8], "little") if part == "header" else len(original)
    for _ in range(400):
        (folder / name).write_bytes(damaged(original[:size], rng) + original[size:])
        with refused_in_time(CheckpointError):
            read_all(folder)
        write_manifest(folder, 20)
        for use in (lambda: read_all(folder), lambda: load(folder, state())):
            with refused_in_time(CheckpointError):
                use()


def test_T5_a_damaged_index(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "data", tmp_path / "data")

    def use() -> None:
        Packed.open(tmp_path / "data", verify=True)
        prepare(small / "model", tmp_path / "data", SETTINGS)

    fuzz(tmp_path / "data/index.json", 150, 4, use, DataError, CheckpointError)


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


STRANGE: Mapping[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo, "device": _zero, "folder": Path.mkdir, "loop": _loop,
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(
    "name", ["index.json", "text.doc", "text-00000.bin", "counts.bin", "image.pic", "pictures-00000.bin"]
)
def test_T5_special_files_in_packed_data_are_named_without_waiting(
    small: Path, tmp_path: Path, name: str, kind: str
) -> None:
    shutil.copytree(small / "data", tmp_path / "data")
    (tmp_path / "data" / name).unlink(missing_ok=True)
    STRANGE[kind](tmp_path / "data" / name)
    with pytest.raises(DataError, match=name):
        Packed.open(tmp_path / "data", verify=True)


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "checkpoints/step-00000020/" + SHARD])
def test_T5_special_files_in_a_run_are_named_without_waiting(
    run: Path, tmp_path: Path, name: str, kind: str, converted_twin: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (run / name).unlink()
    STRANGE[kind](run / name)
    monkeypatch.setattr("t5g2convert.adaptation.average.check_model", lambda *_: None)
    with pytest.raises(CheckpointError, match=Path(name).name):
        average(run, tmp_path / "out", last=1, model=converted_twin("text-8"))


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "run.json", "loss.svg", "checkpoints", "tensorboard", "tensorboard/x"]
)
def test_T5_a_run_with_links_in_place_of_its_files_is_not_resumed(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match=rf"{name}: is "):
        check_own_files(run)


def test_T5_a_link_is_not_a_checkpoint(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints/step-00000020").rename(tmp_path / "elsewhere")
    (run / "checkpoints/step-00000020").symlink_to(tmp_path / "elsewhere")
    assert complete_checkpoints(run) == {}


def test_T5_names_in_a_record_stay_in_its_folder(run: Path) -> None:
    folder = run / "checkpoints/step-00000020"
    document = json.loads((folder / "checkpoint.json").read_text())
    for name in ("/dev/zero", "../../../pipe", "..", "checkpoint.json", f"{SHARD}\n", ".metadata", "x"):
        (folder / "checkpoint.json").write_text(
            json.dumps({**document, "files": {**document["files"], name: "0" * 64}})
        )
        with pytest.raises(CheckpointError, match=r"checkpoint\.json: files: "):
            read_checkpoint_manifest(folder)
