"""Where a folder comes from, and the command that makes it again: what its manifest tells, for people."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.library import find_map
from t5g2convert.publish.markdown import code
from t5g2convert.version import __version__

HUB: Final = "https://huggingface.co"

ROLES: Final = {
    "source": "the source",
    "decoder_from": "the decoder's parent",
    "vision_from": "the vision tower's donor",
}
"""The checkpoints that a manifest may tell of, by its keys."""

_ID: Final = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}/\w[\w.-]{0,95}(?<!\.git)", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def is_hub_id(name: str) -> bool:
    """Whether it is `org/name`, as the Hub calls models."""
    return _ID.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A checkpoint that was read.

    Attributes:
        role: Its key in the manifest.
        family: Its `model_type`.
        repo: The model of the Hub that it is; None for a folder, of which nothing is known but its files.
        revision: The commit of that model.
        files: The sha256 of its files; None where they were not hashed.
    """

    role: str
    family: str
    repo: str | None
    revision: str | None
    files: Mapping[str, str | None]

    @property
    def address(self) -> str | None:
        """The address that its files stand behind."""
        return None if self.repo is None else f"{HUB}/{self.repo}/blob/{self.revision}/"

    @property
    def argument(self) -> str:
        """What a command calls it: a model of the Hub, or a word for a folder."""
        return self.role.upper() if self.repo is None else f"{self.repo}@{self.revision}"

    @property
    def told(self) -> str:
        """Which it is, in Markdown."""
        family = code(self.family)
        if self.repo is None:
            return f"a folder with a {family}"
        link = f"[{code(self.repo)}]({HUB}/{self.repo}/tree/{self.revision})"
        return f"{link}, a {family}, at commit {code(self.revision)}"


def ancestors(manifest: Manifest, folder: Path) -> list[Ancestor]:
    """All checkpoints that a manifest tells of, the source first.

    Raises:
        CheckpointError: One is said to be a model of the Hub, and cannot be.
    """
    found = []
    for role, record in manifest.sources.items():
        hub = record.hub
        if hub is not None and not (is_hub_id(hub.repo) and _COMMIT.fullmatch(hub.revision)):
            named = f"{hub.repo}@{hub.revision}"
            raise CheckpointError(
                f"says that {ROLES[role]} is {named!r}, expected org/name and a commit", where=folder / MANIFEST_FILE
            )
        files = {name: file.sha256 for name, file in record.files.items()}
        repo, revision = (None, None) if hub is None else (hub.repo, hub.revision)
        found.append(Ancestor(role, record.family, repo, revision, files))
    return found


def command(manifest: Manifest, sources: list[Ancestor], part: str | None) -> str:
    """The command that makes the folder again; `part` is what was taken out of an encoder-decoder."""
    if not _ships(manifest):
        words = ["t5g2", "convert", sources[0].argument, "OUTPUT", "--mapping", "MAP.yaml"]
    elif part is None:
        words = ["t5g2", "convert", sources[0].argument, "OUTPUT"]
    else:
        words = ["t5g2", "extract", sources[0].argument, "OUTPUT", "--part", part]
    for ancestor in sources[1:]:
        words += [f"--{ancestor.role.replace('_', '-')}", ancestor.argument]
    words += [word for option, value in manifest.document()["options"].items() for word in _option(option, value)]
    return shlex.join(words)


def _option(name: str, value: Any) -> Iterator[str]:
    """An option as the command line spells it."""
    yield "--max-shard-size" if name == "max_shard_bytes" else f"--{name.replace('_', '-')}"
    yield ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _ships(manifest: Manifest) -> bool:
    """Whether the map is one that comes with the tool; that of another version is known by its name."""
    if manifest.mapping is None:
        return False
    name = manifest.mapping.name
    if re.fullmatch(r"[a-z0-9-]+", name) is None:
        return False
    try:
        found = find_map(name)
    except MappingError:
        return False
    return manifest.tool.version != __version__ or found.sha256 == manifest.mapping.sha256


def digest(sha256: str | None) -> str:
    """A sha256 in Markdown."""
    if sha256 is None:
        return "not taken"
    return code(sha256) if _DIGEST.fullmatch(sha256) else f"{code(sha256)}, which is none"
