"""Table rows are kept or cut by the ids in use, not by their number."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from t5g2convert import CheckpointError, MappingError, Plan, convert, plan, verify
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.cli.main import app
from t5g2convert.conversion.plan.rows import _decoded, rows_that_stand_out
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.checkpoint.tokenizer.test_ids_in_use import sentencepiece
from tests.conftest import TwinFolder
from tests.models.gemma_tokenizer import TAGS, moved, tokenizer_text, write_json, write_processor, write_tokenizer

ALL, CUT, IMAGE, NEW_IMAGE = 262_208, 262_144, 262_144, 256_001
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
         "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5}  # fmt: skip

Make = Callable[..., Path]
Change = Callable[[Path], object]


@pytest.fixture
def make(demo_config: Mapping[str, Any], gemma3_map: WeightMap, tmp_path: Path) -> Make:
    """Write a source with this many rows (zeros without a seed) and only its config."""

    def checkpoint(
        name: str = "source", *, rows: int = ALL, images: bool = False, seed: int | None = None, **fields: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        text = {**SMALL, "vocab_size": rows}
        config: dict[str, Any] = {"model_type": "gemma3_text", **text}
        if images:
            tower = demo_config["vision_config"]
            config = {"model_type": "gemma3", "mm_tokens_per_image": 4, "vision_config": tower, "text_config": text}
        write_synthetic_source(folder, gemma3_map, {**config, **fields}, seed=seed)
        return folder

    return checkpoint


def edit(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False))


def write_row(folder: Path, number: int, value: float) -> None:
    """Fill a row of the table with one number."""
    checkpoint = open_checkpoint(folder)
    (stored,) = (tensor for name, tensor in checkpoint.tensors.items() if name.endswith("embed_tokens.weight"))
    width = stored.entry.shape[1]
    with (folder / stored.file).open("r+b") as file:
        file.seek(stored.entry.start + number * width * 2)
        file.write(struct.pack("<f", value)[2:] * width)


def vocab_entry(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda document: document["model"]["vocab"].update({"▁qzx": 262_150}))


def added_token(folder: Path) -> None:
    entry = {"id": 262_145, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    edit(folder / "tokenizer.json", lambda document: document["added_tokens"].append(entry))
    settings = {key: value for key, value in entry.items() if key != "id"}
    edit(
        folder / "tokenizer_config.json", lambda document: document["added_tokens_decoder"].update({"262145": settings})
    )


def only_added_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write_json(folder / "added_tokens.json", {"<image_soft_token>": IMAGE, "<tool_call>": 262_145})


def only_settings(folder: Path) -> None:
    for name in ("tokenizer.json", "added_tokens.json"):
        (folder / name).unlink()
    decoder = {str(IMAGE): {"content": "<image_soft_token>"}, "262207": {"content": "<tool_call>"}}
    edit(folder / "tokenizer_config.json", lambda document: document.update(added_tokens_decoder=decoder))


def only_pieces(folder: Path, count: int = 262_160) -> None:
    for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    words = (TAGS.get(number) or f"w{number}" for number in range(count))
    (folder / "tokenizer.model").write_bytes(sentencepiece(*words))


def new_name(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda document: document.update(pad_token="[PAD]"))


def set_config(**fields: Any) -> Change:
    return lambda folder: edit(folder / "config.json", lambda document: document.update(fields))


def set_generation(**fields: Any) -> Change:
    return lambda folder: write_json(folder / "generation_config.json", fields)


KEPT: dict[str, tuple[Change, str]] = {
    "vocabulary": (vocab_entry, "tokenizer.json has the token '▁qzx' as 262150"),
    "added": (added_token, "tokenizer.json has the token '[PAD]' as 262145"),
    "added-file": (only_added_file, "added_tokens.json has the token '<tool_call>' as 262145"),
    "settings": (only_settings, "tokenizer_config.json has the token '<tool_call>' as 262207"),
    "pieces": (only_pieces, "tokenizer.model has the token 'w262144' as 262144"),
    "name": (new_name, "tokenizer_config.json has the token '[PAD]' (loaders assign it the id 262145)"),
    "pad": (set_config(pad_token_id=262_150), "config.json has pad_token_id as 262150"),
    "bos": (set_config(bos_token_id=262_150), "config.json has bos_token_id as 262150"),
    "eos": (set_config(eos_token_id=[1, 262_150]), "config.json has eos_token_id as 262150"),
    "generation": (set_generation(eos_token_id=262_151), "generation_config.json has eos_token_id as 262151"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("case", KEPT)
def test_rows_in_use_are_kept_and_the_first_of_them_is_named(case: str, images: bool, make: Make) -> None:
    change, notes = KEPT[case]
    source = make(images=images)
    write_tokenizer(source)
    change(source)
    made = plan(source)
    (note,) = (note for note in made.notes if "rows of the embedding table are kept" in note)
    stays = "; image_token_index stays 262144" if images else ""
    assert note == f"all 262208 rows of the embedding table are kept, not 262144: {notes}{stays}"
    check_kept(made)


def check_kept(made: Plan, rows: int = ALL, image: int = IMAGE) -> None:
    """Config, table, and files agree."""
    stacks = (made.config, made.config["encoder"]["text_config"], made.config["decoder"])
    assert {stack["vocab_size"] for stack in stacks} == {rows}
    assert made.config["image_token_index"] == made.config["encoder"]["image_token_index"] == image
    (table,) = (tensor for tensor in made.tensors if tensor.name == "model.encoder.embed_tokens.weight")
    assert table.shape == (rows, 8)
    assert any(change.field == "vocab_size" for change in made.changes) == (rows != ALL)
    if rows == ALL:
        assert made.tokens == ()
        assert not any(file.how == "changed" for file in made.files if file.name == "tokenizer.json")


@pytest.mark.sampled
@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_without_an_id_in_use_they_are_cut(images: bool, make: Make) -> None:
    source = make(images=images)
    write_tokenizer(source)
    made = plan(source)
    assert "the embedding table is cut from 262208 to 262144 rows" in made.notes
    check_kept(made, CUT, NEW_IMAGE)
    only_pieces(source, CUT)
    check_kept(plan(source), CUT, NEW_IMAGE)


def test_settings_follow_the_image_token_without_a_tokenizer_json(make: Make, tmp_path: Path) -> None:
    source = make(images=True)
    write_tokenizer(source)
    for name in ("tokenizer.json", "added_tokens.json"):
        (source / name).unlink()
    convert(source, tmp_path / "out")
    decoder = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert str(IMAGE) not in decoder
    assert decoder[str(NEW_IMAGE)]["content"] == "<image_soft_token>"


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_keep_rows_keeps_them_whatever_is_in_use(images: bool, make: Make) -> None:
    source = make(images=images)
    write_tokenizer(source)
    made = plan(source, keep_rows=True)
    check_kept(made)
    assert made.options["keep_rows"] is True
    note = "--keep-rows: all 262208 rows of the embedding table are kept, as requested"
    assert note + ("; image_token_index stays 262144" if images else "") in made.notes
    assert "--keep-rows: no row would be cut" in plan(make("other", rows=300), keep_rows=True).notes


def test_the_commands_have_the_option(make: Make, tmp_path: Path) -> None:
    source = make(seed=0)
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--keep-rows", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/t5g2.json").read_text())["options"] == {"keep_rows": True}
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == ALL
    planned = CliRunner().invoke(app, ["plan", str(source), "--keep-rows", "--json"])
    assert any(note.startswith("--keep-rows: all 262208 rows") for note in json.loads(planned.stdout)["notes"])
    assert verify(tmp_path / "out", source).passed


def test_without_a_tokenizer_rows_that_look_alike_are_cut_and_a_note_says_how_sure(make: Make) -> None:
    made = plan(make(images=True))
    check_kept(made, CUT, NEW_IMAGE)
    (note,) = (note for note in made.notes if "without a tokenizer" in note)
    assert "rows 262144 to 262207" in note
    assert "--keep-rows keeps them" in note


def test_without_a_tokenizer_rows_that_stand_out_are_kept_and_named(make: Make) -> None:
    source = make(images=True)
    write_row(source, 262_145, 3.0)
    write_row(source, 262_200, -1.0)
    made = plan(source)
    check_kept(made)
    (note,) = (note for note in made.notes if "without a tokenizer" in note)
    assert note.endswith("may be trained: 262145, 262200; image_token_index stays 262144")
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    again = plan(source)
    check_kept(again)
    assert "tokenizer.model is not a SentencePiece model and was not read" in again.notes


BEYOND: dict[str, tuple[Change, str, str]] = {
    "added": (
        added_token,
        "tokenizer.json",
        "has the token '[PAD]' as 262145, but the embedding table has 262144 rows",
    ),
    "vocabulary": (vocab_entry, "tokenizer.json", "has the token '▁qzx' as 262150, but the embedding table"),
    "name": (new_name, "tokenizer_config.json", "'[PAD]' (loaders assign it the id 262145), but the embedding table"),
    "added-file": (only_added_file, "added_tokens.json", "has the token '<tool_call>' as 262145"),
    "pieces": (only_pieces, "tokenizer.model", "has the token 'w262144' as 262144"),
    "pad": (set_config(pad_token_id=300_000), "config.json", "has pad_token_id as 300000, but the embedding table has"),
    "eos": (set_config(eos_token_id=[1, 262_144]), "config.json", "has eos_token_id as 262144"),
    "generation": (set_generation(pad_token_id=262_150), "generation_config.json", "has pad_token_id as 262150"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", BEYOND)
@pytest.mark.parametrize("keep", [True, False], ids=["keep-rows", "by-itself"])
def test_I16_an_id_without_any_row_is_refused_with_the_file_and_the_token(case: str, keep: bool, make: Make) -> None:
    change, name, message = BEYOND[case]
    source = make(rows=CUT)
    write_tokenizer(source)
    assert plan(source, keep_rows=keep).tensors
    change(source)
    with pytest.raises(CheckpointError) as caught:
        plan(source, keep_rows=keep)
    assert message in caught.value.message
    assert caught.value.where == str(source / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["boi_token_index", "eoi_token_index"])
def test_tokens_of_images_need_rows_only_where_images_are_read(field: str, make: Make) -> None:
    with pytest.raises(CheckpointError, match=f"has {field} as 300000, but the embedding table has 262208 rows"):
        plan(make(images=True, **{field: 300_000}))
    assert plan(make("text", **{field: 300_000})).tensors
    made = plan(make("spare", images=True, **{field: 262_150}))
    check_kept(made)
    assert any(f"config.json has {field} as 262150" in note for note in made.notes)


@pytest.mark.parametrize("value", [None, -1, [-1, 1]])
def test_values_that_name_no_token_need_no_row(value: Any, make: Make) -> None:
    check_kept(plan(make(eos_token_id=value)), CUT, NEW_IMAGE)


def test_another_token_at_the_id_of_a_donors_image_token_is_refused(make: Make) -> None:
    source, donor = make(), make("donor", images=True)
    text = tokenizer_text().replace("<image_soft_token>", "<mine>")
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="has the token '<mine>' as 262144, which is the donor's image token"):
        plan(source, vision_from=donor)


def test_an_image_token_by_another_name_is_the_sources_own_affair(make: Make) -> None:
    source = make(images=True)
    (source / "tokenizer.json").write_text(tokenizer_text().replace("<image_soft_token>", "<mine>"))
    write_json(source / "tokenizer_config.json", {"image_token": "<mine>"})
    check_kept(plan(source))


# Other checkpoints: their tables may be cut when the source's is not, and vice versa


@pytest.mark.sampled
@pytest.mark.parametrize("table", ["source", "decoder-from"])
@pytest.mark.parametrize(("own", "other"), [(CUT, ALL), (ALL, CUT), (ALL, ALL), (CUT, CUT)])
def test_tables_with_and_without_fill_are_of_one_vocabulary(own: int, other: int, table: str, make: Make) -> None:
    source, parent = make(rows=own), make("parent", rows=other)
    write_tokenizer(source)
    check = plan(source, decoder_from=parent, embedding_from=table)
    assert check.config["vocab_size"] == CUT


def test_a_decoders_parent_must_have_the_rows_that_are_in_use(make: Make) -> None:
    source = make()
    write_tokenizer(source)
    added_token(source)
    assert plan(source, decoder_from=make("large")).config["vocab_size"] == ALL
    with pytest.raises(MappingError, match="rows of the embedding table 262144, not 262208"):
        plan(source, decoder_from=make("small", rows=CUT))


def test_a_decoders_parent_has_ids_too(make: Make) -> None:
    source = make()
    write_tokenizer(source)
    assert plan(source, decoder_from=make("large", pad_token_id=262_150)).config["vocab_size"] == ALL
    small = make("small", rows=CUT)
    write_tokenizer(small)
    with pytest.raises(CheckpointError, match="has pad_token_id as 262150, but the embedding table has 262144 rows"):
        plan(small, decoder_from=make("other", pad_token_id=262_150))


def test_a_projector_is_aligned_by_the_rows_that_both_have(make: Make) -> None:
    source, donor = make(), make("donor", images=True)
    write_tokenizer(source)
    added_token(source)
    made = plan(source, vision_from=donor, projector="aligned")
    check_kept(made)
    (alignment,) = (tensor.content.alignment for tensor in made.tensors if tensor.content.alignment is not None)
    assert alignment.rows == CUT
    small = make("small", rows=CUT)
    (alignment,) = (
        tensor.content.alignment
        for tensor in plan(small, vision_from=donor, projector="aligned").tensors
        if tensor.content.alignment is not None
    )
    assert alignment.rows == CUT


# The results work


@pytest.mark.slow
def test_an_image_and_a_token_of_a_kept_row_work_in_transformers(twin_folder: TwinFolder, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForSeq2SeqLM, AutoProcessor

    source = tmp_path / "source"
    source.mkdir()
    for path in twin_folder("images-with-fill").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    write_tokenizer(source)
    write_processor(source, side=56, tokens=4)
    added_token(source)
    (source / "added_tokens.json").unlink()
    out = tmp_path / "out"
    convert(source, out)
    assert verify(out, source).passed
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(out), AutoProcessor.from_pretrained(out)
    picture = Image.new("RGB", (60, 40), (200, 30, 30))
    inputs = processor(text="<start_of_image>a [PAD]", images=picture, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_index) == 4
    assert model.config.image_token_index == IMAGE
    assert 262_145 in ids
    logits = model(**inputs, decoder_input_ids=torch.tensor([[2, 262_145]])).logits
    assert logits.shape == (1, 2, ALL)
    assert bool(torch.isfinite(logits).all())


def test_following_the_hint_of_a_token_without_a_row_makes_a_source_that_is_converted(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    source = tmp_path / "source"
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, vocab_size=CUT))
    model.save_pretrained(source)
    write_tokenizer(source)
    added_token(source)
    (source / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert "model.resize_token_embeddings(len(tokenizer))" in str(caught.value.hint)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(source)
    assert plan(source).config["vocab_size"] == len(tokenizer) == 262_146


def test_following_the_hint_of_a_field_without_a_row_does_too(make: Make) -> None:
    source = make(pad_token_id=300_000)
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert caught.value.hint == "set pad_token_id to the id of a token that has a row"
    edit(source / "config.json", lambda document: document.update(pad_token_id=0))
    assert plan(source).tensors


def test_a_cut_model_keeps_its_tokenizer_but_for_the_moved_token(make: Make, tmp_path: Path) -> None:
    source = make(images=True)
    write_tokenizer(source)
    convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == moved(tokenizer_text())


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_an_id_of_the_image_token_in_generation_config_moves_with_it(images: bool, make: Make, tmp_path: Path) -> None:
    source = make(images=images, seed=1)
    write_tokenizer(source)
    if images:
        side = json.loads((source / "config.json").read_text())["vision_config"]["image_size"]
        write_processor(source, side=side, tokens=4)
    set_generation(suppress_tokens=[IMAGE, 5], forced_decoder_ids=[[1, IMAGE]], image_token_id=IMAGE)(source)
    made = plan(source)
    check_kept(made, CUT, NEW_IMAGE)
    assert made.generation_config is not None
    assert made.generation_config["suppress_tokens"] == [NEW_IMAGE, 5]
    convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", source)
    assert [check for check in report.checks if not check.passed] == []


# Rows that no tokenizer mentions

Rows = NDArray[np.float64]
ROWS, WIDTH = 64, 96


def stored(rows: Rows, dtype: str = "BF16") -> bytes:
    values = rows.astype("<f4")
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f2").tobytes() if dtype == "F16" else values.tobytes()


def normal(seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(0, 0.25, (ROWS, WIDTH))


def one_mean(seed: int = 0) -> Rows:
    """Initialize new rows as transformers' resize does: the mean of the others, with very little noise."""
    generator = np.random.default_rng(seed)
    return generator.normal(0, 0.1, WIDTH) + generator.normal(0, 1e-4, (ROWS, WIDTH))


