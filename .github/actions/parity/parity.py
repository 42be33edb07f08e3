"""Run `t5g2 verify` or `t5g2 compare` in CI, with a job summary, JUnit and an HTML page.

The inputs are environment variables, PARITY_SOURCE, PARITY_OUTPUT and so on, set by action.yml. The
exit code is the command's. GITHUB_STEP_SUMMARY and GITHUB_OUTPUT are written where they are set, so that this runs
anywhere.

Needs t5g2 on the PATH; and huggingface_hub, where the output is a model of the Hub.
"""

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from summary import Row, as_junit, escaped, printable, summary

USAGE, HUB, NOT_EQUAL = 2, 7, 6
"""Exit codes of t5g2 that are given here too."""

LIMITS: Final = {"max-kl": "--max-kl", "min-agreement": "--min-agreement"}
SHARED: Final = {"dtype": "--dtype", "text": "--text", "vision-from": "--vision-from", "decoder-from": "--decoder-from"}


class Refused(Exception):  # noqa: N818 - an answer to the caller
    """Nothing could be judged: an exit code and the reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def command(given: Mapping[str, str], output: Path, reports: Path) -> list[str]:
    """Return the command line.

    Raises:
        Refused: The inputs do not go together.
    """
    mode = given.get("mode") or "verify"
    if mode not in ("verify", "compare"):
        raise Refused(USAGE, f"mode: expected verify or compare, found {mode!r}")
    limits = [word for name, option in LIMITS.items() if given.get(name) for word in (option, given[name])]
    shared = [word for name, option in SHARED.items() if given.get(name) for word in (option, given[name])]
    try:
        more = shlex.split(given.get("arguments", ""))
    except ValueError as error:
        raise Refused(USAGE, f"arguments: {error}") from None
    if mode == "compare":
        if not limits:
            raise Refused(USAGE, "compare without max-kl or min-agreement cannot fail: give one of them")
        if not given.get("text"):
            raise Refused(USAGE, "compare reads a text: give text")
        return ["t5g2", "compare", given["source"], str(output), *limits, *shared, *more, "--json"]
    if limits:
        raise Refused(USAGE, "max-kl and min-agreement belong to compare: verify lets no difference pass")
    files = ["--junit", str(reports / "parity.xml"), "--html", str(reports / "parity.html")]
    return ["t5g2", "verify", str(output), "--source", given["source"], "--no-record", *files, *shared, *more, "--json"]


def fetched(output: str) -> Path:
    """The folder of an output: itself, or the snapshot of a model of the Hub, org/name[@revision].

    Raises:
        Refused: It is neither a folder nor a readable model on the Hub.
    """
    if Path(output).is_dir():
        return Path(output)
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", output, re.ASCII)
    if found is None:
        raise Refused(
            USAGE, f"output: {output!r} is not a folder here, and not a model on the Hub: org/name[@revision]"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        return Path(snapshot_download(found[1], revision=found[2]))
    except ImportError:
        raise Refused(
            HUB, f"output: {output!r} is not a folder here, and huggingface_hub is not installed to download it"
        ) from None
    except Exception as error:  # noqa: BLE001 - the client passes on errors of its HTTP library
        first = str(error).strip().partition("\n")[0]
        raise Refused(
            HUB, f"output: {output!r} is not a folder here, and cannot be downloaded from the Hub: {first}"
        ) from None


def rows_of(document: Mapping[str, Any], given: Mapping[str, str]) -> list[Row]:
    """Return the rows of the summary from the command's JSON."""
    if "error" in document:
        error = document["error"]
        said = [error["message"], *(f"{error[key]}" for key in ("where", "hint") if error.get(key))]
        return [Row("t5g2", "error", "; ".join(said))]
    if "checks" in document:
        rows = [Row(it["name"], "passed" if it["passed"] else "FAILED", it["detail"]) for it in document["checks"]]
        return rows + [Row(name, "not made", because) for name, because in document["skipped"].items()]
    alone = document["decoder_alone"]
    rows = []
    if given.get("max-kl"):
        # Null means that the figure is not a number: it fails.
        good = alone["kl"] is not None and alone["kl"] <= float(given["max-kl"])
        rows.append(Row("max-kl", _state(good), f"the decoder's mean KL is {alone['kl']}, limit {given['max-kl']}"))
    if given.get("min-agreement"):
        good = alone["agreement"] is not None and alone["agreement"] >= float(given["min-agreement"])
        told = f"the decoder's top-1 agreement is {alone['agreement']}, limit {given['min-agreement']}"
        rows.append(Row("min-agreement", _state(good), told))
    return rows


