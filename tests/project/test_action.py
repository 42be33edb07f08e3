"""The parity action, its workflows and scripts, run step by step as a runner would."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt

from t5g2convert import convert
from t5g2convert.cli.demo import build_demo_source
from tests.cli.test_main import HOSTILE, MARKUP, rewrite_names
from tests.hub.server import running
from tests.project.action_runner import Ran, Runner

ROOT: Final = Path(__file__).parents[2]
ACTION: Final = ROOT / ".github/actions/parity"
WORKFLOWS: Final = [*(ROOT / ".github/workflows").glob("*.yml"), *(ROOT / "examples/ci").glob("*.yml")]
BIN: Final = Path(sys.executable).parent
REPO: Final = "org/t5gemma-tiny"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """Return the action's script as a module."""
    sys.path.insert(0, str(ACTION))
    yield import_module("parity")
    sys.path.remove(str(ACTION))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Return a workspace with a Gemma 3, its conversion, and a text."""
    folder = tmp_path / "workspace"
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "output")
    (folder / "text.txt").write_text("an encoder-decoder reads, and writes what it has read; " * 4)
    return folder


@pytest.fixture
def runner(workspace: Path) -> Runner:
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return Runner(workspace, workspace.parent / "temp", env, {"./.github/actions/parity": ACTION})


def judge(runner: Runner, **given: str) -> Ran:
    named = {name.replace("_", "-"): value for name, value in given.items()}
    return runner.action(ACTION, {"install": "no", "source": "source", "output": "output", **named})


def break_config(folder: Path) -> None:
    path = folder / "config.json"
    text = path.read_text()
    assert '"sliding_window": 16' in text
    path.write_text(text.replace('"sliding_window": 16', '"sliding_window": 17'))


def reports(runner: Runner, name: str = "parity") -> Path:
    return runner.temp / "parity" / name


def states(markdown: str) -> dict[str, str]:
    """Return the rendered table of a summary: check to mark."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    cells = [
        "".join(child.content for child in tokens[at + 1].children or [])
        for at, token in enumerate(tokens)
        if token.type == "td_open"
    ]
    assert len(cells) % 3 == 0
    return dict(zip(cells[1::3], cells[0::3], strict=True))


# The action


@pytest.mark.slow
def test_a_good_twin_is_green(runner: Runner, workspace: Path) -> None:
    before = {path.name: path.read_bytes() for path in (workspace / "output").iterdir()}
    ran = judge(runner)
    assert ran.passed, ran.log
    assert ran.steps == {"Install t5g2": "skipped", "Judge": "success", "Keep the reports": "success"}
    assert ran.outputs == {"passed": "true", "exit-code": "0", "reports": str(reports(runner))}
    assert runner.artifacts == {"parity": ["parity.html", "parity.json", "parity.xml"]}
    found = json.loads((reports(runner) / "parity.json").read_text())
    assert found["passed"]
    assert found["complete"]
    assert states(runner.summary.read_text()) == {check["name"]: "✅ passed" for check in found["checks"]}
    suite = ElementTree.parse(reports(runner) / "parity.xml").getroot()
    assert [case.get("name") for case in suite.iter("testcase")] == [check["name"] for check in found["checks"]]
    assert "Verification passed" in (reports(runner) / "parity.html").read_text()
    assert {path.name: path.read_bytes() for path in (workspace / "output").iterdir()} == before


@pytest.mark.slow
def test_a_broken_twin_fails_and_the_summary_names_the_checks(runner: Runner, workspace: Path) -> None:
    break_config(workspace / "output")
    ran = judge(runner)
    assert not ran.passed
    assert ran.steps == {"Install t5g2": "skipped", "Judge": "failure", "Keep the reports": "success"}
    assert ran.outputs["passed"] == "false"
    assert ran.outputs["exit-code"] == "6"
    assert runner.artifacts == {"parity": ["parity.html", "parity.json", "parity.xml"]}
    text = runner.summary.read_text()
    assert text.startswith("### t5g2 verify: failed with exit code 6\n")
    shown = states(text)
    assert {name for name, mark in shown.items() if "FAILED" in mark} >= {"integrity", "config"}
    assert shown["provenance"] == "✅ passed"
    assert "config.json" in text
    suite = ElementTree.parse(reports(runner) / "parity.xml").getroot()
    assert int(suite.get("failures", "0")) >= 2


