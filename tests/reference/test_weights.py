import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t5g2convert import CheckpointError, UsageError
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor, open_checkpoint
from t5g2convert.reference import stack, weights
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import Weights, not_finite, only_prefix
from tests.conftest import TwinFolder
from tests.reference.models import padded_batch, pixels

SHAPES = {"a.table": (40, 6), "a.inner.weight": (5, 6), "a.inner.bias": (5,), "one": (1,), "image": (2, 3, 4, 4)}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with a few tensors; their names sort differently than they are stored, so offsets matter."""
    generator = torch.Generator().manual_seed(9)
    tensors = {name: torch.randn(shape, generator=generator).to(request.param) for name, shape in SHAPES.items()}
    return write(tmp_path, tensors)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


class Inner(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 5)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resident", [False, True])
def test_tensors_equal_those_read_by_safetensors(folder: Path, dtype: torch.dtype | None, resident: bool) -> None:
    read = Weights(open_checkpoint(folder), dtype=dtype, resident=resident)
    expected = {name: tensor.to(dtype or tensor.dtype) for name, tensor in stored(folder).items()}
    for name, tensor in expected.items():
        assert read.shape(name) == SHAPES[name]
        assert read.tensor(name).dtype == tensor.dtype
        assert torch.equal(read.tensor(name), tensor)
    table = expected["a.table"]
    for start, stop in ((0, 40), (0, 1), (39, 40), (7, 19)):
        assert torch.equal(read.rows("a.table", start, stop), table[start:stop])
    assert torch.equal(read.rows("image", 1, 2), expected["image"][1:])
    ids = torch.tensor([[3, 39, 3], [0, 3, 17]])
    assert torch.equal(read.gather("a.table", ids), table[ids])
    module = read.module(Inner, "a.")
    assert torch.equal(module.inner.weight, expected["a.inner.weight"])
    assert torch.equal(module.inner.bias, expected["a.inner.bias"])
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_tensors_may_be_rounded_before_they_are_cast(tmp_path: Path) -> None:
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(9))
    checkpoint = open_checkpoint(write(tmp_path, {"table": table}))
    read = Weights(checkpoint, dtype=torch.float32, rounded_to=torch.bfloat16)
    assert torch.equal(read.tensor("table"), table.bfloat16().float())
    assert not torch.equal(read.tensor("table"), table)
    assert torch.equal(read.gather("table", torch.tensor([7])), table[7:8].bfloat16().float())


def test_rows_are_read_without_the_rest_of_the_table_and_each_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = recorded_reads(monkeypatch)
    read = Weights(open_checkpoint(folder))
    row = 6 * stored(folder)["a.table"].element_size()
    read.rows("a.table", 4, 9)
    read.gather("a.table", torch.tensor([[8, 2, 8], [8, 2, 30]]))
    assert lengths == [5 * row, row, row, row]


def test_resident_weights_are_read_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = recorded_reads(monkeypatch)
    read = Weights(open_checkpoint(folder), resident=True)
    assert read.tensor("a.table") is read.tensor("a.table")
    assert read.module(Inner, "a.") is read.module(Inner, "a.")
    read.gather("a.table", torch.tensor([1, 2]))
    read.rows("a.table", 1, 3)
    assert len(lengths) == 3


def test_other_weights_are_released_with_their_last_user(folder: Path) -> None:
    read = Weights(open_checkpoint(folder))
    module, tensor = read.module(Inner, "a."), read.tensor("a.table")
    assert read.module(Inner, "a.") is not module
    references = weakref.ref(module), weakref.ref(tensor)
    del module, tensor
    assert [reference() for reference in references] == [None, None]


def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the length in bytes of every later read."""
    lengths: list[int] = []
    read_exactly = weights.read_exactly

    def record(checkpoint: Checkpoint, found: StoredTensor, start: int, buffer: Tensor) -> None:
        lengths.append(len(buffer))
        read_exactly(checkpoint, found, start, buffer)

    monkeypatch.setattr(weights, "read_exactly", record)
    return lengths


@pytest.mark.parametrize(
    "read",
    [
        lambda read: read.tensor("a.absent"),
        lambda read: read.rows("a.absent", 0, 1),
        lambda read: read.gather("a.absent", torch.tensor([0])),
        lambda read: read.module(lambda: nn.ParameterDict({"absent": torch.empty(1)}), "a."),
    ],
    ids=["tensor", "rows", "gather", "module"],
)
@pytest.mark.parametrize("resident", [False, True])
def test_a_missing_tensor_is_named(folder: Path, resident: bool, read: Callable[[Weights], object]) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'a\.absent'") as failure:
        read(Weights(open_checkpoint(folder), resident=resident))
    assert failure.value.where == str(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tensor 'a\.inner\.weight' has shape \[5, 6\], but its config implies \[5, 7\]"
    ):
        Weights(open_checkpoint(folder)).module(lambda: Inner(7), "a.")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "I64"), (torch.uint8, "U8"), (torch.float64, "F64")])
def test_a_dtype_that_no_model_runs_in_is_named(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.counts": torch.zeros(4, 2, dtype=dtype)})
    read = Weights(open_checkpoint(tmp_path), dtype=torch.float32)
    for act in (read.tensor, read.shape):
        with pytest.raises(CheckpointError, match=rf"'a\.counts' has dtype {name}, expected one of BF16, F16, F32"):
            act("a.counts")


def test_a_file_that_shrank_or_went_is_named(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].entry.end)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was truncated while it was read"):
        Weights(checkpoint).tensor(last)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        Weights(checkpoint).tensor(last)


