import itertools

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from t5g2convert.reference.generation.decoding import Decoding
from t5g2convert.reference.generation.sampling import Chooser, filtered

SIZE = 300


def logits(rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = 4 * torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(rows))
    values[:, 10:14] = values[:, :1]  # ties
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    itertools.product([0.3, 1.0, 2.5], [0, 1, 7, 64, SIZE, 10 * SIZE], [0.0, 0.2, 0.95, 1.0]),
)
def test_the_filters_are_those_of_transformers_bit_for_bit(
    temperature: float, top_k: int, top_p: float, dtype: torch.dtype
) -> None:
    given = logits(dtype=dtype)
    expected = given.to(torch.float32, copy=True)
    if temperature != 1.0:
        expected = TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = filtered(given, Decoding(temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.equal(found, expected)
    assert (found > -torch.inf).any(-1).all()


def drawn(count: int, number: int = 0, **settings: float) -> list[int]:
    chooser = Chooser(Decoding(**{"temperature": 1.0, **settings}), number)
    return [chooser.choose(logits()[0]) for _ in range(count)]


def test_the_same_seed_gives_the_same_tokens() -> None:
    assert drawn(40) == drawn(40)
    assert drawn(40) != drawn(40, seed=1)


def test_each_prompt_has_its_own_random_numbers() -> None:
    assert drawn(40) != drawn(40, number=1)
    # Not the same numbers as with another seed.
    assert drawn(40, seed=1) != drawn(40, number=1)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    decoding = Decoding(temperature=1.5, top_k=6, top_p=0.9)
    expected = filtered(logits()[:1], decoding)[0].softmax(-1)
    chooser, count = Chooser(decoding), 4000
    found = torch.bincount(torch.tensor([chooser.choose(logits()[0]) for _ in range(count)]), minlength=SIZE) / count
    assert set(found.nonzero().flatten().tolist()) == set(expected.nonzero().flatten().tolist())
    # Five standard deviations.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_greedy_takes_the_most_probable_token() -> None:
    assert [Chooser(Decoding()).choose(row) for row in logits()] == logits().argmax(-1).tolist()
    assert set(drawn(20, top_k=1)) <= set((logits()[0] == logits()[0].max()).nonzero().flatten().tolist())
