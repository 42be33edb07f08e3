"""The table of files that Gemma 2 took, for docs/adding-a-family.md."""

from pathlib import Path
from typing import Final

from docs.generate.tables import table

ROOT: Final = Path(__file__).resolve().parents[2]

FILES: Final = {
    "mappings/gemma2.yaml": "where each tensor goes, the target's config, the files to carry over",
    "t5g2convert/checkpoint/families/gemma2.py": "config adapter: `config.json` in every dialect, as one set of values",
    "t5g2convert/checkpoint/families/t5gemma.py": "the target's config, and every tensor that it implies",
    "t5g2convert/reference/gemma2.py": "reference: the parent's pass",
    "t5g2convert/reference/t5gemma.py": "reference: the target's pass",
    "t5g2convert/parity/checks/cross_attention.py": "a check of its own, `cross_parity`",
    "t5g2convert/parity/suites/t5gemma.py": "the suite of checks, and the expected config",
}
"""The files of the family, with what each says."""


def family_table() -> str:
    """Return one row for each file, with its number of lines, and their sum."""
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    rows = [(f"[{name}](../{name})", words, str(lines[name])) for name, words in FILES.items()]
    return table(("file", "subject", "lines"), iter([*rows, ("together", "", str(sum(lines.values())))]))
