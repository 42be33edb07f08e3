import inspect
import re
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import sliding_window_bidirectional_mask_function
from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function

from t5g2convert.reference.gemma3 import image_blocks
from t5g2convert.reference.masks import around, bidirectional, causal, memory

ALL_5 = torch.ones(1, 5, dtype=torch.bool)
KINDS = ("full_attention", "sliding_attention")


def drawn(*rows: str) -> Tensor:
    """Parse a mask drawing: # seen, . hidden."""
    return torch.tensor([[cell == "#" for cell in row.split()] for row in rows])


def drawings(function: Callable[..., object]) -> dict[str, Tensor]:
    """Return the drawings of a docstring by the heading above them."""
    lines = [line.strip() for line in (inspect.getdoc(function) or "").splitlines()]
    rows = [number for number, line in enumerate(lines) if re.fullmatch(r"[#.| ]*[#.]", line)]
    assert rows == list(range(rows[0], rows[-1] + 1))
    columns = [re.split(r"\s*\|\s*|\s{2,}", lines[number]) for number in (rows[0] - 1, *rows)]
    return {title: drawn(*cells) for title, *cells in zip(*columns, strict=True)}


def test_the_drawing_of_the_causal_masks() -> None:
    assert {title: mask.tolist() for title, mask in drawings(causal).items()} == {
        "full": causal("full_attention", 3, ALL_5)[0, 0].tolist(),
        "sliding, window 3": causal("sliding_attention", 3, ALL_5)[0, 0].tolist(),
    }


def test_the_drawing_of_the_masks_that_see_both_ways() -> None:
    assert {title: mask.tolist() for title, mask in drawings(bidirectional).items()} == {
        "full": bidirectional("full_attention", 3, ALL_5)[0, 0].tolist(),
        "sliding, window 3": bidirectional("sliding_attention", 3, ALL_5)[0, 0].tolist(),
        "sliding, window 4": bidirectional("sliding_attention", 4, ALL_5)[0, 0].tolist(),
    }


def test_the_drawing_of_the_masks_of_the_first_generation() -> None:
    assert {title: mask.tolist() for title, mask in drawings(around).items()} == {
        "full": around("full_attention", 2, ALL_5)[0, 0].tolist(),
        "sliding, window 2": around("sliding_attention", 2, ALL_5)[0, 0].tolist(),
    }


def test_the_drawing_of_the_merged_mask() -> None:
    kept = torch.tensor([[True, True, True, False]])
    assert {title: mask.tolist() for title, mask in drawings(memory).items()} == {
        "own tokens": causal("full_attention", 3, ALL_5[:, :3])[0, 0].tolist(),
        "memory": memory(3, kept)[0, 0].tolist(),
    }


@pytest.mark.parametrize("window", range(1, 9))
def test_the_first_generations_window_is_that_of_transformers(window: int) -> None:
    sees = sliding_window_bidirectional_mask_function(window)
    tokens = torch.arange(12)
    kept = torch.ones(1, 12, dtype=torch.bool)
    kept[0, 3] = False
    expected = sees(0, 0, tokens[:, None], tokens[None, :]) & kept
    assert torch.equal(around("sliding_attention", window, kept)[0, 0], expected)


@pytest.mark.parametrize("window", range(1, 9))
def test_the_encoders_window_is_that_of_transformers(window: int) -> None:
    sees = sliding_window_mask_function(window, is_causal=False)
    tokens = torch.arange(12)
    expected = sees(0, 0, tokens[:, None], tokens[None, :])
    assert torch.equal(bidirectional("sliding_attention", window, torch.ones(1, 12, dtype=torch.bool))[0, 0], expected)
    assert expected.sum(1).max() == window


@pytest.mark.parametrize("window", range(1, 9))
def test_the_causal_window_counts_the_token_itself(window: int) -> None:
    mask = causal("sliding_attention", window, torch.ones(1, 12, dtype=torch.bool))[0, 0]
    assert mask.sum(1).tolist() == [min(number + 1, window) for number in range(12)]
    assert mask.diagonal().all()
    assert not mask.triu(1).any()


def test_images_see_themselves_both_ways_and_nothing_else_ahead() -> None:
    ids = torch.tensor([[9, 9, 1, 9, 9, 9, 2]])
    found = causal("full_attention", 2, ids > 0, blocks_BS=image_blocks(ids, 9))[0, 0]
    assert torch.equal(
        found,
        drawn(
            "# # . . . . .",
            "# # . . . . .",
            "# # # . . . .",
            "# # # # # # .",
            "# # # # # # .",
            "# # # # # # .",
            "# # # # # # #",
        ),
    )


def test_in_sliding_layers_the_window_holds_behind_a_token_of_an_image_and_not_ahead() -> None:
    ids = torch.tensor([[1, 9, 9, 9, 9, 2]])
    found = causal("sliding_attention", 2, ids > 0, blocks_BS=image_blocks(ids, 9))[0, 0]
    assert torch.equal(
        found,
        drawn(
            "# . . . . .",
            "# # # # # .",
            ". # # # # .",
            ". . # # # .",
            ". . . # # .",
            ". . . . # #",
        ),
    )


def test_image_blocks_are_counted_in_every_row() -> None:
    ids = torch.tensor([[9, 9, 1, 9, 1, 1, 9], [1, 1, 9, 9, 9, 9, 1], [1, 2, 3, 4, 5, 6, 7]])
    assert image_blocks(ids, 9).tolist() == [[1, 1, 0, 2, 0, 0, 3], [0, 0, 1, 1, 1, 1, 0], [0] * 7]


@pytest.mark.parametrize(("kind", "queries"), product(KINDS, (1, 2, 5, 8)))
def test_fewer_queries_are_the_last_rows(kind: str, queries: int) -> None:
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[1, :3] = False
    whole = causal(kind, 3, kept)
    assert whole.shape == (2, 1, 8, 8)
    assert torch.equal(causal(kind, 3, kept, queries=queries), whole[:, :, 8 - queries :])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_hidden_from_every_query_of_its_row_alone(kind: str) -> None:
    kept = torch.ones(3, 6, dtype=torch.bool)
    kept[1, :2] = kept[2, 4:] = False
    for mask in (causal, bidirectional):
        plain, padded = mask(kind, 3, torch.ones_like(kept)), mask(kind, 3, kept)
        assert torch.equal(padded[0], plain[0])
        for row in (1, 2):
            assert not padded[row, 0][:, ~kept[row]].any()
            assert torch.equal(padded[row, 0][:, kept[row]], plain[row, 0][:, kept[row]])


def test_memory_is_seen_from_every_token_but_for_padding() -> None:
    kept = torch.tensor([[True, True, False], [False, False, False]])
    assert memory(2, kept).tolist() == [[[[True, True, False]] * 2], [[[False] * 3] * 2]]