@pytest.mark.slow
def test_a_trained_model_is_compared_with_limits(runner: Runner, workspace: Path) -> None:
    given = {"mode": "compare", "text": "text.txt", "arguments": "--max-tokens 32"}
    ran = judge(runner, **given, max_kl="0", min_agreement="1")
    assert ran.passed, ran.log
    assert states(runner.summary.read_text()) == {"max-kl": "✅ passed", "min-agreement": "✅ passed"}
    assert runner.artifacts == {"parity": ["parity.json", "parity.xml"]}

    break_config(workspace / "output")
    runner.summary.write_text("")
    ran = judge(runner, **given, max_kl="1e-9", min_agreement="0", artifact="moved")
    assert not ran.passed
    assert ran.outputs["exit-code"] == "6"
    assert states(runner.summary.read_text()) == {"max-kl": "❌ FAILED", "min-agreement": "✅ passed"}
    suite = ElementTree.parse(reports(runner, "moved") / "parity.xml").getroot()
    assert suite.attrib == {"name": "t5g2 compare", "tests": "2", "failures": "1", "errors": "0", "skipped": "0"}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ({"source": ""}, 2, "source: expected a folder or a model on the Hub, found nothing"),
        ({"output": ""}, 2, "output: expected a folder or a model on the Hub, found nothing"),
        ({"output": "no/such/folder"}, 2, "is not a folder here, and not a model on the Hub"),
        ({"mode": "verfy"}, 2, "expected verify or compare, found 'verfy'"),
        ({"mode": "compare", "text": "text.txt"}, 2, "cannot fail"),
        ({"mode": "compare", "max_kl": "1"}, 2, "give text"),
        ({"max_kl": "1"}, 2, "belong to compare"),
        ({"arguments": "'"}, 2, "No closing quotation"),
        ({"dtype": "int8"}, 2, "int8"),
        ({"arguments": "--nope"}, 2, "--nope"),
        ({"source": "gone/"}, 3, "no such folder"),
    ],
    ids=lambda value: " ".join(f"{key}={it}" for key, it in value.items()) if isinstance(value, dict) else "",
)
def test_a_folder_that_cannot_be_verified_fails_with_the_reason(
    runner: Runner, given: dict[str, str], code: int, says: str
) -> None:
    ran = judge(runner, **given)
    assert not ran.passed
    assert ran.outputs["exit-code"] == str(code), ran.log
    assert ran.outputs["passed"] == "false"
    assert says in ran.log
    assert states(runner.summary.read_text()) == {"t5g2": "❌ error"}
    suite = ElementTree.parse(reports(runner) / "parity.xml").getroot()
    assert suite.get("errors") == "1"
    assert "parity.html" not in runner.artifacts["parity"]


def test_an_earlier_verdict_is_not_taken_for_this_one(runner: Runner) -> None:
    reports(runner).mkdir(parents=True)
    for name in ("parity.xml", "parity.html"):
        (reports(runner) / name).write_text("passed")
    assert not judge(runner, arguments="--nope").passed
    assert runner.artifacts == {"parity": ["parity.json", "parity.xml"]}
    assert ElementTree.parse(reports(runner) / "parity.xml").getroot().get("errors") == "1"


def test_a_missing_or_silent_tool_fails(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    system = runner.env["PATH"].split(os.pathsep, 1)[1]
    runner.env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{system}"
    ran = judge(runner)
    assert ran.outputs["exit-code"] == "2"
    assert "t5g2 is not on the PATH" in ran.log
    (tmp_path / "bin/t5g2").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "bin/t5g2").chmod(0o755)
    ran = judge(runner, artifact="silent")
    assert not ran.passed
    assert "printed no document; its exit is 0" in ran.log


