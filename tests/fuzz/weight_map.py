"""Fuzz target: a weight map is read, or refused with a MappingError that names the position."""

import re
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["t5g2convert"]):
    from t5g2convert.errors import MappingError
    from t5g2convert.mapping.library import mappings_folder
    from t5g2convert.mapping.weightmap import load_map


def judge(path: Path) -> None:
    try:
        load_map(path)
    except MappingError as error:
        refusal = error
    else:
        return
    where = re.fullmatch(rf"{re.escape(str(path))}:([1-9][0-9]*):([1-9][0-9]*)", refusal.where or "")
    assert where, refusal.where
    lines = path.read_bytes().decode(errors="replace").splitlines()
    assert int(where[1]) <= len(lines) + 1, (refusal.where, len(lines))
    assert refusal.message.count("\n") == 2, refusal.message


if __name__ == "__main__":
    from tests.fuzz.running import fuzz

    fuzz("maps", ".yaml", {path.name: path.read_bytes() for path in mappings_folder().glob("*.yaml")}, judge)