@pytest.mark.parametrize("resident", [False, True])
def test_a_row_outside_the_table_is_not_read_from_another_tensor(resident: bool, tmp_path: Path) -> None:
    write(tmp_path, {"a.table": torch.zeros(4, 2), "b": torch.ones(9, 9)})
    with pytest.raises((CheckpointError, IndexError)):
        Weights(open_checkpoint(tmp_path), resident=resident).gather("a.table", torch.tensor([4]))


def test_only_prefix_wants_exactly_one_name(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    names = ["model.text.norm.weight", "norm.weight", "x.layernorm.weight", "tail.norm.weight.other"]
    assert only_prefix(names[2:] + names[:1], "norm.weight", checkpoint) == "model.text."
    assert only_prefix(names[1:], "norm.weight", checkpoint) == ""
    for given, count in ((names[2:], 0), (names, 2)):
        with pytest.raises(
            CheckpointError, match=rf"has {count} tensors named \.\.\.norm\.weight, expected one"
        ) as failure:
            only_prefix(given, "norm.weight", checkpoint)
        assert failure.value.where == str(folder)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of modules in memory after each read, including the module just read."""
    made: list[weakref.ref[nn.Module]] = []
    counts: list[int] = []
    module = Weights.module

    def counted(self: Weights, *arguments: Any) -> nn.Module:
        found = module(self, *arguments)
        made.append(weakref.ref(found))
        counts.append(sum(reference() is not None for reference in made))
        return found

    monkeypatch.setattr(Weights, "module", counted)
    return counts


def test_a_streamed_model_holds_a_layer_at_a_time(
    alive: list[int], twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    batch = padded_batch(12, seed=1)
    Gemma3Reference(open_checkpoint(twin_folder("text-13"))).logits(batch.ids, batch.kept)
    model = T5Gemma2Reference(open_checkpoint(converted_twin("text-13")))
    model.decode(batch.ids, batch.kept, model.encode(batch.ids, batch.kept), batch.kept)
    # 13 layers and the last norm, read three times.
    assert alive == [1] * 3 * 14


def test_a_streamed_vision_tower_holds_a_layer_at_a_time(alive: list[int], converted_twin: TwinFolder) -> None:
    vision = T5Gemma2Reference(open_checkpoint(converted_twin("images-8"))).vision
    assert vision is not None
    vision.features(pixels(1, torch.bfloat16))
    # Embeddings, 3 layers, the last norm, the projector.
    assert alive == [1] * 6


def test_a_streamed_model_reads_its_table_in_slices(twin_folder: TwinFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = recorded_reads(monkeypatch)
    batch = padded_batch(12, seed=1)
    Gemma3Reference(open_checkpoint(twin_folder("text-real-vocabulary"))).logits(batch.ids, batch.kept)
    assert max(lengths) == stack.HEAD_ROWS * 8 * 2
    assert sum(lengths) > 262_144 * 8 * 2


def test_a_sharded_folder_gives_the_tensors_of_each_shard(twin_folder: TwinFolder) -> None:
    source = twin_folder("text-sharded")
    read = Weights(open_checkpoint(source))
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        for name, tensor in load_file(shard).items():
            assert torch.equal(read.tensor(name), tensor)


def test_a_link_into_a_cache_is_followed(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    shutil.copy(folder / "config.json", linked)
    (linked / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert torch.equal(Weights(open_checkpoint(linked)).tensor("a.table"), stored(folder)["a.table"])


@pytest.mark.parametrize("name", ["text-float32", "images-8"])
def test_finite_weights_in_float16_blame_the_dtype_and_name_another(name: str, twin_folder: TwinFolder) -> None:
    error = not_finite("the logits", Weights(open_checkpoint(twin_folder(name)), dtype=torch.float16))
    assert isinstance(error, UsageError)
    assert "float16 overflows" in error.message
    assert (error.where, error.hint) == (None, "compute with --dtype float32")


def test_a_float16_checkpoint_that_is_read_as_stored_computes_in_float16(twin_folder: TwinFolder) -> None:
    assert isinstance(not_finite("the logits", Weights(open_checkpoint(twin_folder("text-float16")))), UsageError)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_other_dtypes_do_not_overflow_so_the_checkpoint_is_named(
    dtype: torch.dtype | None, twin_folder: TwinFolder
) -> None:
    folder = twin_folder("text-8")
    error = not_finite("the logits", Weights(open_checkpoint(folder), dtype=dtype))
    assert isinstance(error, CheckpointError)
    assert error.where == str(folder)
    assert str(dtype or torch.bfloat16).removeprefix("torch.") in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_the_checkpoints_fault_in_float16_too(
    name: str, value: float, twin_folder: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE_ELEMENTS", 7)
    tensors = load_file(twin_folder("text-float32") / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    (tmp_path / "config.json").write_bytes((twin_folder("text-float32") / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    error = not_finite("the logits", Weights(open_checkpoint(tmp_path), dtype=torch.float16))
    assert isinstance(error, CheckpointError)
    assert error.where == str(tmp_path)