@pytest.mark.slow
def test_a_hub_model_is_fetched_and_verified_at_its_revision(runner: Runner, workspace: Path) -> None:
    with running() as hub:
        commit = hub.add(REPO, workspace / "output")
        break_config(workspace / "output")
        files = {path.name: path.read_bytes() for path in (workspace / "output").iterdir()}
        hub.repos[REPO].commit(files, ref="refs/pr/1")
        runner.env = hub.env(workspace.parent / "home", PYTHONPATH=str(ROOT), PATH=runner.env["PATH"])
        assert (ran := judge(runner, output=f"{REPO}@{commit}")).passed, ran.log
        ran = judge(runner, output=f"{REPO}@refs/pr/1", artifact="request")
        assert ran.outputs["exit-code"] == "6", ran.log
        for number, gone in enumerate((f"{REPO}@nope", "org/nope")):
            ran = judge(runner, output=gone, artifact=f"gone-{number}")
            assert ran.outputs["exit-code"] == "7", ran.log
            assert "cannot be downloaded from the Hub" in ran.log


def test_every_input_reaches_the_command_line(script: ModuleType) -> None:
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    (step,) = (step for step in action["runs"]["steps"] if step.get("id") == "judge")
    read = set(re.findall(r"inputs\.([\w-]+)", json.dumps(step["env"])))
    assert read == set(action["inputs"]) - {"install"}
    given = {
        "source": "S", "output": "O", "text": "T", "dtype": "float32", "vision-from": "V", "decoder-from": "D",
        "arguments": "--tolerance '0'",
    }  # fmt: skip
    line = script.command(given, Path("O"), Path("R"))
    assert line[:5] == ["t5g2", "verify", "O", "--source", "S"]
    requested = line[line.index("--no-record") :]
    for words in (["--text", "T"], ["--vision-from", "V"], ["--decoder-from", "D"], ["--tolerance", "0"]):
        assert requested[requested.index(words[0]) + 1] == words[1]
    given |= {"mode": "compare", "max-kl": "0.1", "min-agreement": "0.9"}
    line = script.command(given, Path("O"), Path("R"))
    assert line[:4] == ["t5g2", "compare", "S", "O"]
    assert line[line.index("--max-kl") + 1] == "0.1"
    assert line[line.index("--min-agreement") + 1] == "0.9"


@pytest.mark.parametrize(("kl", "state"), [(0.1, "passed"), (0.11, "FAILED"), (None, "FAILED")])
def test_a_figure_that_is_not_a_number_fails(script: ModuleType, kl: float | None, state: str) -> None:
    document = {"decoder_alone": {"kl": kl, "agreement": None if kl is None else 1 - kl}}
    rows = script.rows_of(document, {"max-kl": "0.1", "min-agreement": "0.9"})
    assert [row.state for row in rows] == [state, state]


# Text from outside


@pytest.mark.parametrize("text", [*HOSTILE.values(), *MARKUP, "a|b", "<img src=x>", "[a](http://b)", "`x", "@team"])
def test_text_from_outside_is_shown_in_the_summary_and_not_obeyed(script: ModuleType, text: str) -> None:
    row = import_module("summary").Row(text, "FAILED", f"{text} https://x.y www.x.y")
    result = script.summary("t", text, [row], [text])
    tokens = MarkdownIt("commonmark").enable("table").parse(result)
    kinds = {child.type for token in tokens for child in token.children or []}
    assert kinds <= {"text", "text_special", "strong_open", "strong_close", "softbreak"}
    assert script.printable(text) in states(result)
    assert all(character.isprintable() for character in result.replace("\n", ""))
    assert "http:" not in result
    assert "https:" not in result
    assert "www." not in result
    ElementTree.fromstring(import_module("summary").as_junit("t", [row]))


