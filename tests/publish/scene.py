"""A Hub with a user, and a folder with a model to upload."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.hub.server import Hub
from tests.processes import forked

ROOT: Final = Path(__file__).parents[2]
RUN: Final = "import sys; from t5g2convert.cli.main import main; main(sys.argv[1:])"
HASTY: Final = f"import t5g2convert.publish.retry as retry; retry.WAITS = (0.0, 0.0); {RUN}"
"""The same without waits between attempts, and with fewer."""


@dataclass
class Scene:
    """A Hub with a user `ann`, and a work folder: a converted model `out`, its source `src`, a cache `home`.

    `settings` is what the environment of every process has besides.
    """

    hub: Hub
    folder: Path
    token: str
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Return the converted model."""
        return self.folder / "out"

    def run(self, line: str, script: str = RUN, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a separate process, with ann's token."""
        return self.python(["-c", script, *line.split()], **env)

    def _env(self, **env: str) -> dict[str, str]:
        settings = {**self.hub.env(self.folder / "home"), "HF_TOKEN": self.token, "PYTHONPATH": str(ROOT)}
        settings |= self.settings | env
        return {name: value for name, value in settings.items() if value or name != "HF_TOKEN"}

    def python(self, arguments: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        """Run Python with the environment of a user of this Hub; an empty HF_TOKEN means no token."""
        return forked.python(arguments, cwd=self.folder, env=self._env(**env))

    def started(self, line: str) -> "subprocess.Popen[str]":
        """Run a command that must succeed."""
        command = [sys.executable, "-c", RUN, *line.split()]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=self._env())

    def good(self, line: str, script: str = RUN, **env: str) -> str:
        """Return the output of a successful command."""
        done = self.run(line, script, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, line: str, code: int = 7, script: str = RUN, **env: str) -> str:
        """Return the one-line error of a refused command."""
        done = self.run(line, script, **env)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("t5g2: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    def expected(self, folder: str = "out") -> dict[str, bytes]:
        """Return the files of a folder as they should be on the Hub, without the card."""
        paths = (path for path in (self.folder / folder).iterdir() if path.name != "README.md")
        return {path.name: path.read_bytes() for path in paths}

    def there(self, repo: str = "ann/model", ref: str = "main") -> dict[str, bytes]:
        """Return the Hub's files, without its own and the card."""
        files = self.hub.repos[repo].files(ref)
        return {name: data for name, data in files.items() if name not in {".gitattributes", "README.md"}}
