"""Attention masks: True where a query may see a key, [B or 1, 1, T, S].

In the drawings, a row is a query and a column is a key; # is seen, . is hidden.
"""

import torch
from torch import Tensor

from t5g2convert.checkpoint.families.rope_config import LayerType


def causal(
    kind: LayerType, window: int, kept_BS: Tensor, *, queries: int | None = None, blocks_BS: Tensor | None = None
) -> Tensor:
    """Return the causal mask of Gemma 3 and of a decoder's own tokens; sliding layers see the last `window` tokens.

    A token counts itself, so with a window of 3 it sees itself and the two tokens before it::

        full          sliding, window 3
        # . . . .     # . . . .
        # # . . .     # # . . .
        # # # . .     # # # . .
        # # # # .     . # # # .
        # # # # #     . . # # #

    Args:
        kind: The kind of layer.
        window: `sliding_window` of the config.
        kept_BS: False at padding, [B, S].
        queries: The number of queries, which are the last tokens; earlier tokens are in a cache (default: all).
        blocks_BS: Number of the image that a token belongs to, 0 for text. Within an image, Gemma 3 sees both ways; in
            sliding layers, only inside the window.
    """
    keys = kept_BS.shape[1]
    distance_TS = _distance(keys if queries is None else queries, keys, kept_BS.device)
    seen = (distance_TS >= 0)[None, None]
    if blocks_BS is not None:
        seen = seen | ((blocks_BS[:, None, :, None] == blocks_BS[:, None, None, :]) & (blocks_BS > 0)[:, None, :, None])
    if kind == "sliding_attention":
        seen = seen & (distance_TS < window)
    return seen & kept_BS[:, None, None, :]


def bidirectional(kind: LayerType, window: int, kept_BS: Tensor) -> Tensor:
    """Return the encoder's mask: all tokens, or (w + 1) // 2 - 1 tokens back and w // 2 ahead in sliding layers.

    ::

        full          sliding, window 3     sliding, window 4
        # # # # #     # # . . .             # # # . .
        # # # # #     # # # . .             # # # # .
        # # # # #     . # # # .             . # # # #
        # # # # #     . . # # #             . . # # #
        # # # # #     . . . # #             . . . # #

    Source: `sliding_window_mask_function` of transformers' T5Gemma 2.
    """
    tokens = kept_BS.shape[1]
    distance_TS = _distance(tokens, tokens, kept_BS.device)
    seen = kept_BS[:, None, None, :].expand(-1, 1, tokens, tokens)
    if kind == "sliding_attention":
        seen = seen & (distance_TS < (window + 1) // 2) & (-distance_TS <= window // 2)
    return seen


def around(kind: LayerType, window: int, kept_BT: Tensor) -> Tensor:
    """Return the mask of T5Gemma's encoder: all tokens, or `window` tokens back and ahead in sliding layers.

    ::

        full          sliding, window 2
        # # # # #     # # # . .
        # # # # #     # # # # .
        # # # # #     # # # # #
        # # # # #     . # # # #
        # # # # #     . . # # #

    Source: `create_bidirectional_sliding_window_mask` of transformers 5.4 to 5.23. In 5.0 the window counts the token
    itself, as in the decoder, so it sees one token less on either side.
    """
    tokens = kept_BT.shape[1]
    seen = kept_BT[:, None, None, :].expand(-1, 1, tokens, tokens)
    if kind == "sliding_attention":
        seen = seen & (_distance(tokens, tokens, kept_BT.device).abs() <= window)
    return seen


def memory(queries: int, kept_BM: Tensor) -> Tensor:
    """Return the decoder's mask on the encoder's output: everything except padding, in every layer.

    Together with the causal mask it forms the merged mask, here for 3 tokens and a memory of 4 that ends with padding::

        own tokens | memory
        # . .      | # # # .
        # # .      | # # # .
        # # #      | # # # .
    """
    return kept_BM[:, None, None, :].expand(-1, 1, queries, -1)


def _distance(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the distance from each query back to each key, [T, S]; the queries are the last of the keys."""
    positions = torch.arange(keys, device=device, dtype=torch.int32)
    return positions[keys - queries :, None] - positions[None, :]
