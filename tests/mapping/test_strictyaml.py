import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from t5g2convert.errors import MappingError
from t5g2convert.mapping.library import shipped_maps
from t5g2convert.mapping.strictyaml import MAX_BYTES, MAX_DEPTH, SHOWN_COLUMNS, Document, load_yaml
from t5g2convert.mapping.weightmap import LoadedMap


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, content: str | bytes) -> MappingError:
    with pytest.raises(MappingError) as caught:
        load_yaml(write(path, content))
    return caught.value


def position(error: MappingError) -> tuple[int, int]:
    _, line, column = (error.where or "").rsplit(":", 2)
    return int(line), int(column)


def caret_column(error: MappingError) -> int:
    shown, caret = error.message.splitlines()[-2:]
    assert caret.strip() == "^"
    assert shown.startswith("  ")
    return caret.index("^") - 1


DEEP_BLOCK = "".join(f"{' ' * depth}a:\n" for depth in range(1000))

REFUSED = [
    pytest.param("a: !!str x\n", (1, 4), "a tag", id="tag"),
    pytest.param("a: !!python/object/apply:os.system [id]\n", (1, 4), "a tag", id="python-tag"),
    pytest.param("b: 1\na: !own {b: 1}\n", (2, 4), "a tag", id="tagged-mapping"),
    pytest.param("a: ! x\n", (1, 4), "a tag", id="bare-tag"),
    pytest.param("a: &x 1\nb: *x\n", (1, 4), "an anchor", id="anchor"),
    pytest.param("a: &x\n  b: 1\n", (1, 4), "an anchor", id="anchored-mapping"),
    pytest.param("a: 1\nb: [1, *x]\n", (2, 8), "an alias", id="alias"),
    pytest.param("a: 1\n*x : 2\n", (2, 1), "an alias", id="alias-as-key"),
    pytest.param("a:\n  <<: {b: 1}\n", (2, 3), "merge", id="merge-key"),
    pytest.param('a: {"<<": {b: 1}}\n', (1, 5), "a merge key", id="quoted-merge-key"),
    pytest.param("a: 1\nb: 2\na: 3\n", (3, 1), "the key 'a' is duplicated", id="duplicate-key"),
    pytest.param("x:\n  - {a: 1, b: 2, a: 3}\n", (2, 18), "the key 'a' is duplicated", id="duplicate-key-inside"),
    pytest.param("a: 1\n'a': 2\n", (2, 1), "the key 'a' is duplicated", id="duplicate-key-quoted"),
    pytest.param("1: 1\n1: 2\n", (2, 1), "the key 1 is duplicated", id="duplicate-number"),
    pytest.param("a: " + "[" * 5000, (1, 4 + MAX_DEPTH), "nested more than", id="5000-deep-lists"),
    pytest.param("[" * 5000 + "]" * 5000, (1, 2 + MAX_DEPTH), "nested more than", id="5000-deep-closed"),
    pytest.param("{a: " * 5000, (1, 2 + 4 * MAX_DEPTH), "nested more than", id="5000-deep-objects"),
    pytest.param("- " * 5000 + "x", (1, 1 + 2 * (MAX_DEPTH + 1)), "nested more than", id="5000-deep-dashes"),
    pytest.param(DEEP_BLOCK, (MAX_DEPTH + 1, MAX_DEPTH + 1), "nested more than", id="1000-deep-blocks"),
    pytest.param("a: 1\n---\nb: 2\n", (2, 1), "a second document", id="two-documents"),
    pytest.param("a: 1\n...\n---\nb: 2\n", (3, 1), "a second document", id="two-documents-ended"),
    pytest.param("", (1, 1), "is empty", id="empty"),
    pytest.param("# nothing\n", (1, 1), "is empty", id="comment"),
    pytest.param("a: no\n", (1, 4), "'no', which YAML may read as bool", id="no"),
    pytest.param("a: [1, Yes]\n", (1, 8), "'Yes', which YAML may read as bool", id="yes"),
    pytest.param("a: off\n", (1, 4), "'off', which YAML may read as bool", id="off"),
    pytest.param("a: True\n", (1, 4), "'True', which YAML may read as bool", id="capital-true"),
    pytest.param("no: 1\n", (1, 1), "'no', which YAML may read as bool", id="no-as-key"),
    pytest.param("a:\n  b: 12:30\n", (2, 6), "'12:30', which YAML may read as int", id="sexagesimal"),
    pytest.param("a: 010\n", (1, 4), "'010', which YAML may read as int", id="octal"),
    pytest.param("a: 0x10\n", (1, 4), "'0x10', which YAML may read as int", id="hexadecimal"),
    pytest.param("a: 0b1\n", (1, 4), "'0b1', which YAML may read as int", id="binary-number"),
    pytest.param("a: 1_000\n", (1, 4), "'1_000', which YAML may read as int", id="underscore"),
    pytest.param("a: +1\n", (1, 4), "'+1', which YAML may read as int", id="plus"),
    pytest.param("a: .5\n", (1, 4), "'.5', which YAML may read as float", id="bare-fraction"),
    pytest.param("a: .inf\n", (1, 4), "'.inf', which YAML may read as float", id="infinity"),
    pytest.param("a: .NaN\n", (1, 4), "'.NaN', which YAML may read as float", id="nan"),
    pytest.param("a: 2026-01-31\n", (1, 4), "which YAML may read as timestamp", id="date"),
    pytest.param("a: ~\n", (1, 4), "'~', which YAML may read as null", id="tilde"),
    pytest.param("a:\nb: 1\n", (1, 3), "'', which YAML may read as null", id="no-value"),
    pytest.param("a: [1, , 2]\n", (1, 8), "expected node content", id="no-item"),
    pytest.param("true: 1\n", (1, 1), "the key True", id="boolean-key"),
    pytest.param("null: 1\n", (1, 1), "the key None", id="null-key"),
    pytest.param("1.5: 1\n", (1, 1), "the key 1.5", id="float-key"),
    pytest.param("? [a, b]\n: 1\n", (1, 3), "is not a name", id="list-key"),
    pytest.param("? {a: 1}\n: 1\n", (1, 3), "is not a name", id="mapping-key"),
    pytest.param("a: [1\n", (2, 1), "expected ',' or ']'", id="unclosed"),
    pytest.param("a: 'x\n", (2, 1), "unexpected end of stream", id="unclosed-quote"),
    pytest.param("a:\n\tb: 1\n", (2, 1), "cannot start any token", id="tab"),
    pytest.param("a: b: c\n", (1, 5), "mapping values are not allowed", id="two-colons"),
    pytest.param("%YAML 2.0\n---\na: 1\n", (1, 1), "incompatible YAML", id="yaml-2"),
    pytest.param("a: 1\r\nb: no\r\n", (2, 4), "'no'", id="windows-lines"),
    pytest.param("Größe: no\n", (1, 8), "'no'", id="umlauts"),
    pytest.param("{🙂🙂: 1, b: no}\n", (1, 12), "'no'", id="emoji"),
    pytest.param("a: " + "1" * 5000 + "\n", (1, 4), "", id="number-of-5000-digits"),
    pytest.param("a: -" + "1" * 5000 + "\n", (1, 4), "", id="negative-number-of-5000-digits"),
]


