import pytest
import torch

from t5g2convert.errors import CheckpointError
from t5g2convert.reference.vision import scatter_images

IDS = torch.tensor([[9, 9, 1, 9], [2, 9, 9, 9]])
FEATURES = torch.arange(1.0, 13.0).view(3, 2, 2)
"""Three images of two tokens of width 2."""


def test_soft_tokens_replace_image_tokens_in_order_in_a_copy() -> None:
    embedded = -torch.ones(2, 4, 2)
    found = scatter_images(embedded, IDS, 9, FEATURES)
    assert found.tolist() == [[[1, 2], [3, 4], [-1, -1], [5, 6]], [[-1, -1], [7, 8], [9, 10], [11, 12]]]
    assert torch.equal(embedded, -torch.ones(2, 4, 2))


def test_soft_tokens_take_the_dtype_of_the_embeddings() -> None:
    found = scatter_images(torch.zeros(2, 4, 2, dtype=torch.bfloat16), IDS, 9, FEATURES + 1 / 1024)
    assert found.dtype == torch.bfloat16
    assert found[0, 0].tolist() == [1, 2]


@pytest.mark.parametrize(("features", "given"), [(FEATURES[:2], 4), (FEATURES.repeat(2, 1, 1), 12)])
def test_a_count_that_differs_is_refused(features: torch.Tensor, given: int) -> None:
    with pytest.raises(CheckpointError, match=f"the input has 6 image tokens, but the images need {given}"):
        scatter_images(torch.zeros(2, 4, 2), IDS, 9, features)
