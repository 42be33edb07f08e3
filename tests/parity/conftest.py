"""Fixtures for tests that damage a conversion; tests/conftest.py reports which checks caught the mutants."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from t5g2convert import convert
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.parity.replay import replay_plan
from t5g2convert.parity.reports.report import Check
from t5g2convert.reference.gemma3 import Gemma3Reference
from tests.conftest import TwinFolder
from tests.parity.mutations import CLOSED, PARITIES, Bench, Document, MakeBench

SUITE = "t5g2convert.parity.suites.t5gemma2"


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Pass a test's tally to the summary, from any xdist worker."""
    CLOSED.clear()
    yield
    for tally in CLOSED:
        record_property("mutants", {"tried": tally.tried, "survived": len(tally.survivors), **tally.caught})


@pytest.fixture
def bench(twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path) -> MakeBench:
    """Return a conversion of a twin that the test may damage."""

    def make(name: str, **options: Any) -> Bench:
        converted = converted_twin(name)
        if options:
            converted = tmp_path / "converted"
            convert(twin_folder(name), converted, **options)
        return Bench.of(twin_folder(name), converted, tmp_path / name)

    return make


@pytest.fixture
def same_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan and open a small source once, not for every mutant."""
    plans: dict[Path, Plan] = {}
    references: dict[object, Gemma3Reference] = {}

    def replayed(sources: Sources, recorded: Document, mapping: str | None, part: str | None = None) -> Plan:
        folder = sources.folders.source
        if recorded or mapping or part or sources.others:
            return replay_plan(sources, recorded, mapping, part)
        if folder not in plans:
            plans[folder] = replay_plan(sources, {}, None)
        return plans[folder]

    def opened(parent: Checkpoint, **options: Any) -> Gemma3Reference:
        if parent.nbytes > 1_000_000:
            return Gemma3Reference(parent, **options)
        key = (parent.path, *options.values())
        if key not in references:
            references[key] = Gemma3Reference(parent, resident=True, **options)
        return references[key]

    monkeypatch.setattr("t5g2convert.parity.replay.replay_plan", replayed)
    monkeypatch.setattr("t5g2convert.parity.suites.t5gemma2.Gemma3Reference", opened)
    monkeypatch.setattr("t5g2convert.parity.source_models.Gemma3Reference", opened)


@pytest.fixture
def without_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check that runs the model: the comparison with the source must suffice."""
    monkeypatch.setattr(
        "t5g2convert.parity.suites.t5gemma2.judge_runs", lambda *_, **__: Check("runs", True, "not made")
    )


@pytest.fixture
def without_passes(without_use: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the parity checks as well."""
    sound = [Check(name, True, "not made") for name in PARITIES]
    monkeypatch.setattr(f"{SUITE}.judge_text", lambda *_, **__: sound[1:])
    monkeypatch.setattr(
        "t5g2convert.parity.suites.base.judge_vision", lambda *_, **__: (sound[0], torch.zeros(1, 4, 24))
    )
