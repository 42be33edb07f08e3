"""Special files as every input and as the output, and the files that an index may open."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

from t5g2convert import convert
from t5g2convert.checkpoint.file_names import INDEX_FILE, SINGLE_FILE
from t5g2convert.mapping.library import mappings_folder
from tests.cli.commandline import CommandLine

pytestmark = [pytest.mark.sampled, pytest.mark.usefixtures("soon")]


class WaitedError(BaseException):
    """Not an OSError, which would look like an error of the file."""


@pytest.fixture
def soon() -> Iterator[None]:
    """Interrupt a wait for a pipe after a minute, and again: `main` turns the first interrupt into an error."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise WaitedError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 60, 10)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


FIRST: Final = "model-00001-of-00002.safetensors"
SECOND: Final = "model-00002-of-00002.safetensors"


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS: Final[dict[str, Callable[[Path], object]]] = {
    "dangling": lambda path: path.symlink_to("blobs/gone"),
    "looping": _loop,
    "fifo": os.mkfifo,
    "fifo-behind-a-link": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "dev-zero": lambda path: path.symlink_to("/dev/zero"),
    "dev-full": lambda path: path.symlink_to("/dev/full"),
    "folder": os.mkdir,
}


@pytest.fixture
def source(demo_source: Path, tmp_path: Path) -> Path:
    """Return the demo source in two files, all symlinks as in the Hub cache."""
    convert_to_shards(demo_source)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in sorted(demo_source.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../blobs") / path.name)
    return demo_source


def convert_to_shards(folder: Path) -> None:
    data = (folder / SINGLE_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    index = {}
    for shard, part in ((FIRST, names[:9]), (SECOND, names[9:])):
        first, last = header[part[0]]["data_offsets"][0], header[part[-1]]["data_offsets"][1]
        fields = {
            name: {**header[name], "data_offsets": [at - first for at in header[name]["data_offsets"]]} for name in part
        }
        text = json.dumps(fields).encode()
        (folder / shard).write_bytes(len(text).to_bytes(8, "little") + text + body[first:last])
        index |= dict.fromkeys(part, shard)
    (folder / SINGLE_FILE).unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))


def test_I12_links_into_the_cache_are_followed_to_the_last_file(
    t5g2: CommandLine, source: Path, tmp_path: Path
) -> None:
    assert t5g2("convert", source, tmp_path / "out", "--verify").code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "blobs/tokenizer.json").read_bytes()
    assert t5g2("inspect", source).code == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, FIRST, SECOND])
