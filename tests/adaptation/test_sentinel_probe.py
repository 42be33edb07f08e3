import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, UsageError, convert
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.sentinel_probe import FACTOR, MovedRange, Probe, probe
from t5g2convert.adaptation.ul2.corruption import Frame, longest, spans
from t5g2convert.adaptation.ul2.mixture import Mixture, Task
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.conversion.write import aligned_projector
from tests.adaptation.conftest import Shared
from tests.adaptation.trainings import request_of, run, settings_of, write_text
from tests.conftest import TwinFolder
from tests.models.gemma_tokenizer import write_tokenizer

TABLE = "model.encoder.embed_tokens.weight"


def trained(model: Path, output: Path, rows: Iterable[int], *, drift: float = 0.0) -> Path:
    """Write a model: some rows of its table have moved far, and all have moved a little."""
    output.mkdir()
    (output / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    table, generator = tensors[TABLE].float(), torch.Generator().manual_seed(3)
    noise = torch.randn(table.shape, generator=generator)
    table += drift * noise
    chosen = torch.tensor(list(rows), dtype=torch.long)
    table[chosen] += noise[chosen]
    # Rounding must not lose any drift, and rows that did not move must not change.
    tensors = {name: tensor.float() for name, tensor in tensors.items()} | {TABLE: table}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


def with_tokenizer(folder: Path, unused: Iterable[int]) -> None:
    vocabulary = {f"<unused{number}>": number for number in unused}
    vocabulary = {f"word{number}": number for number in range(300) if number not in vocabulary.values()} | vocabulary
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))


def ids(found: Probe) -> list[tuple[int, int]]:
    return [(item.first, item.last) for item in found.ranges]


