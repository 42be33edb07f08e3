"""Every file of `tests/attacks` through the command line: refused with a helpful message, and nothing is written."""

import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError, deserialize

from t5g2convert.checkpoint.file_names import INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.header import TensorEntry, encode_header, read_header
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.mapping.library import find_map, mappings_folder
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.cli.commandline import CommandLine, Result
from tests.processes.memory import memory_limit

ATTACKS = Path(__file__).parent / "attacks"
EXPECTED = yaml.safe_load((ATTACKS / "expected.yaml").read_text())
FOLDERS = ("headers", "indexes", "configs", "maps")
POSITION = re.compile(r":[1-9][0-9]*:[1-9][0-9]*: ")

RecordProperty = Callable[[str, object], None]


@dataclass(frozen=True)
class Attack:
    """A file of the corpus and its expected result."""

    file: Path
    code: int
    says: str
    where: str = "file"
    inspect: int | str | None = None
    at: str | None = None
    alone: int | None = None


def attacks(folder: str) -> list[Attack]:
    return [Attack(ATTACKS / folder / name, **fields) for name, fields in EXPECTED[folder].items()]


def named(attack: object) -> str:
    return attack.file.stem if isinstance(attack, Attack) else ""


@pytest.fixture(scope="module")
def sound_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo source, built once."""
    folder = tmp_path_factory.mktemp("sound") / "source"
    build_demo_source(folder)
    return folder


@pytest.fixture
def source(sound_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(sound_source, tmp_path / "source"))


@pytest.fixture
def t5g2(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Return the command line with 512 MB of additional memory; restore the signal handlers."""
    run = CommandLine(capsys)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def limited(*arguments: str | Path) -> Result:
        with memory_limit(512 * 1024**2):
            return run(*arguments)

    yield limited
    for number, handler in handlers.items():
        signal.signal(number, handler)


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def assert_clear_refusal(result: Result, code: int, says: str, where: str) -> str:
    """Require an actionable error; return its first line."""
    assert "Traceback" not in result.err
    assert "a bug in t5g2" not in result.err
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.endswith("\n")
    assert all(character.isprintable() for character in result.err.replace("\n", "")), ascii(result.err)
    first, *rest = result.err.removesuffix("\n").split("\n")
    assert first.startswith(f"t5g2: {where}")
    assert says in first
    assert all(line.startswith("  ") for line in rest), result.err
    return first


def place(attack: Attack, source: Path) -> Path:
    """Replace the sound file with a file of the corpus."""
    if attack.file.parent.name == "headers":
        target = source / SINGLE_FILE
    elif attack.file.parent.name == "configs":
        target = source / ("generation_config.json" if attack.file.stem.startswith("generation-") else "config.json")
    else:
        (source / SINGLE_FILE).rename(source / "weights.safetensors")
        target = source / INDEX_FILE
    shutil.copyfile(attack.file, target)
    return target


@pytest.mark.sampled
@pytest.mark.parametrize("attack", [*attacks("headers"), *attacks("indexes"), *attacks("configs")], ids=named)
def test_an_attack_on_a_checkpoint_is_refused(
    attack: Attack, source: Path, t5g2: Callable[..., Result], record_property: RecordProperty
) -> None:
    record_property("bad_inputs", 1)
    target = place(attack, source)
    before = contents(Path())
    where = f"{target}: " if attack.where == "file" else str(source)
    assert_clear_refusal(t5g2("plan", source), attack.code, attack.says, where)
    assert_clear_refusal(t5g2("convert", source, "output"), attack.code, attack.says, where)
    inspected = t5g2("inspect", source)
    if attack.inspect == 0:
        assert inspected.code == 0, inspected.err
        assert all(character.isprintable() for character in (inspected.out + inspected.err).replace("\n", ""))
    else:
        assert_clear_refusal(inspected, attack.code, attack.inspect or attack.says, where)  # type: ignore[arg-type]
    assert contents(Path()) == before