FILLS: dict[str, Callable[[], Rows]] = {
    "normal": normal,
    "uniform": lambda: np.random.default_rng(1).uniform(-1, 1, (ROWS, WIDTH)),
    "laplace": lambda: np.random.default_rng(1).laplace(0, 0.2, (ROWS, WIDTH)),
    "one-mean": one_mean,
    "zeros": lambda: np.zeros((ROWS, WIDTH)),
    "one-row": lambda: np.repeat(normal()[:1], ROWS, 0),
    "tiny": lambda: normal() * 1e-20,
}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("fill", FILLS)
def test_fill_looks_alike_whatever_it_is(fill: str, dtype: str) -> None:
    assert rows_that_stand_out(stored(FILLS[fill](), dtype), dtype, WIDTH) == []


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_look_alike_whatever_the_seed(seed: int) -> None:
    assert rows_that_stand_out(stored(normal(seed)), "BF16", WIDTH) == []


def trained(rows: Rows, *numbers: int) -> Rows:
    """Return rows with another norm than random fill of 0.25, and random directions."""
    rows[list(numbers)] = np.random.default_rng(9).normal(0.05, 0.04, (len(numbers), WIDTH))
    return rows


@pytest.mark.parametrize("fill", ["normal", "one-mean", "zeros", "one-row"])
@pytest.mark.parametrize("numbers", [(1,), (0, 63), tuple(range(5, 25))])
def test_trained_rows_stand_out(fill: str, numbers: tuple[int, ...]) -> None:
    assert rows_that_stand_out(stored(trained(FILLS[fill](), *numbers)), "BF16", WIDTH) == list(numbers)


