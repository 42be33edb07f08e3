"""A GitHub runner for the steps of our action and workflows: expressions, files, conditions, outcomes.

It follows what the documentation of GitHub Actions says of `runs.steps`: `shell: bash` is
`bash --noprofile --norc -eo pipefail FILE`, and `run:` of a workflow without a shell is `bash -e FILE`; what a step
writes into GITHUB_PATH, GITHUB_ENV and GITHUB_OUTPUT holds for the steps after it; after a failure only steps with
`always()` run; outputs and env are not seen by an action's caller unless it declares them.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Ran:
    """The result of a job or an action."""

    passed: bool = True
    log: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    """Name of each step to its outcome: success, failure or skipped."""


@dataclass
class Runner:
    """A machine: the workspace of the steps, a temporary folder, and the state that steps share."""

    workspace: Path
    temp: Path
    env: dict[str, str]
    actions: Mapping[str, Path]
    """The folders of the actions that are really run; other `uses:` are only noted."""
    skipped: tuple[str, ...] = ()
    """Names of steps that are taken for done."""
    used: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    artifacts: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.temp.mkdir(parents=True, exist_ok=True)
        self.summary.touch()

    @property
    def summary(self) -> Path:
        """Return the path of the job's summary."""
        return self.temp / "summary.md"

    def action(self, folder: Path, given: Mapping[str, str]) -> Ran:
        """Run a composite action with its inputs."""
        action = yaml.safe_load((folder / "action.yml").read_text())
        assert action["runs"]["using"] == "composite"
        assert set(given) <= set(action["inputs"]), "an input that the action does not declare"
        inputs = {name: str(it.get("default", "")) for name, it in action["inputs"].items()} | dict(given)
        scope = {f"inputs.{name}": value for name, value in inputs.items()}
        scope |= {"github.action_path": str(folder), "runner.temp": str(self.temp)}
        for step in action["runs"]["steps"]:
            assert "uses" in step or "shell" in step, "a composite's run needs its shell"
        ran = self.run(action["runs"]["steps"], scope)
        ran.outputs = {name: fill(it["value"], scope) for name, it in action["outputs"].items()}
        return ran

    def job(self, job: Mapping[str, Any]) -> Ran:
        """Run a job of a workflow."""
        return self.run(job["steps"], {"runner.temp": str(self.temp)})

    def run(self, steps: list[dict[str, Any]], scope: dict[str, str]) -> Ran:
        """Run steps in order; store their outputs and outcomes in `scope`."""
        ran = Ran()
        for number, step in enumerate(steps):
            name = step.get("name", f"step {number}")
            if name in self.skipped or not holds(step.get("if", ""), scope, ran.passed):
                ran.steps[name] = "skipped"
                continue
            inner = self._uses(step, scope) if "uses" in step else self._bash(step, scope)
            ran.log += inner.log
            outcome = "success" if inner.passed else "failure"
            ran.steps[name] = outcome
            if "id" in step:
                scope[f"steps.{step['id']}.outcome"] = outcome
                scope |= {f"steps.{step['id']}.outputs.{key}": value for key, value in inner.outputs.items()}
            ran.passed &= inner.passed or bool(step.get("continue-on-error"))
        return ran

    def _uses(self, step: Mapping[str, Any], scope: Mapping[str, str]) -> Ran:
        given = {name: fill(str(value), scope) for name, value in step.get("with", {}).items()}
        self.used.append((step["uses"], given))
        if step["uses"] in self.actions:
            return self.action(self.actions[step["uses"]], given)
        if step["uses"].startswith("actions/upload-artifact@"):
            assert given["name"] not in self.artifacts, "two artifacts of one name"
            path = Path(given["path"])
            found = sorted(it.name for it in path.iterdir()) if path.is_dir() else []
            self.artifacts[given["name"]] = found
            return Ran(passed=bool(found) or given.get("if-no-files-found") != "error")
        return Ran()

    def _bash(self, step: Mapping[str, Any], scope: Mapping[str, str]) -> Ran:
        folder = self.temp / "commands"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_ENV")}
        for path in files.values():
            path.touch()
        script = folder / "script.sh"
        script.write_text(fill(step["run"], scope))
        own = {name: fill(str(value), scope) for name, value in step.get("env", {}).items()}
        env = {**self.env, **own, **{name: str(path) for name, path in files.items()}}
        env |= {"GITHUB_STEP_SUMMARY": str(self.summary), "GITHUB_ACTIONS": "true", "RUNNER_TEMP": str(self.temp)}
        how = ["bash", "--noprofile", "--norc", "-eo", "pipefail"] if "shell" in step else ["bash", "-e"]
        assert step.get("shell", "bash") == "bash"
        done = subprocess.run(
            [*how, str(script)], cwd=self.workspace, env=env, capture_output=True, text=True, check=False
        )
        for line in files["GITHUB_PATH"].read_text().splitlines():
            self.env["PATH"] = f"{line}{os.pathsep}{self.env['PATH']}"
        self.env |= _pairs(files["GITHUB_ENV"])
        return Ran(done.returncode == 0, done.stdout + done.stderr, _pairs(files["GITHUB_OUTPUT"]))


def _pairs(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def fill(text: str, scope: Mapping[str, str]) -> str:
    """Expand `${{ name }}` in a text; unknown names are empty, as on GitHub."""
    return re.sub(r"\$\{\{\s*([\w.-]+)\s*\}\}", lambda found: scope.get(found[1], ""), text)


def holds(condition: str, scope: Mapping[str, str], passed: bool) -> bool:
    """Evaluate an `if:` of `always()`, `A == 'x'`, `A != 'x'`, joined by `&&`."""
    terms = [term.strip() for term in condition.strip().removeprefix("${{").removesuffix("}}").split("&&")]
    if "always()" not in terms and not passed:
        return False
    for term in terms:
        if term in ("", "always()"):
            continue
        found = re.fullmatch(r"([\w.-]+) (==|!=) '([^']*)'", term)
        assert found, f"a condition that this runner does not know: {term}"
        if (scope.get(found[1], "") == found[3]) is not (found[2] == "=="):
            return False
    return True