@pytest.mark.parametrize(("text", "at", "reason"), REFUSED)
def test_C1_yaml_with_traps_is_refused_at_its_position(
    text: str, at: tuple[int, int], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "map.yaml"
    error = refusal(path, text)
    assert reason in error.message
    assert position(error) == at
    assert (error.where or "").startswith(f"{path}:")


@pytest.mark.parametrize(("text", "at", "reason"), REFUSED)
def test_C1_the_caret_is_under_the_reported_column(text: str, at: tuple[int, int], reason: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / "map.yaml", text)
    lines = [*text.splitlines(), ""]
    assert error.message.splitlines()[-2] == f"  {lines[at[0] - 1][:SHOWN_COLUMNS]}"
    assert caret_column(error) == position(error)[1]


@pytest.mark.parametrize(
    ("content", "at"),
    [
        (b"a: 1\nb: \xff\xfe\n", (2, 4)),
        (b"a: 1\nb: \xed\xa0\x80\n", (2, 4)),
        (b"a: 1\nb: x\0y\n", (2, 5)),
        (b"a: 1\nb: \x1b[31m\n", (2, 4)),
        (bytes(range(128, 256)), (1, 1)),
    ],
    ids=["bad-utf8", "surrogate", "nul", "escape", "binary"],
)
def test_C1_bytes_that_are_not_text_are_refused_with_their_position(
    content: bytes, at: tuple[int, int], tmp_path: Path
) -> None:
    error = refusal(tmp_path / "map.yaml", content)
    assert position(error) == at


def test_C1_quoted_lines_of_a_file_are_printable(tmp_path: Path) -> None:
    for content in (b"a: 1\nb: \x1b[31mred\n", b"a: \x9b31m\n", b"a: !\x1b[31m x\n"):
        text = str(refusal(tmp_path / "map.yaml", content))
        assert "\x1b" not in text
        assert "\x9b" not in text


@pytest.mark.parametrize("filling", [b"a: 1\n", b"# \n", b"\0", b"[", b"\xff"])
def test_C1_a_file_over_1_MiB_is_refused_unparsed(filling: bytes, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    error = refusal(path, (filling * (MAX_BYTES // len(filling) + 1))[: MAX_BYTES + 1])
    assert "larger than 1 MiB" in error.message
    assert (error.where or "").startswith(str(path))


def test_C1_a_file_over_1_MiB_is_refused_with_a_position_and_a_caret(tmp_path: Path) -> None:
    line = "a: 1  # a comment\n"
    error = refusal(tmp_path / "map.yaml", line * (MAX_BYTES // len(line) + 1))
    assert position(error) == (MAX_BYTES // len(line) + 1, MAX_BYTES % len(line) + 1)
    assert caret_column(error) == position(error)[1]


@pytest.mark.parametrize("deep", ["[" * 5000, "{a: " * 5000, "- " * 5000, "[" * 5000 + "]" * 5000], ids=len)
def test_C1_deep_nesting_is_refused_before_it_is_walked(
    deep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyYAML takes ten seconds for the whole file; read only a few events."""
    events = 0
    parse = yaml.parse

    def counted(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal events
        for event in parse(*arguments, **options):
            events += 1
            yield event

    monkeypatch.setattr("t5g2convert.mapping.strictyaml.yaml.parse", counted)
    assert "nested more than" in refusal(tmp_path / "map.yaml", deep).message
    assert events < 4 * MAX_DEPTH


def test_a_file_of_just_1_MiB_is_read(tmp_path: Path) -> None:
    text = "a: 1\n#"
    document = load_yaml(write(tmp_path / "map.yaml", text + "x" * (MAX_BYTES - len(text))))
    assert document.data == {"a": 1}


def test_nesting_up_to_the_limit_is_read(tmp_path: Path) -> None:
    text = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    assert load_yaml(write(tmp_path / "map.yaml", text)).data == yaml.safe_load(text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="cannot be read: No such file") as caught:
        load_yaml(tmp_path / "map.yaml")
    assert caught.value.where == str(tmp_path / "map.yaml")


PLAIN = """\
# A plain document.
text: a value with spaces   # and a comment
quoted: "no"
single: '12:30'
escaped: "a\\tb"
integer: 42
zero: 0
negative: -7
float: 1.25
small: 0.000001
yes_: true
no_: false
nothing: null
list: [1, two, "3"]
nested:
  - {a: 1, b: [x, y]}
  - c: d
    e:
      f: g
empty_map: {}
empty_list: []
12: a number as key
folded: >
  one
  two
literal: |
  one
  two
"{text}layers.{layer}": braces
$name: $value
"""


def test_a_plain_document_is_read_as_by_pyyaml(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path / "map.yaml", PLAIN)).data == yaml.safe_load(PLAIN)


def test_a_document_that_starts_with_three_dashes_is_read(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path / "map.yaml", "---\na: 1\n...\n")).data == {"a": 1}


@pytest.mark.parametrize("shipped", shipped_maps(), ids=lambda loaded: loaded.map.name)
def test_a_shipped_map_is_read_as_by_pyyaml(shipped: LoadedMap) -> None:
    assert load_yaml(shipped.path).data == yaml.safe_load(shipped.path.read_text())


def test_quoted_traps_are_text(tmp_path: Path) -> None:
    traps = ["no", "12:30", "010", "~", "", "<<", "2026-01-31", "0x10", ".inf", "null", "true", "1.5"]
    text = "".join(f'- "{trap}"\n' for trap in traps)
    assert load_yaml(write(tmp_path / "map.yaml", text)).data == traps


EXPONENT = re.compile(r"-?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+")


@pytest.mark.parametrize("number", ["1e5", "1e-6", "-2.5e3", "1.0E+2"])
def test_an_exponent_makes_a_number_as_in_yaml_1_2(number: str, tmp_path: Path) -> None:
    assert EXPONENT.fullmatch(number)
    assert load_yaml(write(tmp_path / "map.yaml", f"a: {number}\n")).data == {"a": float(number)}


TEXTS = st.text(max_size=8).filter(lambda text: EXPONENT.fullmatch(text) is None)
SCALARS = st.one_of(TEXTS, st.integers(), st.booleans(), st.none(), st.floats(-1e9, 1e9))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


@given(TREES)
def test_pyyaml_output_is_read_the_same_or_refused_with_a_position(
    tmp_path_factory: pytest.TempPathFactory, tree: object
) -> None:
    text = yaml.safe_dump(tree, allow_unicode=True)
    path = write(tmp_path_factory.getbasetemp() / "dumped.yaml", text)
    try:
        document = load_yaml(path)
    except MappingError as error:
        where = error.where or ""
    else:
        assert document.data == yaml.safe_load(text)
        return
    assert where.startswith(f"{path}:")


@given(st.one_of(st.text(alphabet="ab:-[]{},#&*!|>'\"%@`?\n\t ~01.<", max_size=40), st.text(max_size=20)))
def test_any_text_is_refused_as_a_mapping_error_or_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, newline="", errors="surrogatepass")
    try:
        document = load_yaml(path)
    except MappingError:
        return
    assert isinstance(document, Document)


def test_every_node_knows_its_position(tmp_path: Path) -> None:
    document = load_yaml(write(tmp_path / "map.yaml", "a:\n  - {b: 1,  c: [x, yy]}\n  - d: e\n"))
    expected = {
        ("a", "<key>"): (1, 1),
        ("a",): (2, 3),
        ("a", 0): (2, 5),
        ("a", 0, "b", "<key>"): (2, 6),
        ("a", 0, "b"): (2, 9),
        ("a", 0, "c", "<key>"): (2, 13),
        ("a", 0, "c", 1): (2, 20),
        ("a", 1, "d"): (3, 8),
        ("a", 1, "d", "missing", 3): (3, 8),
    }
    for at, (line, column) in expected.items():
        error = document.error("wrong", at)
        assert position(error) == (line, column), at
        assert caret_column(error) == column