@pytest.mark.parametrize("attack", attacks("maps"), ids=named)
def test_an_attack_on_a_map_is_refused_at_its_place(
    attack: Attack, source: Path, t5g2: Callable[..., Result], record_property: RecordProperty
) -> None:
    record_property("bad_inputs", 1)
    before = contents(Path())
    alone = t5g2("mappings", "check", attack.file)
    against = t5g2("mappings", "check", attack.file, "--against", source)
    assert contents(Path()) == before
    if attack.alone == 0:
        assert (alone.code, alone.err) == (0, "")
        assert_clear_refusal(against, attack.code, attack.says, "")
        return
    assert against == alone
    first = assert_clear_refusal(alone, attack.code, attack.says, f"{attack.file}:{attack.at}: ")
    assert POSITION.search(first)
    lines = alone.err.splitlines()
    assert len(lines) == 3, alone.err
    column = int(str(attack.at).partition(":")[2])
    assert lines[2].partition(" (")[0].endswith("^")
    if column < 200:
        assert lines[2].index("^") == column + 1


GOOD_MAP = (mappings_folder() / "gemma3.yaml").read_text()
TIED = 'must_equal: "{text}embed_tokens.weight"'
SCALAR_ROW = """\
  - from: "scalar"
    to: {encoder: "model.encoder.scalar"}
    shape: []
    op: {take_rows: 1}
drop:
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param(
            TIED, 'must_equal: "embed_tokens.misspelt"', "lm_head.weight", id="equals-a-tensor-that-is-not-there"
        ),
        pytest.param(
            TIED, 'must_equal: "{vision}post_layernorm.weight"', "lm_head.weight", id="equals-a-tensor-of-the-tower"
        ),
        pytest.param("drop:\n", SCALAR_ROW, "take_rows", id="rows-of-a-scalar"),
    ],
)
def test_a_map_that_does_not_fit_a_text_only_source_is_refused(
    old: str, new: str, says: str, tmp_path: Path, t5g2: Callable[..., Result], record_property: RecordProperty
) -> None:
    record_property("bad_inputs", 1)
    config = {"model_type": "gemma3_text", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 8}
    write_synthetic_source(tmp_path, find_map("gemma3").map, config | {"num_hidden_layers": 1}, seed=0)
    add_tensors(tmp_path / SINGLE_FILE, {"lm_head.weight": (8, 8)})
    assert t5g2("plan", tmp_path).code == 0
    if new == SCALAR_ROW:
        add_tensors(tmp_path / SINGLE_FILE, {"scalar": ()})
    path = tmp_path / "map.yaml"
    path.write_text(GOOD_MAP.replace(old, new, 1))
    result = t5g2("plan", tmp_path, "--mapping", path)
    assert_clear_refusal(result, 3 if result.code == 3 else 4, says, "")


def add_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Append bfloat16 tensors of zeros to a file."""
    header = read_header(path)
    data = path.read_bytes()[header.data_start :]
    entries = [
        replace(item, start=item.start - header.data_start, end=item.end - header.data_start)
        for item in header.tensors.values()
    ]
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        entries.append(TensorEntry(name, "BF16", shape, len(data), len(data) + size))
        data += bytes(size)
    path.write_bytes(encode_header(entries) + data)


@pytest.mark.parametrize("attack", attacks("headers"), ids=named)
def test_the_safetensors_library_refuses_a_header_too_or_the_table_says_that_it_does_not(attack: Attack) -> None:
    content = attack.file.read_bytes()
    if attack.file.name in EXPECTED["accepted_by_safetensors"]:
        deserialize(content)
    else:
        with pytest.raises(SafetensorError):
            deserialize(content)


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_the_corpus_and_expectations_match(folder: str) -> None:
    assert {path.name for path in (ATTACKS / folder).iterdir()} == set(EXPECTED[folder])


def test_the_corpus_holds_nothing_else_and_stays_small() -> None:
    assert set(EXPECTED) == {*FOLDERS, "accepted_by_safetensors"}
    assert {path.name for path in ATTACKS.iterdir()} == {*FOLDERS, "expected.yaml", "README.md"}
    assert set(EXPECTED["accepted_by_safetensors"]) <= set(EXPECTED["headers"])
    assert sum(path.stat().st_size for path in ATTACKS.rglob("*.*")) < 350_000


def test_the_source_is_sound_before_a_file_of_it_is_replaced(source: Path, t5g2: Callable[..., Result]) -> None:
    assert t5g2("plan", source).code == 0
    assert t5g2("inspect", source).code == 0
