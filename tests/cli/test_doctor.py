"""`t5g2 doctor`: it tells what is there, never the token, and asks the network only if that is wanted."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5g2convert.version import __version__
from tests.forked import python, run_t5g2
from tests.hub_server import Fault, Hub, running

TOKEN = "hf_doctorsecretdoctorsecretdoctor"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = run_t5g2("doctor", *options, env=environment)
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN[3:12] not in done.stdout + done.stderr
    return done


def answer(body: object, status: int = 200) -> Fault:
    headers = {"Content-Type": "application/json"}
    return Fault("/api/whoami-v2", 5, status=status, body=json.dumps(body).encode(), headers=headers)


def test_it_tells_what_is_there_and_asks_nothing(hub: Hub, tmp_path: Path) -> None:
    done = doctor("--json", **hub.env(tmp_path / "home", HF_TOKEN=TOKEN))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["version"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"]["version"]
    assert found["packages"]["huggingface-hub"]["needed"]
    assert set(found["packages"]) >= {"transformers", "safetensors", "hf-xet"}
    settings = found["hub"]
    assert settings["endpoint"] == hub.url
    assert (settings["token"], settings["token_from"]) == (True, "HF_TOKEN")
    assert (settings["offline"], settings["xet"]) == (False, False)
    assert settings["cache"] == str(tmp_path / "home/hub")
    assert settings["cache_free"] > 0
    assert (found["user"], found["problems"]) == (None, [])
    assert hub.log == []
    assert not (tmp_path / "home").exists()


def test_people_get_a_table(hub: Hub, tmp_path: Path) -> None:
    done = doctor(**hub.env(tmp_path, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="0"))
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in done.stdout.splitlines() if line.strip()}
    assert rows["t5g2"] == __version__
    assert rows["token"] == "none"
    assert rows["offline"].startswith("yes")
    assert rows["xet"] == "on"
    assert rows["CUDA"].startswith("torch is built")
    assert hub.log == []


def test_a_token_of_a_file_is_found_and_not_shown(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    found = json.loads(doctor("--json", **hub.env(tmp_path)).stdout)
    assert (found["hub"]["token"], found["hub"]["token_from"]) == (True, "file")
    (tmp_path / "token").write_text("\n")
    assert json.loads(doctor("--json", **hub.env(tmp_path)).stdout)["hub"]["token"] is False
    assert hub.log == []


def test_a_token_that_is_fetched_when_needed_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    done = doctor("--json", **hub.env(tmp_path, HF_OIDC_RESOURCE=f"{hub.url}/org/name"))
    assert done.returncode == 0
    assert json.loads(done.stdout)["hub"]["token_from"] == "HF_OIDC_RESOURCE"
    assert hub.log == []


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        (f"https://user:{TOKEN}@hub.example.org:8443/hf?key={TOKEN}#{TOKEN}", "https://hub.example.org:8443/hf"),
        (f"https://{TOKEN}@hub.example.org", "https://hub.example.org"),
    ],
)
@pytest.mark.parametrize("options", [["--json"], [], ["--debug"]], ids=["json", "table", "debug"])
def test_H6_a_secret_in_the_endpoint_is_not_shown(
    endpoint: str, shown: str, options: list[str], hub: Hub, tmp_path: Path
) -> None:
    done = doctor(*options, **hub.env(tmp_path, HF_ENDPOINT=endpoint))
    assert done.returncode == 0
    assert shown in done.stdout


@pytest.mark.parametrize("endpoint", [TOKEN, f"https://[{TOKEN}", f"https://hub.example.org:{TOKEN}", f"ftp://{TOKEN}"])
@pytest.mark.parametrize("options", [["--json"], [], ["--debug"]], ids=["json", "table", "debug"])
def test_H6_an_endpoint_that_is_no_address_is_told_and_not_shown(
    endpoint: str, options: list[str], hub: Hub, tmp_path: Path
) -> None:
    done = doctor(*options, **hub.env(tmp_path, HF_ENDPOINT=endpoint))
    assert (done.returncode, done.stderr.count("\n")) == (7, 1)
    assert "HF_ENDPOINT is no address" in done.stderr


def test_the_hub_says_whom_the_token_is_of(hub: Hub, tmp_path: Path) -> None:
    secret = {"displayName": TOKEN, "role": "write"}
    hub.faults.append(answer({"name": "me\x1b[31m", "auth": {"accessToken": secret}}))
    environment = hub.env(tmp_path, HF_TOKEN=TOKEN)
    found = json.loads(doctor("--online", "--json", **environment).stdout)
    assert found["user"] == {"name": "me\\x1b[31m", "role": "write"}
    assert [request.path for request in hub.log].count("/api/whoami-v2") == 1
    done = doctor("--online", **environment)
    assert "me\\x1b[31m, token with role write" in done.stdout


@pytest.mark.parametrize(
    ("fault", "environment", "told"),
    [
        (None, {}, "there is no token to ask with"),
        (None, {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so it is not asked"),
        (answer({"error": TOKEN}, 401), {"HF_TOKEN": TOKEN}, "the Hub does not accept the token"),
        (answer({"error": TOKEN}, 429), {"HF_TOKEN": TOKEN}, "was asked too often"),
        (answer({"error": TOKEN}, 500), {"HF_TOKEN": TOKEN}, "answers with status 500"),
        (answer([TOKEN]), {"HF_TOKEN": TOKEN}, "does not answer as the Hub does"),
        (answer({"no": TOKEN}), {"HF_TOKEN": TOKEN}, "does not answer as the Hub does"),
        (answer({"name": [TOKEN]}), {"HF_TOKEN": TOKEN}, "does not answer as the Hub does"),
        (None, {"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
    ids=["no-token", "offline", "401", "429", "500", "list", "no-name", "list-of-names", "unreached"],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
def test_H1_what_keeps_the_hub_from_answering_is_one_line(
    fault: Fault | None, environment: dict[str, str], told: str, as_json: bool, hub: Hub, tmp_path: Path
) -> None:
    hub.faults += [] if fault is None else [fault]
    done = doctor("--online", *["--json"] * as_json, **hub.env(tmp_path, **environment))
    assert (done.returncode, done.stderr.count("\n")) == (7, 1), done.stderr
    assert told in done.stderr
    assert "transformers" in done.stdout, "the rest is told all the same"
    if as_json:
        (problem,) = json.loads(done.stdout)["problems"]
        assert problem["code"] == 7
        assert told in problem["message"]


@pytest.mark.parametrize("auth", [TOKEN, {"accessToken": TOKEN}, {"accessToken": {"role": [TOKEN]}}, {}, None])
def test_a_role_that_is_not_told_is_none(auth: object, hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(answer({"name": "me", "auth": auth}))
    found = json.loads(doctor("--online", "--json", **hub.env(tmp_path, HF_TOKEN=TOKEN)).stdout)
    assert found["user"] == {"name": "me", "role": None}


def test_a_cache_that_cannot_be_is_a_problem(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor(**hub.env(tmp_path, HF_HUB_CACHE=str(tmp_path / "file/hub")))
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert f"{tmp_path / 'file'}: the Hub's cache cannot be there: it is no folder" in done.stderr


def test_maps_that_are_missing_are_a_problem(hub: Hub, tmp_path: Path) -> None:
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
