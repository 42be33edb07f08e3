"""Generated inputs: sound headers, and faulty headers, indexes, configs and maps."""

import copy
import json
import math
import re
import struct
from typing import Any

from hypothesis import strategies as st

from t5g2convert.checkpoint.header import BITS

Json = Any
Path = tuple[str | int, ...]

INTEGERS = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([48, 255, 256, 257, 300, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**399, -(10**399)]),
)
FLOATS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 48.0, 1e-320, 1e308, -1.0]), st.floats())
TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["gemma3", "gemma3_text", "full_attention", "linear", "yarn", "8", "\ud800", "\x1b[31m", "../x"]),
)
JSON = st.recursive(
    st.one_of(INTEGERS, FLOATS, TEXTS, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
"""Any JSON that Python reads: NaN, infinities, halves of surrogate pairs and huge numbers are in it."""

ODD = [0, -1, True, None, "", "\ud800", [], {}, 0.5, -0.0, 1e308, math.nan, math.inf, 2**31 - 1, 2**63, 10**399]
VALUES = st.one_of(st.sampled_from(ODD), st.sampled_from(ODD), JSON)
"""What stands in place of a sound value: half of the time one of those that have broken readers before."""


def framed(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header text and data."""
    return struct.pack("<Q", len(header)) + header + data


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Json], int]:
    """Draw tensors of a sound file, with odd names, dtypes and shapes in any order, and their data size."""
    entries: dict[str, Json] = {}
    position = 0
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5).filter(lambda name: name != "__metadata__")
    for name in draw(st.lists(names, unique=True, max_size=5)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 8]), max_size=6))
        while BITS[dtype] * math.prod(shape) % 8:
            shape.append(8)
        size = BITS[dtype] * math.prod(shape) // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return dict(draw(st.permutations(list(entries.items())))), position


@st.composite
def sound_files(draw: st.DrawFn) -> bytes:
    """Draw a sound file, with or without blanks, escapes and metadata in its JSON."""
    entries, size = draw(sound_headers())
    if draw(st.booleans()):
        entries = {
            "__metadata__": {"format": "pt", "note": draw(st.sampled_from(["", "ä", "\0", "🙂"]))},
            **entries,
        }
    text = json.dumps(entries, indent=draw(st.sampled_from([None, 1])), ensure_ascii=draw(st.booleans())).encode()
    return framed(text + b" " * draw(st.integers(0, 9)), bytes(index % 251 for index in range(size)))


def paths(document: Json, at: Path = ()) -> list[Path]:
    """Return the path of every value of a JSON document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [(*at, key) for key, _ in items] + [path for key, item in items for path in paths(item, (*at, key))]


def holder(document: Json, path: Path) -> Json:
    """Return the object or list that holds the value at a path; None if the path no longer exists."""
    for step in path[:-1]:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(document, dict):
        return document if path[-1] in document else None
    return document if isinstance(document, list) and isinstance(path[-1], int) and path[-1] < len(document) else None


@st.composite
def changed(draw: st.DrawFn, document: Json) -> str:
    """Return a document's JSON with one to three values replaced, removed or repeated."""
    result = copy.deepcopy(document)
    # Mostly one: a second fault hides the first.
    count = draw(st.sampled_from([1, 1, 1, 1, 2, 3]))
    for path in draw(st.lists(st.sampled_from(paths(document)), min_size=count, max_size=count)):
        inside = holder(result, path)
        if inside is None:
            continue
        match draw(st.sampled_from(["replace"] * 8 + ["remove", "repeat"])):
            case "remove":
                del inside[path[-1]]
            case "repeat" if isinstance(inside, dict):
                inside[f"{path[-1]}<again>"] = inside[path[-1]]
            case _:
                inside[path[-1]] = draw(VALUES)
    # JSON can repeat a key and have an integer minus zero, Python cannot.
    return re.sub(r"-0\.0\b", "-0", json.dumps(result, indent=1).replace("<again>", ""))


@st.composite
def broken_headers(draw: st.DrawFn) -> bytes:
    """Draw a sound file and replace some header values with arbitrary JSON."""
    entries, size = draw(sound_headers())
    entries["__metadata__"] = {"format": "pt"}
    entries["a"] = {"dtype": "U8", "shape": [2], "data_offsets": [size, size + 2]}
    return framed(draw(changed(entries)).encode(), bytes(size + 2 + draw(st.sampled_from([0, 0, -1, 1]))))


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the bytes with some changed, inserted, removed, or truncated."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(result) - 1, 0)))
        match draw(st.sampled_from(["set", "insert", "delete", "cut", "swap"])):
            case "insert":
                result.insert(at, draw(st.one_of(st.integers(0, 255), st.sampled_from(b'"{}[]:,-.0eE \\'))))
            case "delete":
                del result[at : at + draw(st.sampled_from([1, 1, 2, 8]))]
            case "cut":
                del result[max(at, len(result) - 20) :]
            case "set" if result:
                result[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b'"{}[]:,-.0eE \\')))
            case _:
                result[at : at + 2] = result[at : at + 2][::-1]
    return bytes(result)


BROKEN_FILES = st.one_of(
    broken_headers(),
    sound_files().flatmap(mutated),
    st.binary(max_size=200),
    st.binary(max_size=100).map(framed),
    JSON.map(lambda document: framed(json.dumps(document).encode())),
)


def indexes(names: list[str], shard: str) -> st.SearchStrategy[str]:
    """Draw the JSON of an index: a faulty one with these names and this shard, or arbitrary JSON."""
    sound = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    files = st.one_of(
        st.sampled_from([shard, "config.json", ".", "..", "a/b", "x\0", "\udcff", "\ud800", "x" * 300]), JSON
    )
    return st.one_of(
        changed(sound),
        st.dictionaries(st.one_of(st.sampled_from(names), TEXTS), files, max_size=4).map(
            lambda entries: json.dumps({"weight_map": entries})
        ),
        JSON.map(json.dumps),
    )


TELLING = "{}[]:,-#&*!|>'\"%@`?\t ~0.<$\\\x1b\x85\u2028ä🙂"
"""Characters that mean something in YAML, or that count differently in bytes."""


@st.composite
def changed_yaml(draw: st.DrawFn, text: str) -> str:
    """Draw a map's text with lines removed, repeated or exchanged, characters replaced, or values swapped."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        key, colon, value = lines[at].partition(": ")
        match draw(st.sampled_from(["remove", "repeat", "exchange", "character", "value", "swap", "indent"])):
            case "remove" if len(lines) > 1:
                del lines[at]
            case "repeat":
                lines.insert(other, lines[at])
            case "exchange":
                lines[at], lines[other] = lines[other], lines[at]
            case "character" if lines[at]:
                place = draw(st.integers(0, len(lines[at]) - 1))
                character = draw(st.one_of(st.sampled_from(TELLING), st.characters()))
                lines[at] = lines[at][:place] + character + lines[at][place + 1 :]
            case "value" if colon:
                lines[at] = f"{key}: {json.dumps(draw(JSON))}"
            case "swap" if colon:
                theirs = lines[other].partition(": ")
                lines[at], lines[other] = f"{key}: {theirs[2]}", f"{theirs[0]}: {value}"
            case _:
                lines[at] = " " * draw(st.integers(0, 3)) + lines[at]
    return "\n".join(lines)