def test_where_most_rows_are_trained_the_others_stand_out() -> None:
    found = rows_that_stand_out(stored(trained(normal(), *range(40))), "BF16", WIDTH)
    assert found == list(range(40, 64))


def test_a_constant_row_of_the_same_norm_is_an_outlier() -> None:
    rows = normal()
    rows[7] = 0.25
    assert rows_that_stand_out(stored(rows), "BF16", WIDTH) == [7]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_an_outlier(value: float) -> None:
    rows = normal()
    rows[3, 5] = value
    assert rows_that_stand_out(stored(rows), "BF16", WIDTH) == [3]
    assert rows_that_stand_out(stored(np.full((4, WIDTH), value), "F32"), "F32", WIDTH) == [0, 1, 2, 3]


def test_rows_that_were_all_trained_alike_are_not_found() -> None:
    assert rows_that_stand_out(stored(trained(normal(), *range(ROWS))), "BF16", WIDTH) == []


def test_numbers_are_read_as_they_are_stored() -> None:
    row = [1.0, -2.0, 0.5, 3.0]
    data = {"F32": struct.pack("<4f", *row), "F16": struct.pack("<4e", *row),
            "BF16": b"".join(struct.pack("<f", value)[2:] for value in row)}  # fmt: skip
    assert {dtype: list(_decoded(text, dtype)) for dtype, text in data.items()} == dict.fromkeys(data, row)
