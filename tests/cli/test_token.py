"""The Hub token never appears in printed or written output, whatever fails."""

import os
import secrets
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Final

import pytest

from t5g2convert import convert
from t5g2convert.cli.demo import build_demo_source
from tests.processes.forked import python

BUG: Final = """
import sys
import t5g2convert.mapping.inspection as inspection

def fail(path, **_):
    import os
    token = os.environ["HF_TOKEN"]  # in a local variable, as a client of the Hub has it
    return 1 // 0 if token else None

inspection.open_source = fail
from t5g2convert.cli.main import main
main(sys.argv[1:])
"""

RUN: Final = "import sys; from t5g2convert.cli.main import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def token() -> str:
    """Return a new token in each run, so that no file contains it by chance."""
    return f"hf_{secrets.token_hex(17)}"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, token: str) -> Path:
    folder = tmp_path_factory.mktemp("work")
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "out", flush=False)
    (folder / "text.txt").write_text("a text to be read")
    (folder / "bad.yaml").write_text("format: 2\n")
    (folder / "card.md").write_text("---\nlicense: gemma\n---\n")
    (folder / "full").mkdir()
    (folder / "full/mine.txt").touch()
    (folder / "home").mkdir()
    (folder / "home/token").write_text(token)
    (folder / "home/stored_tokens").write_text(f"[mine]\nhf_token = {token}\n")
    return folder


GOOD: Final = [
    "demo --out DEMO",
    "inspect SOURCE --tensors",
    "plan SOURCE --tensors",
    "plan SOURCE --json",
    "convert SOURCE NEW --verify --json",
    "mappings list",
    "mappings check gemma3 --against SOURCE --json",
    "verify OUT --source SOURCE --junit JUNIT --html HTML",
    "verify OUT --source SOURCE --json",
    "compare SOURCE OUT --text TEXT",
    "generate OUT --prompt x --max-new-tokens 2",
    "card OUT --source-card CARD --write",
    "doctor",
    "doctor --json",
]
BAD: Final = {
    "plan SOURCE --nope": 2,
    "plan SOURCE --dtype int8": 2,
    "inspect MISSING": 3,
    "plan OUT": 3,
    "mappings check BADMAP": 4,
    "plan SOURCE --mapping nope": 4,
    "convert SOURCE FULL": 5,
    "verify OUT --source SOURCE --html MISSING/x.html": 5,
    "compare SOURCE OUT --text TEXT --max-kl 0 --min-agreement 1": None,
    "generate SOURCE --prompt x": 3,
    "card OUT --source-card MISSING": 3,
}

ECHOES: Final = {
    401: "datasets/org/name: the Hub rejected the token",
    403: "datasets/org/name: the token may not read it",
    307: "cannot be reached, or closed the connection (TooManyRedirects)",
}


def run(work: Path, token: str, line: str, script: str = RUN) -> subprocess.CompletedProcess[str]:
    places = {
        "SOURCE": "source", "OUT": "out", "NEW": "new", "MISSING": "gone", "MISSING/x.html": "gone/x.html",
        "BADMAP": "bad.yaml", "FULL": "full", "TEXT": "text.txt", "JUNIT": "x.xml", "HTML": "x.html", "DEMO": "demo",
        "CARD": "card.md",
    }  # fmt: skip
    arguments = [str(work / places[word]) if word in places else word for word in line.split()]
    tokens = {"HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": token, "HF_HOME": str(work / "home")}
    return python(["-c", script, *arguments], cwd=work, env={**os.environ, **tokens})


def holders(folder: Path, token: str) -> list[str]:
    """Return the files with the token, hidden ones too, but not those that must have it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "home"]
    return [path.name for path in files if token.encode() in path.read_bytes()]


@pytest.mark.slow
def test_H6_a_successful_run_prints_and_writes_no_token(
    work: Path, token: str, record_property: Callable[[str, object], None]
) -> None:
    for line in GOOD:
        done = run(work, token, line)
        assert done.returncode == 0, (line, done.stderr)
        assert token not in done.stdout + done.stderr, line
    assert {"x.xml", "x.html", "new", "demo"} <= {path.name for path in work.iterdir()}
    assert holders(work, token) == []
    assert [path.name for path in (work / "home").iterdir() if token in path.read_text()], "the search finds it"
    record_property("token_runs", len(GOOD))


@pytest.mark.sampled
@pytest.mark.parametrize("option", ["", " --debug", " --json"], ids=["plain", "debug", "json"])
def test_H6_no_error_contains_the_token(
    option: str, work: Path, token: str, record_property: Callable[[str, object], None]
) -> None:
    for line, code in BAD.items():
        if option == " --json" and line.startswith(("generate", "card")):
            continue
        done = run(work, token, line + option)
        assert code is None or done.returncode == code, (line, done.stderr)
        assert token not in done.stdout + done.stderr, line
    assert holders(work, token) == []
    record_property("token_runs", len(BAD))


@pytest.mark.parametrize("option", ["", " --debug", " --json"], ids=["plain", "debug", "json"])
def test_H6_no_traceback_of_a_bug_contains_the_token(option: str, work: Path, token: str) -> None:
    done = run(work, token, f"inspect SOURCE{option}", BUG)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert ("Traceback" in done.stderr) == (option == " --debug")
    assert token not in done.stdout + done.stderr


@pytest.mark.sampled
@pytest.mark.parametrize("option", [[], ["--debug"], ["--json"]], ids=["plain", "debug", "json"])
@pytest.mark.parametrize("form", ["https://user:{}@huggingface.co/x", "https://{}@huggingface.co/x"])
@pytest.mark.parametrize("line", ["inspect URL", "plan URL", "convert URL new2", "convert SOURCE URL", "verify URL"])
def test_H6_a_token_in_a_url_given_as_folder_is_not_printed(
    line: str, form: str, option: list[str], work: Path, token: str
) -> None:
    """Errors end up in logs; the argument is known only to the user."""
    done = run(work, token, " ".join([line.replace("URL", form.format(token)), *option]))
    assert done.returncode == (5 if line.endswith("SOURCE URL") else 3)
    assert "got a URL (https://...)" in done.stderr
    assert token not in done.stdout + done.stderr
    assert holders(work, token) == []


class Echo(BaseHTTPRequestHandler):
    """Echo the request in a header and in an address."""

    status: ClassVar[int]

    def do_GET(self) -> None:
        sent = self.headers.get("Authorization", "")
        self.send_response(self.status)
        self.send_header("X-Error-Message", f"you sent {sent}")
        if self.status == 307:
            self.send_header("Location", f"http://{self.headers['Host']}/x?token={sent.replace(' ', '_')}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names that the server calls

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.mark.sampled
@pytest.mark.parametrize("status", ECHOES)
def test_H6_a_token_echoed_by_a_data_set_server_is_not_shown(
    status: int, work: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = type("Answering", (Echo,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        done = run(work, token, "pack OUT DEMO-packed --dataset org/name --debug")
        server.shutdown()
    assert done.returncode == 7, done.stderr
    assert ECHOES[status] in done.stderr
    assert token not in done.stdout + done.stderr
