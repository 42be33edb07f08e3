"""Card and upload of a folder that was trained elsewhere: the files that loaders read, and its origin."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.publish.card import model_card
from t5g2convert.publish.sent_files import manifest_files, trained_elsewhere_files
from tests.publish.folders import change_manifest, from_hub
from tests.publish.scene import Scene

LEFT_BY_TRAINER = ("optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", ".env", "notes.txt")


def trained(out: Path, folder: Path) -> Path:
    """Copy the folder with the files that Trainer leaves."""
    shutil.copytree(out, folder)
    (folder / "t5g2.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.24.0"}))
    for name in LEFT_BY_TRAINER:
        (folder / name).write_bytes(b"mine")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100/model.safetensors").write_bytes(b"")
    return folder


def made(folder: Path, start: Path | None, **options: Any) -> str:
    chosen = {"repo": "", "source_card": None, "existing": None, "mode": "update", **options}
    card = model_card(folder, start=start, **chosen)
    assert card is not None
    return card


def test_the_card_names_the_origin_of_the_start(converted: Path, tmp_path: Path) -> None:
    folder = trained(converted, tmp_path / "trained")
    change_manifest(converted, from_hub("google/gemma-3-4b-pt"))
    card = made(folder, converted, source_card="---\nlicense: gemma\n---\n")
    assert "base_model: google/gemma-3-4b-pt" in card
    assert "license: gemma" in card
    assert "# T5Gemma 2, trained elsewhere" in card
    assert "**Not recorded.**" in card
    assert "$ t5g2 convert google/gemma-3-4b-pt@" in card
    assert "not trained further" not in card
    # Made again, the card is the same, and custom text stays.
    assert made(folder, converted, source_card="---\nlicense: gemma\n---\n", existing=card) == card
    assert "Mine." in made(folder, converted, existing=f"{card}\nMine.\n")


def test_a_start_without_a_manifest_adds_nothing(converted: Path, tmp_path: Path) -> None:
    folder = trained(converted, tmp_path / "trained")
    (converted / "t5g2.json").unlink()
    card = made(folder, converted)
    assert "How the model it was trained from was made is not recorded." in card
    assert "base_model" not in card


@pytest.mark.parametrize(
    ("named", "loader", "task"),
    [
        ("T5Gemma2ForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
        ("T5Gemma2ForTokenClassification", "AutoModelForTokenClassification", "token-classification"),
        ("T5Gemma2Model", "AutoModelForSeq2SeqLM", "image-text-to-text"),
    ],
)
def test_the_class_that_was_saved_loads_it(named: str, loader: str, task: str, converted: Path, tmp_path: Path) -> None:
    folder = trained(converted, tmp_path / "trained")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    card = made(folder, converted)
    assert f"{loader}.from_pretrained(name)" in card
    assert f"pipeline_tag: {task}" in card


def test_an_encoder_has_a_card_of_its_own(kinds: Path, tmp_path: Path) -> None:
    card = made(trained(kinds / "encoder", tmp_path / "trained"), kinds / "encoder")
    assert "# The encoder of a T5Gemma 2, trained elsewhere" in card
    assert "not trained after extraction" not in card


def test_without_its_start_it_is_refused_with_the_way_out(converted: Path, tmp_path: Path) -> None:
    folder = trained(converted, tmp_path / "trained")
    for reading in (lambda: made(folder, None), lambda: manifest_files(folder)):
        with pytest.raises(CheckpointError, match="missing") as error:
            reading()
        assert error.value.hint is not None
        assert "--source" in error.value.hint


def test_our_own_folders_are_not_taken_as_trained_elsewhere(kinds: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--source names the trained folder itself"):
        made(converted, converted)
    with pytest.raises(UsageError, match=r"it has its own t5g2.json"):
        made(kinds / "adapted", converted)
    folder = trained(converted, tmp_path / "trained")
    with pytest.raises(UsageError, match=r"is a t5gemma2, but .* is a gemma3"):
        made(folder, kinds / "decoder")
    # A copy of its start's manifest does not describe it.
    shutil.copy(converted / "t5g2.json", folder)
    assert "trained elsewhere" in made(folder, converted)


def test_H5_only_files_that_loaders_read_are_sent(converted: Path, tmp_path: Path) -> None:
    folder = trained(converted, tmp_path / "trained")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    shutil.copy(converted / "t5g2.json", folder)
    sent: list[str] = []
    files = [file.name for file in trained_elsewhere_files(folder, sent.append)]
    expected = {*read_manifest(converted).files}
    assert set(files) == set(sent) == expected
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError) as error:
        trained_elsewhere_files(folder)
    assert error.value.details == ("tokenizer.json is a link out of the folder: only files in the folder are sent",)


@pytest.mark.slow
def test_H5_an_upload_removes_the_manifest_of_its_start(scene: Scene) -> None:
    scene.good("upload out ann/model")
    trained(scene.out, scene.folder / "trained")
    message = scene.refused("upload trained ann/model", 3)
    assert "--source" in message
    done = json.loads(scene.good("upload trained ann/model --source out --json"))
    assert done["removed"] == ["t5g2.json"]
    there = scene.there()
    assert there.keys() == scene.expected().keys() - {"t5g2.json"}
    assert there["config.json"] == (scene.folder / "trained/config.json").read_bytes()
    assert json.loads(scene.good("upload trained ann/model --source out --json"))["bytes"] == 0


def test_a_start_that_it_did_not_come_of_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = trained(converted, tmp_path / "trained")
    with pytest.raises(UsageError, match="pass the T5Gemma 2 from before the training"):
        made(folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5gemma2_encoder"}))
    with pytest.raises(UsageError, match="--part encoder"):
        made(folder, converted)
    # Another model, of fewer layers.
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="their tensors differ"):
        made(folder, converted)
