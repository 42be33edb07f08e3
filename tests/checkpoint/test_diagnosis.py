import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from t5g2convert.checkpoint import diagnosis
from t5g2convert.checkpoint.diagnosis import diagnose
from t5g2convert.errors import OutputError, UsageError

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_everything_that_the_project_needs_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_requirements", lambda: PROJECT["dependencies"])
    needed = {name: package.needed for name, package in diagnose().packages.items() if package.needed is not None}
    written = dict(need.split(">=") for need in PROJECT["dependencies"])
    assert needed == {re.sub("_", "-", name): version for name, version in written.items()}


def test_optional_requirements_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda name: ["a>=1", "b>=1; extra == 'test'"])
    assert diagnosis._requirements() == ["a>=1"]


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        ("nothing-like-this>=1.5", "nothing-like-this is not installed, expected 1.5 or newer"),
        ("pyyaml>=99.0", "expected 99.0 or newer"),
    ],
)
def test_a_library_that_is_missing_or_too_old_is_a_problem(
    needs: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_requirements", lambda: [needs])
    (problem,) = diagnose().problems
    assert isinstance(problem, UsageError)
    assert told in problem.message
    assert problem.hint == f"pip install '{needs}'"


@pytest.mark.parametrize(
    ("version", "needed", "enough"),
    [
        ("2.13.0+cpu", "2.6", True),
        ("2.6", "2.6.0", True),
        ("10.0", "9.9", True),
        ("2.5.9", "2.6", False),
        ("1.31.0.dev0", "1.31", True),
        ("0", "0.0.1", False),
        ("unknown", "1", False),
    ],
)
def test_versions_are_compared_by_their_numbers(
    version: str, needed: str, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_requirements", lambda: [f"thing>={needed}"])
    monkeypatch.setattr(diagnosis, "_version", lambda name: version if name == "thing" else None)
    assert (diagnose().problems == ()) == enough


def test_without_the_hub_s_client_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_requirements", lambda: ["huggingface-hub>=1.31"])
    monkeypatch.setattr(diagnosis, "_version", lambda name: None)
    found = diagnose(online=True)
    assert (found.hub, found.user) == (None, None)
    assert [problem.message for problem in found.problems] == [
        "huggingface-hub is not installed, expected 1.31 or newer"
    ]


def test_a_client_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = diagnose()
    (problem,) = found.problems
    assert isinstance(problem, UsageError)
    assert "huggingface-hub cannot be imported: " in problem.message
    assert found.hub is None


def test_a_checkout_that_is_not_installed_needs_nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "DISTRIBUTION", "not-installed-anywhere")
    found = diagnose()
    assert {package.needed for package in found.packages.values()} == {None}
    assert found.packages["huggingface-hub"].version is not None


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(diagnosis._cache_faults(tmp_path / "not/yet/there")) == []
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (problem,) = diagnosis._cache_faults(tmp_path / "not/yet/there")
    assert isinstance(problem, OutputError)
    assert problem.where == str(tmp_path)


def test_a_cache_behind_a_link_that_leads_nowhere_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (problem,) = diagnosis._cache_faults(tmp_path / "link/hub")
    assert "no folder" in problem.message
