from itertools import pairwise

import pytest
import torch
from torch import Tensor

from t5g2convert.reference.cache import LayerCache


def tokens(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return keys and values: two rows, three heads, width 4."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, 3, count, 4, generator=generator).to(dtype)
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [1, 2, 5, 40])
@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 1, 20, 3], [40, 1]], ids=str)
def test_holds_the_memory_and_then_every_token_in_order(pieces: list[int], memory: int, dtype: torch.dtype) -> None:
    cache = LayerCache()
    parts = [tokens(memory, 0, dtype)]
    cache.start(*parts[0])
    for number, count in enumerate(pieces, start=1):
        parts.append(tokens(count, number, dtype))
        found = cache.append(*parts[-1])
        for which in (0, 1):
            expected = torch.cat([part[which] for part in parts], dim=2)
            assert torch.equal(found[which], expected)
            assert found[which].dtype == dtype
        assert cache.length == expected.shape[2]


def test_starts_empty_and_is_started_once_the_memory_is_there() -> None:
    cache = LayerCache()
    assert (cache.started, cache.length) == (False, 0)
    with pytest.raises(AssertionError, match="start comes first"):
        cache.append(*tokens(1, 0))
    cache.start(*tokens(6, 0))
    assert (cache.started, cache.length, cache.memory_length) == (True, 6, 6)


def test_gives_the_memory_alone_however_much_is_appended() -> None:
    cache, memory = LayerCache(), tokens(3, 0)
    with pytest.raises(AssertionError, match="start comes first"):
        _ = cache.memory
    cache.start(*memory)
    for number in range(1, 9):
        cache.append(*tokens(2, number))
        assert all(torch.equal(one, other) for one, other in zip(cache.memory, memory, strict=True))


def test_keeps_its_own_copy_of_the_memory() -> None:
    k, v = tokens(3, 0)
    expected = k.clone(), v.clone()
    cache = LayerCache()
    cache.start(k, v)
    k.zero_()
    v.zero_()
    found = cache.append(*tokens(1, 1))
    assert torch.equal(found[0][:, :, :3], expected[0])
    assert torch.equal(found[1][:, :, :3], expected[1])


def test_returned_keys_do_not_change_while_the_cache_grows() -> None:
    cache = LayerCache()
    cache.start(*tokens(2, 0))
    given = cache.append(*tokens(1, 1))
    before = [part.clone() for part in given]
    for number in range(2, 12):
        cache.append(*tokens(1, number))
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


def test_doubles_when_it_is_full() -> None:
    cache = LayerCache()
    cache.start(*tokens(3, 0))
    places = [cache.append(*tokens(1, number))[0].data_ptr() for number in range(1, 94)]
    moved = [number for number, (one, other) in enumerate(pairwise(places), 1) if one != other]
    # 3 places grow to 6, 12, 24, 48 and 96 when the token before filled them.
    assert moved == [3, 9, 21, 45]


def test_a_piece_larger_than_twice_the_room_fits() -> None:
    cache = LayerCache()
    memory, piece = tokens(2, 0), tokens(50, 1)
    cache.start(*memory)
    found = cache.append(*piece)
    assert torch.equal(found[0], torch.cat((memory[0], piece[0]), 2))
    assert torch.equal(found[1], torch.cat((memory[1], piece[1]), 2))