@pytest.mark.slow
def test_no_tensor_name_becomes_a_runner_command(runner: Runner, workspace: Path) -> None:
    rewrite_names(workspace / "source", {}, ("::error::x", "::add-mask::passed"))
    ran = judge(runner)
    assert ran.outputs["exit-code"] == "3"
    lines = [line.strip() for line in ran.log.splitlines()]
    word = lines[0].removeprefix("::stop-commands::")
    assert re.fullmatch(r"[0-9a-f]{32}", word)
    obeyed = (
        ran.log.partition(f"::stop-commands::{word}\n")[0]
        + ran.log.partition(f"::{word}::\n")[2].partition("t5g2: ")[0]
    )
    assert obeyed.strip() == ""
    assert "::error::x" in ran.log


def test_an_input_is_never_part_of_a_script(runner: Runner, workspace: Path) -> None:
    ran = judge(runner, arguments="$(touch canary)", output="output; touch canary", dtype="`touch canary`")
    assert not ran.passed
    assert not (workspace / "canary").exists()
    for path in (ACTION / "action.yml", *WORKFLOWS):
        for step in all_steps(yaml.safe_load(path.read_text())):
            assert "${{" not in step.get("run", "")


# Installing


@pytest.mark.slow
def test_the_action_installs_its_own_checkout_and_puts_it_on_the_path(
    runner: Runner, workspace: Path, tmp_path: Path
) -> None:
    # Without network: t5g2's dependencies and hatchling are installed.
    packages = next((Path(sys.prefix) / "lib").glob("python*/site-packages"))
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "tests", "__pycache__"))
    shutil.copytree(ROOT / ".github", checkout / ".github")
    runner.env |= {"PYTHONPATH": str(packages), "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_IGNORE_INSTALLED": "1"}
    runner.env |= {"PIP_NO_BUILD_ISOLATION": "0"}
    ran = runner.action(checkout / ".github/actions/parity", {"source": "source", "output": "output"})
    assert ran.passed, ran.log
    assert ran.steps["Install t5g2"] == "success"
    assert runner.env["PATH"].startswith(f"{runner.temp}/t5g2/bin{os.pathsep}")
    installed = next((runner.temp / "t5g2/lib").glob("python*/site-packages/t5g2convert/__init__.py"))
    assert installed.read_bytes() == (ROOT / "t5g2convert/__init__.py").read_bytes()


def test_a_version_is_installed_by_its_number(runner: Runner, tmp_path: Path) -> None:
    venv = runner.temp / "t5g2/bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text('#!/bin/sh\necho "$@" > asked\nexit 1\n')
    (venv / "python").chmod(0o755)
    ran = runner.action(ACTION, {"source": "source", "output": "output", "install": "0.1.0"})
    assert ran.steps == {"Install t5g2": "failure", "Judge": "skipped", "Keep the reports": "skipped"}
    assert not ran.passed
    requested = (runner.workspace / "asked").read_text()
    assert requested.endswith(" t5g2convert==0.1.0\n")
    assert f"--constraint {ROOT}/constraints.txt" in requested


# Workflows


