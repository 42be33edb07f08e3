"""Folders that belong to somebody else, and every command that writes a folder: nothing in them is changed."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from t5g2convert import OutputError, convert
from t5g2convert.adaptation.average import average
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.rows import Document
from t5g2convert.adaptation.export import export, export_checkpoint
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.errors import T5g2Error
from tests.adaptation.runs import FACTS, text_only, trained_from, write_checkpoint, write_run
from tests.folders import write_old

State = dict[str, tuple[int, int, bytes]]


def state(folder: Path) -> State:
    """Return inode, mode and content of everything in a folder, and its link targets."""
    found: State = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        data = bytes(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_mode, data)
    return found


def repository(folder: Path) -> None:
    (folder / ".git/objects").mkdir(parents=True)
    (folder / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (folder / "paper.tex").write_text("two years of work")


def home(folder: Path) -> None:
    (folder / ".ssh").mkdir(parents=True)
    (folder / ".ssh/id_ed25519").write_text("secret")
    (folder / ".bashrc").write_text("export PATH")


def models(folder: Path) -> None:
    for name in ("one", "two"):
        write_old(folder / name)


def another_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")


def ours_with_a_stranger(folder: Path) -> None:
    write_old(folder)
    (folder / "trainer_state.json").write_text("{}")


def ours_trained_further(folder: Path) -> None:
    write_old(folder)
    (folder / "model.safetensors").write_bytes(b"mine")


def another_model_with_our_manifest(folder: Path) -> None:
    another_model(folder)
    write_old(folder.with_name("ours"))
    shutil.copy(folder.with_name("ours") / "t5g2.json", folder)
    shutil.copytree(folder.with_name("ours") / "below", folder / "eval")


def link_to_ours(folder: Path) -> None:
    write_old(folder.with_name("real"))
    folder.symlink_to("real")


def link_to_a_link(folder: Path) -> None:
    write_old(folder.with_name("real"))
    folder.with_name("hop").symlink_to("real")
    folder.symlink_to("hop")


def link_in_ours(folder: Path) -> None:
    repository(folder.with_name("project"))
    write_old(folder)
    shutil.rmtree(folder / "below")
    (folder / "below").symlink_to("../project")


def of_another_user(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give folders away")
    write_old(folder)
    os.chown(folder, 65534, 65534)


def a_mounted_disk(folder: Path) -> None:
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    write_old(folder)


def a_file(folder: Path) -> None:
    folder.write_text("a backup")


def packed_data_with_a_stranger(folder: Path) -> None:
    folder.mkdir()
    (folder / "index.json").write_text('{"format": 1}')
    (folder / "novel.txt").write_text("Call me Ishmael.")


ZOO: Final[dict[str, Callable[[Path], None]]] = {
    made.__name__: made
    for made in (
        repository, home, models, another_model, ours_with_a_stranger, ours_trained_further,
        another_model_with_our_manifest, link_to_ours, link_to_a_link, link_in_ours, of_another_user, a_mounted_disk,
        a_file, packed_data_with_a_stranger,
    )
}  # fmt: skip

Write = Callable[[Path], object]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Return a folder with `gemma`, its conversion `model`, and `run` with two checkpoints."""
    from t5g2convert.cli.demo import build_demo_source

    folder = tmp_path_factory.mktemp("stage")
    build_demo_source(folder / "gemma")
    convert(folder / "gemma", folder / "model", flush=False)
    write_run(folder / "run", folder / "model", 40)
    values = trained_from(folder / "model", lambda name: text_only(name) and "norm" in name)
    for step in (20, 40):
        write_checkpoint(folder / f"run/checkpoints/step-{step:08d}", values, step)
    return folder


@pytest.fixture
def commands(stage: Path) -> dict[str, Write]:
    """Return each command that writes a folder, with and without replacing the target."""
    model, run = stage / "model", stage / "run"
    last = run / "checkpoints/step-00000040"
    return {
        "convert": partial(convert, stage / "gemma", overwrite=True, flush=False),
        "extract": partial(convert, model, part="decoder", overwrite=True, flush=False),
        "pack": lambda target: pack(model, target, [Document("a", "b")], overwrite=True, flush=False),
        "average": lambda target: average(run, target, last=2, model=model, overwrite=True),
        "export": lambda target: export(
            model, CheckpointReader(last), target, facts=FACTS, overwrite=True, flush=False
        ),
    }


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[Path]:
    """Return a folder for the target, and unmount it afterwards."""
    (tmp_path / "zoo").mkdir()
    yield tmp_path / "zoo/out"
    if (tmp_path / "zoo/out").is_mount():
        subprocess.run(["umount", tmp_path / "zoo/out"], check=True)


@pytest.mark.parametrize("command", ["convert", "extract", "pack", "average", "export"])
@pytest.mark.parametrize("animal", ZOO)
def test_O9_foreign_folders_stay(animal: str, command: str, commands: dict[str, Write], unmounted: Path) -> None:
    ZOO[animal](unmounted)
    before = state(unmounted.parent)
    with pytest.raises(OutputError) as error:
        commands[command](unmounted)
    assert state(unmounted.parent) == before
    assert len(str(error.value).splitlines()) == 1
    assert error.value.where is not None


@pytest.mark.parametrize("animal", ZOO)
def test_O9_foreign_folders_stay_at_the_path_of_an_export(animal: str, stage: Path, unmounted: Path) -> None:
    """RUN/model, which `adapt` writes without `--overwrite`."""
    run = unmounted.parent
    shutil.copytree(stage / "run", run, dirs_exist_ok=True)
    ZOO[animal](unmounted)
    unmounted.rename(run / "model") if not unmounted.is_mount() else (run / "model").symlink_to("out")
    before = state(run)
    with pytest.raises(OutputError):
        export_checkpoint(run, run / "checkpoints/step-00000040", stage / "model")
    assert state(run) == before


@pytest.mark.parametrize("command", ["average", "export"])
@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step-00000020", "tensorboard", "..", "run.json"])
def test_O12_a_run_is_not_replaced_by_its_own_output(
    command: str, place: str, stage: Path, commands: dict[str, Write]
) -> None:
    before = state(stage)
    if (command, place) != ("export", "tensorboard"):  # there is no target yet, so nothing is lost
        with pytest.raises(T5g2Error):
            commands[command](stage / "run" / place)
    assert state(stage) == before


@pytest.mark.parametrize("command", ["convert", "extract", "average", "export"])
def test_an_output_of_ours_is_replaced_by_every_command(
    command: str, commands: dict[str, Write], tmp_path: Path
) -> None:
    write_old(tmp_path / "out")
    commands[command](tmp_path / "out")
    assert not (tmp_path / "out/below").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_packed_data_is_replaced_by_packed_data_alone(commands: dict[str, Write], tmp_path: Path) -> None:
    commands["pack"](tmp_path / "out")
    before = (tmp_path / "out").stat().st_ino
    commands["pack"](tmp_path / "out")
    assert (tmp_path / "out").stat().st_ino != before
    for command in ("convert", "extract", "average", "export"):
        with pytest.raises(OutputError, match="and is not replaced"):
            commands[command](tmp_path / "out")
    (tmp_path / "out/text-00000.bin").write_bytes(b"1234" * 2)
    with pytest.raises(OutputError, match=r"changed since t5g2 wrote it"):
        commands["pack"](tmp_path / "out")