@pytest.mark.parametrize("drift", [0.0, 1e-3])
def test_the_sentinels_that_a_model_was_trained_with_are_found(
    drift: float, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    name = "text-with-fill"
    sentinels = range(262_144 - 100, 262_144)
    moved = [*sentinels, 70_000, 258_111, 258_112, *range(110, 150)]
    output = trained(converted_twin(name), tmp_path / "out", moved, drift=drift)
    with_tokenizer(output, range(6, 104))
    found = probe(twin_folder(name), output)
    assert ids(found) == [(262_044, 262_143), (258_111, 258_112)], "row 70000 has a use of its own"
    assert [item.count for item in found.ranges] == [100, 2]
    assert found.moved == 102
    assert found.compared == 262_144 - 256_000 + 98
    assert found.equal == (found.compared - 102 if drift == 0 else 0)
    assert (found.still > 0) == (drift > 0)
    assert 0.5 < found.ranges[0].median < found.ranges[0].largest
    assert found.rows == 262_144
    assert found.notes == ("the tables have 262208 and 262144 rows: the 262144 that both have are compared",)
    premise = found.premise
    assert (premise.holds, premise.ordinary, premise.text_rows) == (True, 202, 20)
    assert premise.text > 0.5
    assert (premise.ratio is None) == (drift == 0)


def test_an_unchanged_table_has_no_moved_rows(twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    found = probe(twin_folder("text-real-vocabulary"), converted_twin("text-real-vocabulary"))
    assert found.ranges == ()
    assert (found.moved, found.equal, found.largest) == (None, found.compared, 0.0)
    assert found.compared == 262_144
    assert found.notes == ("neither has a tokenizer.json, so all rows are compared, and rows of text are not known",)
    assert not found.premise.holds
    assert found.premise.reason == "the farthest row did not move: the table was not trained"


def test_most_of_the_rows_may_have_moved(twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path) -> None:
    output = trained(converted_twin("text-8"), tmp_path / "out", range(40, 300), drift=1e-4)
    assert ids(probe(twin_folder("text-8"), output)) == [(40, 299)]


def test_rows_with_a_known_meaning_are_their_own_ranges(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    name = "text-real-vocabulary"
    output = trained(converted_twin(name), tmp_path / "out", range(255_998, 256_004))
    found = probe(twin_folder(name), output)
    assert [(item.first, item.last, item.known) for item in found.ranges] == [
        (256_002, 256_003, None),
        (256_001, 256_001, "the image token of T5Gemma 2"),
        (256_000, 256_000, "end of image"),
        (255_999, 255_999, "begin of image"),
        (255_998, 255_998, None),
    ]


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_the_block_size_changes_nothing(
    at_once: int,
    twin_folder: TwinFolder,
    converted_twin: TwinFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = trained(converted_twin("text-8"), tmp_path / "out", [3, 64, 299], drift=1e-3)
    whole = probe(twin_folder("text-8"), output)
    monkeypatch.setattr(aligned_projector, "ROWS_AT_ONCE", at_once)
    assert probe(twin_folder("text-8"), output) == whole
    before, after = load_file(twin_folder("text-8") / "model.safetensors"), load_file(output / "model.safetensors")
    one, other = before["model.embed_tokens.weight"].double(), after[TABLE].double()
    expected = (one - other).norm(dim=1) / one.norm(dim=1)
    assert whole.ranges[0] == MovedRange(
        299, 299, 1, pytest.approx(expected[299].item()), pytest.approx(expected[299].item()), None
    )


def test_a_row_of_zeros_that_moved_is_infinitely_far(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    before = trained(converted_twin("text-8"), tmp_path / "before", [])
    tensors = load_file(before / "model.safetensors")
    tensors[TABLE][[5, 6]] = 0
    save_file(tensors, before / "model.safetensors", {"format": "pt"})
    tensors[TABLE][6] = 1
    after = trained(before, tmp_path / "after", [])
    save_file(tensors, after / "model.safetensors", {"format": "pt"})
    found = probe(before, after)
    assert ids(found) == [(6, 6)]
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["ranges"] == [{"first": 6, "last": 6, "count": 1, "median": None, "largest": None, "known": None}]
    assert (document["premise"]["holds"], document["premise"]["text"]) == (True, None)


@pytest.mark.parametrize("text", [0.0, 1.0, 3.0])
def test_there_is_no_answer_where_text_moved_hardly_more_than_unused_rows(
    text: float, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    # Sentinels that moved far do not help: it is not known which other rows are unused.
    output = trained(converted_twin("text-with-fill"), tmp_path / "out", range(262_040, 262_144), drift=1e-3)
    with_tokenizer(output, range(6, 104))
    tensors = load_file(output / "model.safetensors")
    before = load_file(converted_twin("text-with-fill") / "model.safetensors")[TABLE].float()
    ordinary = [*range(6), *range(104, 300)]
    tensors[TABLE][ordinary] = before[ordinary] + text * (tensors[TABLE][ordinary] - before[ordinary])
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    found = probe(twin_folder("text-with-fill"), output)
    assert not found.premise.holds
    assert (found.moved, found.ranges) == (None, ())
    reason = found.premise.reason
    assert reason.startswith(
        "rows of text did not move" if not text else f"rows of text moved {found.premise.text:.3g}"
    )
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (document["premise"]["holds"], document["moved"], document["ranges"]) == (False, None, [])


def with_distances(model: Path, output: Path, distances: torch.Tensor) -> Path:
    """Write a model with rows that moved by given distances."""
    trained(model, output, [])
    with_tokenizer(output, range(6, 104))
    tensors = load_file(output / "model.safetensors")
    table = tensors[TABLE]
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(4))
    way = noise / noise.norm(dim=1, keepdim=True) * table.norm(dim=1, keepdim=True)
    tensors[TABLE] = table + distances[:, None] * way
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


def test_still_rows_are_not_split_by_the_threshold(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    # Ten times as far as the 10% quantile is in the midst of the still rows, which moved unequally.
    distances = torch.full((262_144,), 0.14)
    distances[:104] = distances[256_000:256_700] = 0.009
    distances[256_700:257_000] = torch.logspace(-2, -0.9, 300)
    distances[110:150] = 2.0
    distances[262_100:] = 0.5
    model, parent = converted_twin("text-with-fill"), twin_folder("text-with-fill")
    found = probe(parent, with_distances(model, tmp_path / "gap", distances))
    assert found.median > FACTOR * found.still
    assert found.threshold == pytest.approx(0.14, rel=1e-3)
    assert ids(found) == [(262_100, 262_143)]
    # No gap, no answer.
    distances[257_000:] = torch.logspace(-1.5, 0, 262_144 - 257_000)
    found = probe(parent, with_distances(model, tmp_path / "no-gap", distances))
    assert (found.premise.holds, found.moved, found.ranges) == (False, None, ())
    assert "from 0.09 to 1 the distances have no gap between still and moved" in found.premise.reason


def test_rounding_alone_is_not_a_movement(twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path) -> None:
    # Every value moves by less than rounding, so that some change by a step of bfloat16 and others do not.
    output = trained(converted_twin("text-with-fill"), tmp_path / "out", [])
    with_tokenizer(output, range(6, 104))
    tensors = load_file(output / "model.safetensors")
    noise = torch.rand(tensors[TABLE].shape, generator=torch.Generator().manual_seed(1)) - 0.5
    tensors[TABLE] = (tensors[TABLE] * (1 + 2**-7.5 * noise)).bfloat16()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    found = probe(twin_folder("text-with-fill"), output)
    assert found.largest > 0
    assert not found.premise.holds
    assert found.threshold >= 2**-8


def test_there_is_no_answer_without_rows_of_unused_tokens(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    output = trained(converted_twin("text-8"), tmp_path / "out", range(40, 300))
    with_tokenizer(output, [])
    found = probe(twin_folder("text-8"), output)
    assert found.premise.reason == "there are no rows of unused tokens"
    assert found.notes == ("tokenizer.json defines no unused tokens, and no ids from 256000 on",)
    assert (found.premise.holds, found.compared, found.moved) == (False, 0, None)


@pytest.fixture(scope="session")
def with_vocabulary(shared: Shared) -> Path:
    """`parent`, a Gemma 3 of two layers with all 262,208 rows and a tokenizer; `model`; `data`."""

    def build(folder: Path) -> None:
        from tests.models.twins import BY_NAME, write_twin

        twin = BY_NAME["text-with-fill"]
        write_twin(replace(twin, text={**twin.text, "num_hidden_layers": 2}), folder / "parent")
        write_tokenizer(folder / "parent")
        convert(folder / "parent", folder / "model")
        (folder / "texts").mkdir()
        write_text(folder / "texts")
        pack(folder / "model", folder / "data", read_files([folder / "texts"], "text", lambda _: None))

    return shared("with-vocabulary", build)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("eps", [1e-3, 1e-8])
def test_after_a_training_the_sentinels_are_found_if_unused_rows_stay(
    eps: float, with_vocabulary: Path, tmp_path: Path
) -> None:
    task = Task(name="spans", kind="spans", mean_span=2, rate=0.4, weight=1)
    settings = settings_of(
        mixture=Mixture(tasks=(task,)), encoder_length=32, decoder_length=32, batch_tokens=256, steps=5, lr=1e-2,
        warmup=0, eps=eps, precision="float32",
    )  # fmt: skip
    run(request_of(with_vocabulary, tmp_path / "run", settings, export=True, micro_batch=8, loss_chunk=64))
    found = probe(with_vocabulary / "parent", tmp_path / "run/model")
    assert found.compared > 6000
    if eps == 1e-8:
        # A seeded model gives every token the same probability, and so every row a gradient far above this epsilon.
        assert not found.premise.holds
        assert found.moved is None
        assert found.still > 0.01
        assert found.premise.ratio is not None
        assert found.premise.ratio < 10
    else:
        # As in a large trained model, the gradients of unused rows are far below epsilon.
        assert found.premise.holds
        raw = longest(task, Frame(encoder_bos=2, encoder_eos=None, eos=1), encoder=32, decoder=32)
        used = spans(raw, task)[1]
        assert used > 5
        assert ids(found) == [(262_143 - used + 1, 262_143)]


def test_models_that_cannot_be_compared_are_refused(
    twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="its rows have 24 values, but the rows of donor-wide have 32"):
        probe(twin_folder("donor-wide"), converted_twin("text-8"))
    with pytest.raises(UsageError, match="--factor must be 0 or more, got -1"):
        probe(twin_folder("text-8"), converted_twin("text-8"), factor=-1)
    bad = trained(converted_twin("text-8"), tmp_path / "bad", [])
    tensors = load_file(bad / "model.safetensors")
    tensors[TABLE][7, 1] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds NaN in row 7"):
        probe(twin_folder("text-8"), bad)
    save_file({"model.norm.weight": torch.ones(3)}, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="has no embedding table"):
        probe(twin_folder("text-8"), bad)


def test_only_the_file_with_the_table_is_downloaded_from_the_hub(
    converted_twin: TwinFolder, twin_folder: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[list[str]] = []

    def fetched(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
        requested.append([*names])
        return checkpoint

    model = tmp_path / "model"
    convert(twin_folder("images-8"), model, max_shard_bytes=50_000)
    monkeypatch.setattr("t5g2convert.adaptation.sentinel_probe.fetch", fetched)
    probe(converted_twin("images-8"), open_checkpoint(model))
    table = open_checkpoint(model).tensors[TABLE].file
    assert requested == [["model.safetensors"], [table]]
