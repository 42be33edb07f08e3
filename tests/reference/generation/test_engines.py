from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import T5Gemma2ForConditionalGeneration

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.generation import greedy_tokens, until_end
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.models.twins import SIGLIP
from tests.reference.models import IMAGE, Batch, loaded, padded_batch, pixels, with_images, write_t5gemma2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with images, unequal stacks and windows, and varied greedy output."""
    path = tmp_path_factory.mktemp("lively") / "model"
    write_t5gemma2(
        path, {"num_hidden_layers": 3}, {"sliding_window": 5, "query_pre_attn_scalar": 1}, tower=SIGLIP, table=0.05
    )
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> T5Gemma2Reference:
    return T5Gemma2Reference(open_checkpoint(folder), resident=True)


@pytest.fixture(scope="module")
def inputs() -> Batch:
    return padded_batch(14, seed=1, left=3, right=2)


def steps(model: T5Gemma2Reference, inputs: Batch, count: int = 32, **options: object) -> list[Tensor]:
    return list(greedy_tokens(model, inputs.ids, inputs.kept, start_token=2, max_new_tokens=count, **options))


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_tokens_equal_those_of_transformers(
    cached: bool, folder: Path, model: T5Gemma2Reference, inputs: Batch
) -> None:
    theirs = loaded(T5Gemma2ForConditionalGeneration, folder).generate(
        input_ids=inputs.ids, attention_mask=inputs.mask, max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    found = torch.stack(steps(model, inputs, cached=cached), dim=1)
    assert found.tolist() == theirs[:, 1:].tolist()
    assert all(len(set(row)) > 16 for row in found.tolist())


def test_greedy_tokens_after_images_equal_those_of_transformers(folder: Path, model: T5Gemma2Reference) -> None:
    assert model.vision is not None
    inputs, count = with_images(padded_batch(21, seed=2), IMAGE)
    images = pixels(count, torch.float32)
    theirs = loaded(T5Gemma2ForConditionalGeneration, folder).generate(
        input_ids=inputs.ids,
        attention_mask=inputs.mask,
        pixel_values=images,
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
    )
    found = torch.stack(steps(model, inputs, features_ITC=model.vision.features(images)), dim=1)
    assert found.tolist() == theirs[:, 1:].tolist()
    others = torch.stack(steps(model, inputs, features_ITC=model.vision.features(-images)), dim=1)
    assert found.tolist() != others.tolist()


def test_every_step_yields_a_token_for_each_sequence(model: T5Gemma2Reference, inputs: Batch) -> None:
    found = steps(model, inputs, count=5)
    assert len(found) == 5
    assert all(token.shape == (3,) and token.dtype == torch.int64 for token in found)
    assert steps(model, inputs, count=0) == []


def test_a_sequence_gives_the_same_tokens_alone_and_in_a_batch(model: T5Gemma2Reference, inputs: Batch) -> None:
    together = torch.stack(steps(model, inputs), dim=1)
    # Row 1 has padding on the left, which moves its positions.
    for row in (0, 2):
        kept = inputs.kept[row]
        alone = Batch(inputs.ids[row : row + 1, kept], inputs.mask[row : row + 1, kept])
        assert torch.cat(steps(model, alone)).tolist() == together[row].tolist()


def test_the_start_token_counts(model: T5Gemma2Reference, inputs: Batch) -> None:
    def first(start: int) -> list[int]:
        return next(greedy_tokens(model, inputs.ids, inputs.kept, start_token=start, max_new_tokens=1)).tolist()

    assert first(2) != first(150)


def test_steps_are_computed_lazily(model: T5Gemma2Reference, inputs: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda ids, *rest: decoded.append(ids.shape[1]) or decode(ids, *rest))
    tokens = greedy_tokens(model, inputs.ids, inputs.kept, start_token=2, max_new_tokens=1000)
    assert decoded == []
    assert len(list(islice(tokens, 3))) == 3
    assert decoded == [1, 1, 1]
    list(islice(greedy_tokens(model, inputs.ids, inputs.kept, start_token=2, max_new_tokens=9, cached=False), 3))
    assert decoded[3:] == [1, 2, 3]


def test_tokens_have_no_graph_and_the_grad_mode_is_restored(model: T5Gemma2Reference, inputs: Batch) -> None:
    tokens = greedy_tokens(model, inputs.ids, inputs.kept, start_token=2, max_new_tokens=2)
    next(tokens)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def given(*tokens: int) -> Iterator[Tensor]:
    return (torch.tensor([token]) for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "ends", "expected"),
    [
        ((5, 6, 1, 7), {1}, [5, 6]),
        ((5, 6, 7), {1}, [5, 6, 7]),
        ((5, 106, 1), {1, 106}, [5]),
        ((1, 5), [1], []),
        ((5, 1, 6), (), [5, 1, 6]),
        ((), {1}, []),
    ],
)
def test_until_end_stops_before_the_first_end(tokens: tuple[int, ...], ends: set[int], expected: list[int]) -> None:
    assert list(until_end(given(*tokens), ends)) == expected


def test_until_end_asks_for_nothing_behind_the_end() -> None:
    tokens = given(5, 1, 6)
    assert list(until_end(tokens, {1})) == [5]
    assert [int(token) for token in tokens] == [6]
