"""What may be written, filled or replaced: files that are not ours never change."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from t5g2convert import OutputError, UsageError, convert
from t5g2convert.conversion.output.path_rules import check_target, is_mount_point
from t5g2convert.conversion.output.recovery import WorkFolders
from t5g2convert.conversion.output.staging import Staging
from tests.folders import OLD, manifest_of, write_old

NOBODY: Final = 65534


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, and the targets of its links."""
    return {
        path.relative_to(folder).as_posix(): bytes(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(target: Path, *, overwrite: bool = True, meanwhile: Callable[[], object] = lambda: None) -> Staging:
    """Publish a folder with one file, after calling `meanwhile`."""
    with Staging(target, overwrite=overwrite) as staging:
        (staging.folder / "config.json").write_text("new")
        meanwhile()
        staging.commit()
    return staging


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give folders away and mount disks")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a mount point of a small disk."""
    needs_root()
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=99m", "none", folder], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return an output of the converter."""
    write_old(tmp_path / "out")
    return tmp_path / "out"


# What --overwrite replaces


def test_O9_an_output_of_ours_is_replaced(old: Path, tmp_path: Path) -> None:
    check_target(old, tmp_path / "source", overwrite=True)
    with pytest.raises(OutputError, match=r"not empty \(--overwrite replaces it\)"):
        check_target(old, tmp_path / "source", overwrite=False)


STRANGERS: Final[dict[str, Callable[[Path], object]]] = {
    "a file": lambda out: (out / "thesis.tex").write_text("two years"),
    "a hidden file": lambda out: (out / ".env").write_text("secret"),
    "an empty folder": lambda out: (out / "checkpoints").mkdir(),
    "a file below": lambda out: (out / "below/notes.md").write_text("mine"),
    "a card": lambda out: (out / "README.md").write_text("by hand"),
    "a link": lambda out: (out / "link").symlink_to("/etc/hostname"),
    "a link that is listed": lambda out: (
        (out / "config.json").unlink(),
        (out / "config.json").symlink_to("/dev/null"),
    ),
    "a pipe": lambda out: os.mkfifo(out / "pipe"),
    "other bytes of the same size": lambda out: (out / "model.safetensors").write_bytes(b"mine"),
    "other bytes": lambda out: (out / "config.json").write_text("{ }\n\n"),
    "a manifest that was edited": lambda out: (out / "t5g2.json").write_bytes(OLD["t5g2.json"].replace(b"{}", b"{ }")),
    "no manifest": lambda out: (out / "t5g2.json").unlink(),
    "a manifest of another tool": lambda out: (out / "t5g2.json").write_text(json.dumps({"format": 1, "files": {}})),
    "a manifest that is a link": lambda out: (
        (out / "t5g2.json").rename(out.parent / "elsewhere"),
        (out / "t5g2.json").symlink_to("../elsewhere"),
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_O9_a_folder_with_anything_else_in_it_is_not_replaced(old: Path, stranger: str) -> None:
    STRANGERS[stranger](old)
    before = contents(old)
    inode = old.stat().st_ino
    with pytest.raises(OutputError, match="and is not replaced"):
        write(old)
    assert contents(old) == before
    assert old.stat().st_ino == inode
    assert not list(old.parent.glob(".out*"))


def test_O9_all_strangers_are_named(old: Path) -> None:
    (old / "data").mkdir()
    (old / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"contains files that t5g2 did not write, .*: data/, thesis\.tex") as error:
        check_target(old, overwrite=True)
    assert error.value.details == ("data/", "thesis.tex")
    assert error.value.hint == "move them away, or choose another folder"


def test_O9_a_missing_file_does_not_prevent_replacement(old: Path) -> None:
    (old / "model.safetensors").unlink()
    write(old)
    assert names(old) == {"config.json"}


def test_O9_the_current_folder_its_parents_and_the_home_folder_are_not_replaced(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old / "below")
    for target in (Path(), Path(".."), Path("../../out")):
        with pytest.raises(OutputError, match=r"the current folder|holds more|not a folder that t5g2 wrote"):
            check_target(target, overwrite=True)
    with pytest.raises(OutputError, match="contains the current folder"):
        check_target(old, overwrite=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(old))
    with pytest.raises(OutputError, match="is the home folder"):
        check_target(old, overwrite=True)
    with pytest.raises(OutputError):
        check_target(Path("/"), overwrite=True)


def test_O9_a_folder_of_another_user_is_not_replaced(old: Path) -> None:
    needs_root()
    os.chown(old, NOBODY, NOBODY)
    with pytest.raises(OutputError, match=f"belongs to another user \\({NOBODY}\\)"):
        check_target(old, overwrite=True)


@pytest.mark.parametrize("end", ["staging", "old"])
@pytest.mark.parametrize("what", ["a link", "a file", "another user's"])
def test_O9_similar_names_next_to_the_output_are_not_touched(tmp_path: Path, end: str, what: str) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/thesis.tex").write_text("precious")
    path = tmp_path / f".out.t5g2-{end}"
    if what == "a link":
        path.symlink_to("victim")
    elif what == "a file":
        path.write_text("mine")
    else:
        needs_root()
        shutil.copytree(tmp_path / "victim", path)
        os.chown(path, NOBODY, NOBODY)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="t5g2 needs it as a work folder") as error:
            check_target(tmp_path / "out", overwrite=overwrite)
        assert error.value.where == str(path)
        with pytest.raises(OutputError, match="t5g2 needs it"), Staging(tmp_path / "out", overwrite=overwrite):
            raise AssertionError
    assert contents(tmp_path) == before


def test_O9_a_folder_being_removed_that_is_another_users_is_left_alone(old: Path) -> None:
    needs_root()
    theirs = WorkFolders.of(old).removed
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("precious")
    os.chown(theirs, NOBODY, NOBODY)
    write(old)
    assert contents(theirs) == {"thesis.tex": b"precious"}
    assert names(old.parent) == {"out", theirs.name}


def test_our_temporary_names_are_not_outputs(tmp_path: Path) -> None:
    for name in (".out.t5g2-staging", ".out.t5g2-old", ".out.t5g2-removed-2", ".t5g2-staging/below"):
        with pytest.raises(OutputError, match="is a name reserved by t5g2"):
            check_target(tmp_path / name, overwrite=False)


# What is read


def test_O12_files_that_are_read_are_protected_behind_links(old: Path, tmp_path: Path) -> None:
    """As in a Hub cache, with all files symlinked to blobs."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").symlink_to(tmp_path / "hop")
    (tmp_path / "hop").symlink_to("out/model.safetensors")
    with pytest.raises(
        OutputError, match=r"contains model\.safetensors, an input through the link .*source/model\.safetensors"
    ):
        check_target(old, source, overwrite=True)
    (tmp_path / "elsewhere").write_text("weights")
    (tmp_path / "hop").unlink()
    (tmp_path / "hop").symlink_to("elsewhere")
    check_target(old, source, overwrite=True)


def test_O12_a_single_file_that_is_read_is_protected(old: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"contains .*config\.json, which is an input"):
        check_target(old, old / "config.json", overwrite=True)
    (tmp_path / "map.yaml").symlink_to("out/config.json")
    with pytest.raises(OutputError, match="contains"):
        check_target(old, tmp_path / "map.yaml", overwrite=True)


def test_O12_a_source_in_a_folder_to_be_removed_is_refused(demo_source: Path, tmp_path: Path) -> None:
    source = demo_source.rename(tmp_path / ".out.t5g2-staging")
    before = contents(source)
    with pytest.raises(OutputError, match="but it is an input"):
        convert(source, tmp_path / "out")
    assert contents(source) == before


def test_O12_a_map_in_the_output_is_protected(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "out", flush=False)
    (tmp_path / "out/map.yaml").write_text("format: 1")
    with pytest.raises(OutputError, match=r"contains .*map\.yaml, which is an input"):
        convert(demo_source, tmp_path / "out", overwrite=True, mapping=str(tmp_path / "out/map.yaml"))
    assert (tmp_path / "out/map.yaml").read_text() == "format: 1"


def test_a_source_without_a_name_is_not_the_current_folder(tmp_path: Path) -> None:
    for source in ("", " "):
        with pytest.raises(UsageError, match="the source is empty"):
            convert(source, tmp_path / "out")


# Folders that were prepared


@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o1777])
def test_O10_an_empty_folder_is_filled_in_place(demo_source: Path, tmp_path: Path, mode: int) -> None:
    target = tmp_path / "out"
    target.mkdir()
    if os.geteuid() == 0:
        os.chown(target, NOBODY, NOBODY)
    target.chmod(mode)
    before = target.stat()
    convert(demo_source, target)
    convert(demo_source, tmp_path / "plain", flush=False)
    after = target.stat()
    assert (after.st_mode, after.st_uid, after.st_gid, after.st_ino) == (
        before.st_mode, before.st_uid, before.st_gid, before.st_ino
    )  # fmt: skip
    assert contents(target) == contents(tmp_path / "plain")
    assert names(tmp_path) == {"demo-source", "out", "plain"}
    if mode & stat.S_ISGID:
        assert {path.stat().st_gid for path in target.iterdir()} == {before.st_gid}


def test_O10_the_current_folder_is_filled_and_still_the_current_folder(
    demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(demo_source, Path())
    assert "config.json" in os.listdir(".")  # noqa: PTH208


@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o555])
def test_O10_a_folder_that_is_replaced_gives_its_mode_to_the_next(old: Path, mode: int) -> None:
    old.chmod(mode)
    with Staging(old, overwrite=True) as staging:
        assert stat.S_IMODE(staging.folder.stat().st_mode) == mode | 0o700, "also while it is written"
        (staging.folder / "new").touch()
        staging.commit()
    assert stat.S_IMODE(old.stat().st_mode) == mode
    assert names(old) == {"new"}
    assert names(old.parent) == {"out"}


def test_O10_a_mount_point_is_filled(demo_source: Path, disk: Path) -> None:
    convert(demo_source, disk)
    assert "config.json" in names(disk)
    assert disk.is_mount()
    assert names(disk.parent) == {"demo-source", "disk"}


def test_O10_a_mount_point_that_is_not_empty_is_refused_before_any_work(disk: Path) -> None:
    write_old(disk)
    with pytest.raises(OutputError, match="is a mount point, which cannot be replaced"):
        check_target(disk, overwrite=True)
    with pytest.raises(OutputError, match="it is a mount point; choose a folder inside it"):
        check_target(disk, overwrite=False)


def test_O10_a_part_of_the_same_disk_is_a_mount_point_too(old: Path, tmp_path: Path) -> None:
    needs_root()
    bound = tmp_path / "a b"
    bound.mkdir()
    if subprocess.run(["mount", "--bind", old, bound], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        assert is_mount_point(bound)
        assert not is_mount_point(old)
        with pytest.raises(OutputError, match="is a mount point"):
            check_target(bound, overwrite=True)
    finally:
        subprocess.run(["umount", bound], check=True)


# What others do meanwhile


@pytest.mark.parametrize("way", ["new", "fill", "overwrite"])
def test_O12_files_that_others_write_meanwhile_stay(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    if way == "overwrite":
        write_old(target)
    elif way == "fill":
        target.mkdir()

    def meanwhile() -> None:
        target.mkdir(exist_ok=True)
        (target / "eval.txt").write_text("results")

    with pytest.raises(OutputError, match="by another process"):
        write(target, meanwhile=meanwhile)
    assert contents(target) == {"eval.txt": b"results", **(OLD if way == "overwrite" else {})}
    assert names(tmp_path) == {"out"}


def test_O12_a_file_that_is_written_again_meanwhile_stays(old: Path) -> None:
    with pytest.raises(OutputError, match=r"was changed by another process: model\.safetensors"):
        write(old, meanwhile=lambda: (old / "model.safetensors").write_text("mine"))
    assert (old / "model.safetensors").read_text() == "mine"


def test_O12_a_resumable_run_keeps_its_shards(
    demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(demo_source, tmp_path / "out", flush=False)

    def judge(folder: Path) -> None:
        (tmp_path / "out/eval.txt").write_text("results")

    options = {"max_shard_bytes": 100_000, "overwrite": True, "resume": True}
    with pytest.raises(OutputError, match=r"eval\.txt.*continue with --resume"):
        convert(demo_source, tmp_path / "out", judge=judge, **options)  # type: ignore[arg-type]
    (tmp_path / "out/eval.txt").rename(tmp_path / "eval.txt")
    done = convert(demo_source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert len(done.kept) == len(done.shards)


# What is being removed


def test_O11_a_replaced_folder_never_comes_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies before or while removing the old folder, and the user removes the output."""

    def die(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolders, "clear_removed", die)
        with pytest.raises(KeyboardInterrupt):
            write(old)
    assert names(old) == {"config.json"}
    assert names(old.parent) == {"out", ".out.t5g2-removed"}
    shutil.rmtree(old)
    with Staging(old) as staging:
        assert not old.exists()
        (staging.folder / "config.json").write_text("newer")
        staging.commit()
    assert contents(old.parent) == {"out/config.json": b"newer"}


def test_O11_the_same_between_the_renames(old: Path) -> None:
    old.rename(WorkFolders.of(old).old)
    with Staging(old) as staging:
        assert not old.exists(), "without its staging folder the swap was complete, and the output went later"
        (staging.folder / "config.json").write_text("new")
        staging.commit()
    assert contents(old.parent) == {"out/config.json": b"new"}


def test_O11_an_old_folder_with_strangers_in_it_is_not_removed(old: Path) -> None:
    (old / "thesis.tex").write_text("precious")
    left = old.rename(WorkFolders.of(old).old)
    with pytest.raises(OutputError, match=r"thesis\.tex"), Staging(old):
        raise AssertionError
    assert contents(left) == {**OLD, "thesis.tex": b"precious"}


def test_O11_a_failed_removal_is_reported_and_does_not_block(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if ".t5g2-removed" not in str(path):
            rmtree(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for number in (1, 2):
        with Staging(old, overwrite=True) as staging:
            (staging.folder / "t5g2.json").write_bytes(manifest_of({}))
            staging.commit()
        assert len(staging.notes) == number
        assert all("could not be removed" in note and note.endswith(": Permission denied") for note in staging.notes)
    assert names(old.parent) == {"out", ".out.t5g2-removed", ".out.t5g2-removed-2"}
    monkeypatch.undo()
    write(old)
    assert names(old.parent) == {"out"}


# What a killed run left in a folder that it filled


def test_O4_files_that_were_moved_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    rename = os.rename

    def die(one: Path, other: Path) -> None:
        if Path(other).name == "t5g2.json":
            os._exit(9)
        rename(one, other)

    pid = os.fork()
    if not pid:
        monkeypatch.setattr(os, "rename", die)
        with Staging(target) as staging:
            write_old(staging.folder)
            staging.commit()
    os.waitpid(pid, 0)
    assert names(target) == {".t5g2-staging", "model.safetensors", "below"}
    before = contents(target)
    (target / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"), Staging(target):
        raise AssertionError
    assert contents(target) == {**before, "mine.txt": b"mine"}, "with strangers in it nothing is cleared"
    (target / "mine.txt").unlink()
    with Staging(target) as staging:
        assert names(target) == {".t5g2-staging"}
        (staging.folder / "config.json").write_text("new")
        staging.commit()
    assert contents(target) == {"config.json": b"new"}
