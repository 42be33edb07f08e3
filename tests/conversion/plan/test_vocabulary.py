"""An alignment needs a donor that embeds the source's tokens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import CheckpointError, MappingError, Plan, plan
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source

ROWS = 300
NAMES = [*(f"token {number}" for number in range(ROWS - 4)), '"', "\\", "▁<x>", '"vocab": {']

Make = Callable[..., Path]


@pytest.fixture
def make(demo_config: Mapping[str, Any], gemma3_map: WeightMap, tmp_path: Path) -> Make:
    """Return a source or a donor with this many table rows."""

    def checkpoint(role: str, rows: int = ROWS) -> Path:
        folder = tmp_path / role
        folder.mkdir()
        text = {**demo_config["text_config"], "vocab_size": rows}
        config = {**demo_config, "text_config": text} if role == "donor" else {**text, "model_type": "gemma3_text"}
        write_synthetic_source(folder, gemma3_map, config, seed=None)
        return folder

    return checkpoint


def write_names(folder: Path, names: list[str], **style: Any) -> None:
    document = {
        "added_tokens": [{"id": 1, "content": names[1], "special": True}],
        "model": {"type": "BPE", "vocab": {name: number for number, name in enumerate(names)}, "merges": [["a", "b"]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document, **style))


def aligned(source: Path, donor: Path) -> Plan:
    return plan(source, vision_from=donor, projector="aligned")


def test_the_same_names_in_another_spelling_are_the_same(make: Make) -> None:
    source, donor = make("source"), make("donor")
    write_names(source, NAMES, ensure_ascii=False, indent=2)
    write_names(donor, NAMES, ensure_ascii=True, separators=(",", ":"))
    notes = aligned(source, donor).notes
    assert f"least squares between {ROWS} rows of both embedding tables" in " ".join(notes)
    assert not any("not checked: " in note for note in notes)


@pytest.mark.parametrize(("renamed", "fits"), [(1, True), (3, True), (4, False), (ROWS, False)])
def test_few_tokens_may_have_another_name(renamed: int, fits: bool, make: Make) -> None:
    source, donor = make("source"), make("donor")
    write_names(source, NAMES)
    write_names(donor, [*NAMES[: ROWS - renamed], *(f"new {number}" for number in range(renamed))])
    if fits:
        assert aligned(source, donor).tensors
        return
    with pytest.raises(MappingError, match=f"{renamed} of 300 tokens have another name .* is {ROWS - renamed}: no"):
        aligned(source, donor)
    assert plan(source, vision_from=donor, projector="zeros").tensors


def test_names_of_rows_that_are_not_there_do_not_count(make: Make) -> None:
    source, donor = make("source"), make("donor")
    write_names(source, NAMES)
    write_names(donor, [*NAMES, *(f"more {number}" for number in range(50))])
    assert aligned(source, donor).tensors


@pytest.mark.parametrize("role", ["source", "donor"])
def test_without_both_tokenizers_a_note_says_that_nothing_was_compared(role: str, make: Make) -> None:
    folders = {"source": make("source"), "donor": make("donor")}
    write_names(folders[role], NAMES)
    assert any("not checked: whether the 300 rows of both embedding tables are the same tokens" in note
               for note in aligned(**folders).notes)  # fmt: skip


def test_tables_of_other_counts_of_rows_are_refused(make: Make) -> None:
    with pytest.raises(MappingError, match="the donor embeds 301 tokens, the source 300: no common vocabulary"):
        aligned(make("source"), make("donor", 301))


def test_a_donor_with_fill_has_the_vocabulary_of_a_source_without(make: Make) -> None:
    made = aligned(make("source", 262_144), make("donor", 262_208))
    (alignment,) = (tensor.content.alignment for tensor in made.tensors if tensor.content.alignment is not None)
    assert alignment.rows == 262_144


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "has no vocabulary of tokens by name"),
        ('{"model": {"vocab": [["a", 0.0]]}}', "has no vocabulary of tokens by name"),
        ('{"model": {"vocab": {"a\\x": 1, "b": 2}}}', "is not valid JSON"),
    ],
)
def test_a_tokenizer_without_names_is_refused(text: str, says: str, make: Make) -> None:
    source, donor = make("source"), make("donor")
    write_names(source, NAMES)
    (donor / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=says) as caught:
        aligned(source, donor)
    assert caught.value.where == str(donor / "tokenizer.json")


def test_the_plan_document_describes_the_alignment(make: Make) -> None:
    made = plan(make("source"), vision_from=make("donor"), projector="aligned", ridge=1e-6).to_json()
    (alignment,) = (tensor["alignment"] for tensor in made["tensors"] if "alignment" in tensor)
    assert (alignment["rows"], alignment["ridge"]) == (ROWS, 1e-6)
    assert alignment["donor"]["tensor"] == "language_model.model.embed_tokens.weight"
    assert alignment["target"]["tensor"] == "model.embed_tokens.weight"
    assert alignment["donor"]["source"]["file"] == "vision_from/model.safetensors"
    assert alignment["target"]["source"]["end"] - alignment["target"]["source"]["start"] == ROWS * 48 * 2
