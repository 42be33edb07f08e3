"""`t5g2 doctor`: checks the installation without network, and never shows the token."""

import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.cli import doctor as module
from t5g2convert.errors import OutputError, T5g2Error, UsageError
from t5g2convert.version import __version__
from tests.cli.commandline import CommandLine
from tests.hub.server import Hub, running
from tests.processes.forked import python, run_t5g2

TOKEN = "hf_doctorsecretdoctorsecretdoctor"
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = run_t5g2("doctor", *options, env=environment)
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN[3:12] not in done.stdout + done.stderr
    return done


def test_it_checks_everything_without_the_network(hub: Hub, tmp_path: Path) -> None:
    done = doctor("--json", **hub.env(tmp_path / "home", HF_TOKEN=TOKEN))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["version"] == __version__
    assert found["packages"]["torch"]["version"]
    assert found["packages"]["huggingface-hub"]["needed"]
    assert set(found["packages"]) >= {"transformers", "safetensors", "hf-xet"}
    assert found["hub"]["token_from"] == "HF_TOKEN"
    assert found["hub"]["cache"] == str(tmp_path / "home/hub")
    assert found["hub"]["cache_free"] > 0
    assert set(found["cuda"]) == {"torch", "devices", "warning"}
    assert found["problems"] == []
    assert hub.log == []
    assert not (tmp_path / "home").exists()


def test_people_get_a_table(hub: Hub, tmp_path: Path) -> None:
    done = doctor(**hub.env(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in done.stdout.splitlines() if line.strip()}
    assert rows["t5g2"] == __version__
    assert rows["token"] == "none"
    assert rows["cache"].endswith("free")
    assert rows["CUDA"].startswith("torch is built")
    assert hub.log == []


def test_a_token_in_a_file_or_fetched_on_demand_is_found_and_not_fetched(hub: Hub, tmp_path: Path) -> None:
    def token_from(**environment: str) -> object:
        done = doctor("--json", **hub.env(tmp_path, **environment))
        assert done.returncode == 0
        return json.loads(done.stdout)["hub"]["token_from"]

    assert token_from(HF_OIDC_RESOURCE=f"{hub.url}/org/name") == "HF_OIDC_RESOURCE"
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert token_from() == "file"
    (tmp_path / "token").write_text("\n")
    assert token_from() is None
    assert hub.log == []


SECRET = f"https://user:{TOKEN}@hub.example.org/hf?key={TOKEN}#{TOKEN}"
NO_ADDRESS = (TOKEN, f"https://[{TOKEN}", f"https://hub.example.org:{TOKEN}", f"ftp://{TOKEN}")


@pytest.mark.parametrize("endpoint", [SECRET, *NO_ADDRESS])
@pytest.mark.parametrize("options", [["--json"], [], ["--debug"]], ids=["json", "table", "debug"])
def test_H6_a_secret_in_the_endpoint_is_not_shown(
    endpoint: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    done = CommandLine(capsys)("doctor", *options)
    assert TOKEN[3:12] not in done.out + done.err
    if endpoint == SECRET:
        assert (done.code, done.err) == (0, "")
    else:
        assert (done.code, done.err.count("\n")) == (7, 1)
        assert "HF_ENDPOINT is not a URL" in done.err


def test_a_cache_that_cannot_be_created_is_a_problem(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor(**hub.env(tmp_path, HF_HUB_CACHE=str(tmp_path / "file/hub")))
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert f"{tmp_path / 'file'}: the Hub's cache cannot be created: not a folder" in done.stderr


def test_maps_that_cannot_be_read_are_a_problem(hub: Hub, tmp_path: Path) -> None:
    script = (
        "import sys\nimport t5g2convert.mapping.library as library\nfrom pathlib import Path\n"
        "library.mappings_folder = lambda: Path(sys.argv[1])\n"
        "from t5g2convert.cli.main import main\nmain(['doctor'])\n"
    )
    (tmp_path / "bad.yaml").write_text("format: 2\n")
    run = python(["-c", script, tmp_path], env=hub.env(tmp_path / "home"))
    assert run.returncode == 4
    assert "bad.yaml" in run.stderr
    assert os.linesep not in run.stderr.strip()


# Libraries


def unfit(monkeypatch: pytest.MonkeyPatch, *needs: str) -> list[T5g2Error]:
    monkeypatch.setattr(module.metadata, "requires", lambda name: list(needs))
    return list(module._unfit(module._packages()))


def test_every_requirement_of_the_project_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.metadata, "requires", lambda name: [*PROJECT["dependencies"], "b>=1; extra == 'test'"])
    needed = {name: needs for name, (_, needs) in module._packages().items() if needs is not None}
    written = dict(need.split(">=") for need in PROJECT["dependencies"])
    assert needed == {re.sub("_", "-", name): version for name, version in written.items()}


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("nothing-like-this>=1.5", "nothing-like-this is not installed, expected 1.5 or newer"),
        ("pyyaml>=99.0", "expected 99.0 or newer"),
    ],
)
def test_a_library_that_is_missing_or_too_old_is_a_problem(
    needs: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = unfit(monkeypatch, needs)
    assert isinstance(problem, UsageError)
    assert message in problem.message
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
    monkeypatch.setattr(module, "_version", lambda name: version if name == "thing" else None)
    assert (unfit(monkeypatch, f"thing>={needed}") == []) == enough


def test_a_checkout_that_is_not_installed_has_no_known_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISTRIBUTION", "not-installed-anywhere")
    packages = module._packages()
    assert {needed for _, needed in packages.values()} == {None}
    assert packages["huggingface-hub"][0] is not None


# The Hub's client and torch


@pytest.mark.parametrize(
    ("name", "check"), [("huggingface_hub", module._check_hub), ("torch", module._check_cuda)], ids=["hub", "torch"]
)
@pytest.mark.parametrize("installed", [True, False])
def test_a_library_that_cannot_be_imported_is_a_problem(
    name: str, check: Any, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(module, "_version", lambda _: "1" if installed else None)
    problems: list[T5g2Error] = []
    check(problems)
    assert ["cannot be imported: " in problem.message for problem in problems] == [True] * installed


def test_a_cache_that_is_not_writable_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not/yet/there"))
    problems: list[T5g2Error] = []
    module._check_hub(problems)
    assert problems == []
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    module._check_hub(problems)
    assert [(type(problem), problem.where) for problem in problems] == [(OutputError, str(tmp_path))]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "link/hub"))
    module._check_hub(problems)
    assert "not a folder" in problems[1].message


def test_the_devices_of_torch_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card \x1b[{number}m")
    assert module._check_cuda([]) == {
        "torch": "12.8",
        "devices": ["Card \\x1b[0m", "Card \\x1b[1m"],
        "warning": None,
    }


def test_a_driver_that_is_too_old_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def too_old() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    cuda = module._check_cuda([])
    assert (cuda["devices"], "too old" in cuda["warning"]) == ([], True)
    module._print({}, None, cuda)
    assert "too old" in capsys.readouterr().out
