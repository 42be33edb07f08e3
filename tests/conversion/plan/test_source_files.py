"""Every file of a source folder is accounted for: one line each, and a note for unknown files."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import convert, plan
from t5g2convert.conversion.plan.source_files import LEFT_BEHIND

HARMLESS: Final = (
    "README.md", "LICENSE", "NOTICE.txt", ".gitattributes", ".git/HEAD", ".cache/x", ".DS_Store", "original/x.json",
    "consolidated.safetensors", "pytorch_model.bin", "gemma.gguf", "onnx/model.onnx", "tokenizer.model",
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "runs/x/events",
    "checkpoint-500/model.safetensors", "global_step5/x.pt", "zero_to_fp32.py", "latest", "wandb/x", "loss.png",
    "all_results.json", "Modelfile",
)  # fmt: skip
UNKNOWN: Final = (
    "modules.json", "1_Pooling/config.json", "modeling_custom.py", "custom_generate/generate.py",
    "value_head.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "requirements.txt",
)  # fmt: skip


def give(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def fates(folder: Path) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in plan(folder).to_json()["source_files"]}


def not_carried(folder: Path) -> list[str]:
    return [note for note in plan(folder).notes if note.startswith("not carried")]


def test_everything_in_the_folder_has_one_sentence(demo_source: Path) -> None:
    give(demo_source, *HARMLESS, *UNKNOWN, "chat_template.jinja", "additional_chat_templates/rag.jinja")
    give(demo_source, "additional_chat_templates/notes.txt")
    found = fates(demo_source)
    on_disk = {f"{path.name}/" if path.is_dir() else path.name for path in demo_source.iterdir()}
    templates = {f"additional_chat_templates/{name}" for name in ("rag.jinja", "notes.txt")}
    assert found.keys() == (on_disk - {"additional_chat_templates/"}) | templates
    assert all(item["because"] for item in found.values())
    chosen = {name: found[name]["fate"] for name in ("model.safetensors", "config.json", "chat_template.jinja")}
    assert chosen == {"model.safetensors": "read", "config.json": "read", "chat_template.jinja": "carried"}
    assert found["additional_chat_templates/rag.jinja"]["fate"] == "carried"
    assert found["tokenizer_config.json"]["fate"] in ("carried", "rewritten")
    unknown = {name for name, item in found.items() if item["fate"] == "unknown"}
    tops = {name.partition("/")[0] + "/" * ("/" in name) for name in UNKNOWN}
    assert unknown == tops | {"additional_chat_templates/notes.txt"}


def test_files_that_are_known_are_not_worth_a_note(demo_source: Path) -> None:
    give(demo_source, *HARMLESS)
    assert not_carried(demo_source) == []


@pytest.mark.parametrize("name", UNKNOWN)
def test_I18_a_file_that_nobody_knows_is_named(name: str, demo_source: Path) -> None:
    give(demo_source, name)
    assert not_carried(demo_source) == [f"not carried: {name.partition('/')[0]}{'/' * ('/' in name)}"]


def test_many_of_them_are_one_note(demo_source: Path, tmp_path: Path) -> None:
    give(demo_source, *UNKNOWN)
    (note,) = not_carried(demo_source)
    assert note.endswith(" and 3 more")
    done = convert(demo_source, tmp_path / "out", flush=False)
    assert note in done.notes
    assert not {name.partition("/")[0] for name in UNKNOWN} & {path.name for path in (tmp_path / "out").iterdir()}


def test_templates_are_not_copied_for_an_encoder(demo_source: Path, tmp_path: Path) -> None:
    give(demo_source, "additional_chat_templates/rag.jinja")
    convert(demo_source, tmp_path / "out", flush=False)
    found = {item["name"]: item for item in plan(tmp_path / "out", part="encoder").to_json()["source_files"]}
    assert found["additional_chat_templates/"]["fate"] == "left behind"
    assert found["t5g2.json"]["fate"] == "left behind"


def test_a_file_that_is_added_while_a_run_is_stopped_does_not_undo_its_shards(demo_source: Path) -> None:
    from t5g2convert.conversion.write.resume import _fingerprint

    before = _fingerprint(plan(demo_source), allow_nonfinite=False)
    give(demo_source, "notes.xyz")
    assert _fingerprint(plan(demo_source), allow_nonfinite=False) == before


def test_no_pattern_hides_what_a_conversion_writes() -> None:
    """Known unused files have a reason; weights, code and other settings never match their patterns."""
    for name in ("model.safetensors", "x.py", "modules.json", "head.safetensors", "x.bin", "config.xyz.json"):
        patterns = [pattern for each in LEFT_BEHIND.values() for pattern in each]
        assert not [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]


def test_the_same_folder_elsewhere_gives_the_same_bytes(demo_source: Path, tmp_path: Path) -> None:
    give(demo_source, *UNKNOWN)
    other = shutil.copytree(demo_source, tmp_path / "elsewhere" / demo_source.name)
    made = [convert(each, tmp_path / f"out{number}", flush=False) for number, each in enumerate((demo_source, other))]
    assert len({(each.output / "t5g2.json").read_bytes() for each in made}) == 1
