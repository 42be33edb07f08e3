"""The first sentinel of a run: found in the model's tokenizer, recorded, and the same from leg to leg."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import DataError, UsageError, generate
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.ul2.mixture import Mixture, read_mixture
from t5g2convert.checkpoint.manifest import read_manifest
from tests.adaptation.trainings import changed, request_of, run, settings_of

pytestmark = pytest.mark.usefixtures("one_process")

HIGHEST, NEXT = 252, 251
"""The highest unused id of the small model's vocabulary, and the id below it."""


def mixture(first: str | int | None) -> Mixture:
    return read_mixture().model_copy(update={"first_sentinel": first})


def name_of(model: Path, token: int) -> str:
    vocabulary: dict[str, int] = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return next(name for name, number in vocabulary.items() if number == token)


def test_samples_use_the_first_sentinel_of_the_mixture(small: Path) -> None:
    model = small / "model"
    for first, expected in ((None, HIGHEST), (NEXT, NEXT), (name_of(model, NEXT), NEXT)):
        samples = prepare(model, small / "data", settings_of(mixture=mixture(first))).samples
        assert samples.sentinels.first == expected
        assert samples.settings.mixture.first_sentinel == name_of(model, expected)


def test_the_first_sentinel_is_part_of_the_objective(small: Path) -> None:
    one, same, other = (
        prepare(small / "model", small / "data", settings_of(mixture=mixture(first))).samples.settings
        for first in (None, HIGHEST, NEXT)
    )
    assert one.objective_sha256 == same.objective_sha256 != other.objective_sha256


def test_a_run_records_it_and_goes_on_only_with_it(small: Path, tmp_path: Path) -> None:
    model, settings = small / "model", settings_of(steps=2)
    request = request_of(small, tmp_path / "run", settings, export=True)
    outcome, _ = run(request)
    name = name_of(model, HIGHEST)
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["mixture"]["first_sentinel"] == name
    assert outcome.exported is not None
    trained = outcome.exported.output
    record = read_manifest(trained).adaptation
    assert record is not None
    assert record.settings.mixture.first_sentinel == name

    # Resumed with another one.
    with pytest.raises(UsageError, match="cannot be resumed with these options: mixture"):
        run(changed(request, mixture=mixture(NEXT), resume=True, steps=4, export=False))

    # A new run that starts from the trained model.
    prepare(trained, small / "data", settings)
    prepare(trained, small / "data", settings_of(mixture=mixture(name)))
    with pytest.raises(
        DataError, match=rf"was trained with sentinels from {name} downwards, but .* is {name_of(model, NEXT)}"
    ):
        prepare(trained, small / "data", settings_of(mixture=mixture(NEXT)))

    # `t5g2 generate --infill` reads it there.
    assert "[MASK]" in "".join(generate(trained, "a [MASK] b", infill=True, max_new_tokens=1))


def test_a_model_trained_by_version_0_1_0_began_with_the_highest_id(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    def trained(**changes: Any) -> Any:
        tasks = [SimpleNamespace(sentinel=each) for each in changes.get("sentinels", (True, False))]
        kept = SimpleNamespace(first_sentinel=None, tasks=tasks)
        return SimpleNamespace(adaptation=SimpleNamespace(ul2=SimpleNamespace(mixture=kept)))

    monkeypatch.setattr("t5g2convert.adaptation.train.samples.read_manifest", lambda _: trained())
    prepare(small / "model", small / "data", settings_of())
    with pytest.raises(DataError, match=f"from {HIGHEST} downwards"):
        prepare(small / "model", small / "data", settings_of(mixture=mixture(NEXT)))
    # A training without sentinels fits every mixture.
    monkeypatch.setattr("t5g2convert.adaptation.train.samples.read_manifest", lambda _: trained(sentinels=(False,)))
    prepare(small / "model", small / "data", settings_of(mixture=mixture(NEXT)))
