"""The choice of the next token from logits: the most probable one, or a seeded sample.

The filters are those of transformers, in its order: temperature, top-k, top-p, in float32.
"""

import hashlib

import torch
from torch import Tensor

from t5g2convert.reference.generation.decoding import Decoding


def filtered(logits_BV: Tensor, decoding: Decoding) -> Tensor:
    """Return the logits from which a token is sampled, float32; tokens that are left out have -inf.

    Source: `TemperatureLogitsWarper`, `TopKLogitsWarper` and `TopPLogitsWarper` of transformers 5.24.
    """
    scores_BV = logits_BV.float()
    if decoding.temperature != 1.0:
        scores_BV = scores_BV / decoding.temperature
    if 0 < decoding.top_k < scores_BV.shape[-1]:
        # Tokens as probable as the last of the k are kept.
        lowest_B1 = torch.topk(scores_BV, decoding.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < lowest_B1, -torch.inf)
    if decoding.top_p < 1.0:
        ordered_BV, places_BV = torch.sort(scores_BV, descending=False)
        removed_BV = ordered_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - decoding.top_p
        removed_BV[:, -1] = False
        scores_BV = scores_BV.masked_fill(removed_BV.scatter(1, places_BV, removed_BV), -torch.inf)
    return scores_BV


class Chooser:
    """Chooses the next token of one text.

    Each text has its own random numbers, so it does not depend on the texts in its batch.

    Args:
        decoding: The settings.
        number: The number of the text among all prompts; together with the seed, it decides the random numbers.
    """

    def __init__(self, decoding: Decoding, number: int = 0) -> None:
        self.decoding = decoding
        digest = hashlib.sha256(f"{decoding.seed} {number}".encode()).digest()
        self._random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    def choose(self, logits_V: Tensor) -> int:
        """Return a token."""
        if self.decoding.greedy:
            return int(logits_V.argmax())
        scores_V = filtered(logits_V[None], self.decoding)[0]
        # On the CPU, where the random numbers are the same on every machine.
        return int(torch.multinomial(scores_V.softmax(-1).cpu(), 1, generator=self._random))
