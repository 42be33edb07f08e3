"""Text that is on every machine: the sources of Python's standard library, and the pages of `help()`.

    python examples/tiny_parent/corpus.py OUT

writes OUT/training.jsonl and OUT/held-out.jsonl, one document per line as {"name": ..., "text": ...}. Files are in the
order of their names, and every twentieth document is held out, so a version of Python always gives the same corpus.
"""

import json
import sys
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
"""Folders to skip: parts that some installations lack, tables of character codes, and code outside the library."""
HELD_OUT_EVERY = 20


class Document(NamedTuple):
    """A text and its name."""

    name: str
    text: str


def documents() -> Iterator[Document]:
    """Yield every source file, ordered by path, then every page of `help()`, ordered by topic."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts)]
    for path in sorted(paths, key=lambda path: path.relative_to(library).as_posix()):
        # Files that are generated at installation are named after the machine.
        if not path.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield Document(path.relative_to(library).as_posix(), text)
    for name, text in sorted(import_module("pydoc_data.topics").topics.items()):
        yield Document(f"help/{name}", text)


def split() -> tuple[list[Document], list[Document]]:
    """Return the training documents and the held-out documents."""
    every = list(documents())
    held_out = every[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    names = {document.name for document in held_out}
    return [document for document in every if document.name not in names], held_out


def write_corpus(folder: Path, limit: int | None = None) -> None:
    """Write both parts, or the first `limit` documents of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("training", "held-out"), split(), strict=True):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for document in islice(part, limit):
                file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