def test_I12_no_command_reads_a_special_file(
    name: str, kind: str, t5g2: CommandLine, source: Path, tmp_path: Path
) -> None:
    (source / name).unlink()
    KINDS[kind](source / name)
    there = sorted(path.name for path in tmp_path.iterdir())
    for arguments in (["inspect", source], ["plan", source], ["convert", source, tmp_path / "out"]):
        result = t5g2(*arguments)
        assert result.code == 3
        assert result.err.startswith(f"t5g2: {source / name}: ")
        assert result.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == there


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_I12_a_special_file_to_be_copied_is_refused(
    name: str, kind: str, t5g2: CommandLine, source: Path, tmp_path: Path
) -> None:
    """Skipped silently, it would give a model without tokenizer or end token."""
    (source / name).unlink(missing_ok=True)
    KINDS[kind](source / name)
    there = sorted(path.name for path in tmp_path.iterdir())
    result = t5g2("convert", source, tmp_path / "out")
    assert result.code == 3
    assert result.err.startswith(f"t5g2: {source / name}: ")
    assert result.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == there


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["new", "overwrite"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_I12_an_output_that_is_not_a_folder_is_refused(
    kind: str, options: list[str], t5g2: CommandLine, demo_source: Path, tmp_path: Path
) -> None:
    KINDS[kind](tmp_path / "out")
    before = sorted((path.name, path.lstat().st_ino) for path in tmp_path.iterdir())
    for output in (tmp_path / "out", tmp_path / "out/below"):
        if kind == "dangling" and output.name == "below":
            continue  # the folder that the link names is made
        result = t5g2("convert", demo_source, output, *options)
        assert (result.code, result.out) == (5, "")
        assert result.err.startswith("t5g2: ")
        assert result.err.count("\n") == 1
    assert sorted((path.name, path.lstat().st_ino) for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("output", ["/dev/full", "/dev/zero", "/dev/null"])
def test_I12_a_device_is_not_an_output(output: str, t5g2: CommandLine, demo_source: Path) -> None:
    result = t5g2("convert", demo_source, output, "--overwrite")
    assert result.code == 5
    assert result.err == f"t5g2: {output}: exists and is not a folder\n"


@pytest.mark.parametrize("kind", ["fifo", "dangling", "looping", "folder", "dev-zero"])
def test_I12_a_map_that_is_not_a_file_is_refused(kind: str, t5g2: CommandLine, tmp_path: Path) -> None:
    """Reading a pipe would block until somebody writes to it."""
    KINDS[kind](tmp_path / "map.yaml")
    result = t5g2("mappings", "check", tmp_path / "map.yaml")
    assert result.code == 4
    assert result.err.startswith(f"t5g2: {tmp_path / 'map.yaml'}")
    assert "a bug in t5g2" not in result.err


# Inputs of verify and generate: a pipe would block, a device never ends.

_LIMITED: Final = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from t5g2convert.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fifo", "dev-zero"])
@pytest.mark.parametrize("option", ["--text", "--image"])
def test_I12_a_text_or_a_picture_without_an_end_is_refused(
    option: str, kind: str, demo_source: Path, tmp_path: Path
) -> None:
    convert(demo_source, tmp_path / "out", flush=False)
    KINDS[kind](tmp_path / "given")
    command = ["verify", tmp_path / "out", "--source", demo_source, option, tmp_path / "given"]
    run = subprocess.run(
        [sys.executable, "-c", _LIMITED, *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert str(tmp_path / "given") in run.stderr


# I4: refused before anything is opened

_AUDITED: Final = """
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
from t5g2convert.cli.main import main
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write("".join(f"opened {path}\\n" for path in opened if path.startswith(sys.argv[2])))
"""

ELSEWHERE: Final = [
    "../../x", "../outside.safetensors", "/etc/hostname", "..\\outside.safetensors", "x\0.safetensors",
    "linked/x.safetensors", 3, None, ["x"], {"x": "y"}, "", ".",
]  # fmt: skip


@pytest.mark.slow
def test_I4_an_index_that_leaves_the_folder_is_refused_before_anything_is_opened(
    source: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    index: dict[str, Any] = json.loads((source / INDEX_FILE).read_text())["weight_map"]
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    os.mkfifo(tmp_path / "elsewhere/x.safetensors")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    for target in ELSEWHERE:
        (source / INDEX_FILE).unlink()
        (source / INDEX_FILE).write_text(json.dumps({"weight_map": {**index, "last": target}}))
        command = [sys.executable, "-c", _AUDITED, "inspect", str(source)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        first, *opened = run.stderr.splitlines()
        assert run.returncode == 3
        assert first.startswith(f"t5g2: {source / INDEX_FILE}: 'last' points to "), target
        assert opened == [f"opened {source / 'config.json'}", f"opened {source / INDEX_FILE}"], target
    record_property("index_targets", len(ELSEWHERE))


def test_I12_a_map_from_a_pipe_would_be_read_whole_from_a_file(t5g2: CommandLine, tmp_path: Path) -> None:
    """Control for the tests above: the same map is valid as a file."""
    (tmp_path / "map.yaml").write_text((mappings_folder() / "gemma3.yaml").read_text())
    assert t5g2("mappings", "check", tmp_path / "map.yaml").code == 0
