"""Additional chat templates: which files count, and what an output may be called."""

import os
from pathlib import Path

import pytest

from t5g2convert import plan
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.tokenizer.chat_templates import held, is_output_name, templates_of
from t5g2convert.errors import CheckpointError

FOLDER = "additional_chat_templates"


def give(source: Path, *names: str) -> Path:
    (source / FOLDER).mkdir()
    for name in names:
        (source / FOLDER / name).write_text("text")
    return source


@pytest.mark.parametrize("name", ["config.json", f"{FOLDER}/tool_use.jinja", f"{FOLDER}/a b.jinja"])
def test_a_name_that_an_output_may_have(name: str) -> None:
    assert is_output_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        FOLDER + "/",
        f"{FOLDER}/x.txt",
        f"{FOLDER}/../x.jinja",
        f"{FOLDER}/a/b.jinja",
        f"{FOLDER}//x.jinja",
        f"/{FOLDER}/x.jinja",
        f"x/{FOLDER}/x.jinja",
        f"{FOLDER}/a\\b.jinja",
        f"{FOLDER}/a\0.jinja",
        "other/x.jinja",
    ],
    ids=ascii,
)
def test_no_other_path_may_be_written_or_sent(name: str) -> None:
    assert not is_output_name(name)


def test_templates_are_held_in_the_order_of_their_names(demo_source: Path) -> None:
    give(demo_source, "tool_use.jinja", "rag.jinja", "notes.txt")
    source = open_checkpoint(demo_source)
    assert templates_of(source) == (f"{FOLDER}/rag.jinja", f"{FOLDER}/tool_use.jinja")
    wanted = ("tokenizer.json", "nothing.json", f"{FOLDER}/")
    assert held(source, wanted) == ["tokenizer.json", f"{FOLDER}/rag.jinja", f"{FOLDER}/tool_use.jinja"]


def test_a_source_without_the_folder_has_none(demo_source: Path) -> None:
    assert templates_of(open_checkpoint(demo_source)) == ()
    (demo_source / FOLDER).write_text("a file")
    assert templates_of(open_checkpoint(demo_source)) == ()


@pytest.mark.parametrize("name", [".hidden.jinja", "a\nb.jinja", "a\\b.jinja", b"a\xff.jinja"], ids=ascii)
def test_a_name_that_cannot_be_written_is_refused(name: str | bytes, demo_source: Path) -> None:
    give(demo_source, os.fsdecode(name))
    with pytest.raises(CheckpointError, match="is not a valid name of a chat template") as refused:
        plan(demo_source)
    assert "\n" not in str(refused.value)


def test_a_link_to_a_file_is_followed(demo_source: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("text")
    give(demo_source)
    (demo_source / FOLDER / "rag.jinja").symlink_to(tmp_path / "blob")
    assert templates_of(open_checkpoint(demo_source)) == (f"{FOLDER}/rag.jinja",)


def dangling(path: Path) -> None:
    path.symlink_to("gone")


@pytest.mark.parametrize("make", [dangling, Path.mkdir, os.mkfifo], ids=["dangling", "folder", "pipe"])
def test_I12_a_template_that_is_not_a_file_is_refused(make: object, demo_source: Path) -> None:
    give(demo_source)
    assert callable(make)
    make(demo_source / FOLDER / "rag.jinja")
    with pytest.raises(CheckpointError) as refused:
        plan(demo_source)
    assert refused.value.where == str(demo_source / FOLDER / "rag.jinja")