def all_steps(document: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = document.get("jobs", {}).values()
    return [step for job in [*jobs, document.get("runs", {})] for step in job.get("steps", [])]


@pytest.mark.slow
def test_the_projects_own_parity_job_is_green(runner: Runner) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    shutil.copy(ROOT / "LICENSE", runner.workspace)
    runner.skipped = ("Install the tool that makes twins", "Install t5g2")
    ran = runner.job(workflow["jobs"]["parity"])
    assert ran.passed, ran.log
    assert ran.steps["Verify the broken copy"] == "failure"
    assert ran.steps["The broken copy was found out"] == "success"
    assert set(runner.artifacts) == {"parity", "parity-compare", "parity-broken"}


@pytest.mark.slow
def test_a_job_without_a_broken_copy_fails(runner: Runner) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    shutil.copy(ROOT / "LICENSE", runner.workspace)
    steps = workflow["jobs"]["parity"]["steps"]
    (make,) = (step for step in steps if step.get("name") == "Make a twin and a broken copy")
    make["run"] = "".join(line for line in make["run"].splitlines(keepends=True) if not line.startswith("sed "))
    runner.skipped = ("Install the tool that makes twins", "Install t5g2", "Verify the twin", "Compare the twin")
    ran = runner.job(workflow["jobs"]["parity"])
    assert not ran.passed
    assert ran.steps["The broken copy was found out"] == "failure"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_sound_and_its_actions_are_pinned(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    # YAML 1.1 reads the key `on` as true.
    assert {"name", True, "permissions", "jobs"} <= set(document)
    assert document["permissions"] == {"contents": "read"}
    declared = yaml.safe_load((ACTION / "action.yml").read_text())["inputs"]
    for job in document["jobs"].values():
        assert job["timeout-minutes"] <= 60
    for step in all_steps(document):
        assert ("run" in step) != ("uses" in step)
        if "/actions/parity" in step.get("uses", ""):
            assert set(step["with"]) <= set(declared)
            assert {"source", "output"} <= set(step["with"])
            assert all(isinstance(value, str) for value in step["with"].values()), "quote what YAML would read as more"


def test_every_action_is_pinned_to_a_commit() -> None:
    used = [
        (path.name, line.partition("uses:")[2].strip())
        for path in (ACTION / "action.yml", *WORKFLOWS)
        for line in path.read_text().splitlines()
        if re.match(r"\s*(- )?uses:", line)
    ]
    assert len(used) > 8
    ours = {"./.github/actions/parity", "OWNER/t5g2convert/.github/actions/parity@REVISION"}
    for name, action in used:
        assert action in ours or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), (name, action)


# The plain shell


@pytest.fixture
def shell(runner: Runner) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(ROOT / "examples/ci/parity.sh"), *arguments]
        return subprocess.run(
            command, cwd=runner.workspace, env=runner.env, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.slow
def test_the_plain_shell_gives_the_same_verdicts(
    shell: Callable[..., subprocess.CompletedProcess[str]], workspace: Path
) -> None:
    done = shell("source", "output")
    assert done.returncode == 0, done.stderr
    assert "passed decoder_parity" in done.stdout
    assert {path.name for path in (workspace / "parity").iterdir()} == {"parity.html", "parity.json", "parity.xml"}
    assert shell("source", "output", "parity", "--nope").returncode == 2
    assert [path.name for path in (workspace / "parity").iterdir()] == ["parity.json"], "an earlier verdict is left"
    break_config(workspace / "output")
    done = shell("source", "output", "reports/red", "--dtype", "float32")
    assert done.returncode == 6
    assert "FAILED config" in done.stdout
    assert json.loads((workspace / "reports/red/parity.json").read_text())["dtype"] == "float32"
    assert shell("source").returncode == 2
    done = shell("gone/", "output", "reports/gone")
    assert done.returncode == 3
    assert [path.name for path in (workspace / "reports/gone").iterdir()] == ["parity.json"]
    assert "error 'no such folder" in done.stdout


@pytest.mark.slow
def test_the_plain_shell_verifies_a_pull_request_of_a_model(
    shell: Callable[..., subprocess.CompletedProcess[str]], runner: Runner, workspace: Path
) -> None:
    with running() as hub:
        hub.add(REPO, workspace / "output")
        break_config(workspace / "output")
        files = {path.name: path.read_bytes() for path in (workspace / "output").iterdir()}
        hub.repos[REPO].commit(files, ref="refs/pr/1")
        runner.env = hub.env(workspace.parent / "home", PYTHONPATH=str(ROOT), PATH=runner.env["PATH"])
        assert (done := shell("source", REPO)).returncode == 0, done.stderr
        assert shell("source", f"{REPO}@refs/pr/1").returncode == 6
        assert shell("source", "org/nope").returncode == 7