def _state(good: bool) -> str:
    return "passed" if good else "FAILED"


@contextmanager
def commands_stopped() -> Iterator[None]:
    """No line that is printed meanwhile is a command to the runner, whatever a checkpoint calls its tensors."""
    word = secrets.token_hex(16)
    on_a_runner = os.environ.get("GITHUB_ACTIONS") == "true"
    if on_a_runner:
        print(f"::stop-commands::{word}", flush=True)
    try:
        yield
    finally:
        if on_a_runner:
            print(f"::{word}::", flush=True)


def run(given: Mapping[str, str], reports: Path) -> tuple[int, dict[str, Any]]:
    """Judge: the exit code, and the document that the command printed.

    Raises:
        Refused: Nothing could be judged.
    """
    for name in ("source", "output"):
        if not given.get(name):
            raise Refused(USAGE, f"{name}: expected a folder or a model on the Hub, found nothing")
    # Report wrong usage before anything is downloaded.
    command(given, Path(given["output"]), reports)
    line = command(given, fetched(given["output"]), reports)
    print(printable(shlex.join(line)), flush=True)
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    except FileNotFoundError:
        raise Refused(USAGE, "t5g2 is not on the PATH: install it, or leave install as it is") from None
    try:
        return done.returncode, dict(json.loads(done.stdout))
    except ValueError:
        raise Refused(
            done.returncode or 1, f"t5g2 {line[1]} printed no document; its exit is {done.returncode}"
        ) from None


def judge(given: Mapping[str, str], reports: Path) -> int:
    """Run the command, write all reports, and return the exit code."""
    mode = given.get("mode") or "verify"
    reports.mkdir(parents=True, exist_ok=True)
    for name in ("parity.json", "parity.xml", "parity.html"):
        # An earlier verdict must not be taken for this one.
        (reports / name).unlink(missing_ok=True)
    try:
        code, document = run(given, reports)
        rows = rows_of(document, given)
    except Refused as refused:
        code, rows = refused.code, [Row("t5g2", "error", str(refused))]
        document = {"error": {"code": code, "message": str(refused), "where": None, "hint": None}}
    if code == 0 and any(row.state in ("FAILED", "error") for row in rows):
        code = NOT_EQUAL
    (reports / "parity.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for path in (reports / "parity.xml", reports / "parity.html"):
        # t5g2 makes both files before it begins; where it ends without a verdict they are empty.
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
    if not (reports / "parity.xml").exists():
        (reports / "parity.xml").write_text(as_junit(f"t5g2 {mode}", rows), encoding="utf-8")

    verdict = "passed" if code == 0 else f"failed with exit code {code}"
    conditions = [f"{document[key]}" for key in ("dtype", "device") if document.get(key)]
    subject = ", ".join([f"{given.get('output')} against {given.get('source')}", *conditions])
    remarks = list(document.get("remarks", []))
    _append("GITHUB_STEP_SUMMARY", summary(f"{escaped(f't5g2 {mode}')}: {verdict}", subject, rows, remarks))
    _append("GITHUB_OUTPUT", f"passed={json.dumps(code == 0)}\nexit-code={code}\nreports={reports}\n")
    for row in rows:
        print(f"{row.state:>8}   {printable(row.name):<16} {printable(row.detail)}")
    print(f"t5g2 {printable(mode)}: {verdict}", flush=True)
    return code


def _append(variable: str, text: str) -> None:
    if os.environ.get(variable):
        with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
            file.write(text)


def main() -> None:
    """Run with the inputs in the environment."""
    names = ("source", "output", "mode", *LIMITS, *SHARED, "arguments")
    given = {name: os.environ.get(f"PARITY_{name.upper().replace('-', '_')}", "") for name in names}
    with commands_stopped():
        code = judge(given, Path(os.environ.get("PARITY_REPORTS") or "parity").resolve())
    sys.exit(code)


if __name__ == "__main__":
    main()
