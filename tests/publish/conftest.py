import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from t5g2convert import convert
from t5g2convert.cli.demo import build_demo_source
from tests.hub_server import Hub, running

ROOT: Final = Path(__file__).parents[2]
RUN: Final = "import sys; from t5g2convert.cli.main import main; main(sys.argv[1:])"
HASTY: Final = f"import t5g2convert.publish.asking as asking; asking.WAITS = (0.0, 0.0); {RUN}"
"""The same without waits between attempts, and with fewer."""


@dataclass
class Scene:
    """A Hub with a user `ann`, and a folder to work in: a converted model `out`, its source `src`, a cache `home`."""

    hub: Hub
    folder: Path
    token: str

    @property
    def out(self) -> Path:
        """The converted model."""
        return self.folder / "out"

    def run(self, line: str, script: str = RUN, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a process of its own, with ann's token."""
        return self.python(["-c", script, *line.split()], **env)

    def python(self, arguments: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        """Run Python with the environment of a user of this Hub; an empty HF_TOKEN is none."""
        settings = {**self.hub.env(self.folder / "home"), "HF_TOKEN": self.token, "PYTHONPATH": str(ROOT), **env}
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            cwd=self.folder,
            env={name: value for name, value in settings.items() if value or name != "HF_TOKEN"},
        )

    def good(self, line: str, script: str = RUN, **env: str) -> str:
        """What a command prints that ends well."""
        done = self.run(line, script, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, line: str, code: int = 7, script: str = RUN, **env: str) -> str:
        """The one line of a command that is refused."""
        done = self.run(line, script, **env)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("t5g2: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    def expected(self, folder: str = "out") -> dict[str, bytes]:
        """The files of a folder, as they should be on the Hub."""
        return {path.name: path.read_bytes() for path in (self.folder / folder).iterdir()}

    def there(self, repo: str = "ann/model", ref: str = "main") -> dict[str, bytes]:
        """The files that the Hub has, without those that it makes itself and the card."""
        files = self.hub.repos[repo].files(ref)
        return {name: data for name, data in files.items() if name not in {".gitattributes", "README.md"}}


@pytest.fixture(scope="session")
def demo_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src`, a tiny Gemma 3 with images, and `out`, its conversion; not to be changed."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo_source(folder / "src")
    convert(folder / "src", folder / "out", flush=False)
    return folder


@pytest.fixture
def scene(tmp_path: Path, demo_folders: Path) -> Iterator[Scene]:
    with running() as hub:
        shutil.copytree(demo_folders, tmp_path / "work")
        token = f"hf_{secrets.token_hex(17)}"
        hub.users[token] = "ann"
        yield Scene(hub, tmp_path / "work", token)
