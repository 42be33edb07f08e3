"""Pickles read as data: the same values, and nothing else."""

import contextlib
import os
import pickle
import random
import time
import tracemalloc
from pathlib import PurePosixPath
from typing import Any

import pytest

from t5g2convert.adaptation.train.pickles import Made, Name, Pairs, read_pickle

VALUE = {
    "numbers": [0, 1, 255, 256, 65_536, -7, 2**40, -(2**40), 1.5, None, True, False],
    "texts": ("", "a", "\u00e4" * 300, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "shared": [[1, 2]] * 3,
    "empty": {},
}


def plain(value: Any) -> Any:
    """A value with dicts in place of their pairs."""
    if isinstance(value, Pairs):
        return {plain(key): plain(item) for key, item in value.items}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_as_python_reads_them(protocol: int) -> None:
    assert plain(read_pickle(pickle.dumps(VALUE, protocol), lambda _: False)) == VALUE


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_an_object_is_its_name_its_arguments_and_its_state(protocol: int) -> None:
    made = read_pickle(pickle.dumps(PurePosixPath("a/b"), protocol), lambda name: name.name == "PurePosixPath")
    assert isinstance(made, Made)
    assert (made.of.name, made.arguments) == ("PurePosixPath", ("a", "b"))


def test_nothing_is_called_and_names_are_asked_for() -> None:
    asked: list[Name] = []
    with pytest.raises(ValueError, match=r"names \w+\.system, which describes no tensor"):
        read_pickle(pickle.dumps(os.system), lambda name: bool(asked.append(name)))
    assert [name.name for name in asked] == ["system"]


BOMBS = {
    "a text of 2^32 bytes": b"\x80\x04X\xff\xff\xff\xffabc.",
    "a frame of 2^64 bytes": b"\x80\x04\x95" + b"\xff" * 8 + b"abc.",
    "bytes of 2^45": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x20\x00\x00abc.",
    "a memo of 2^32 places": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a key whose hash takes 2^100 steps": b"\x80\x04}" + b")" + b"\x94h\x00\x86" + b"".join(
        b"\x94h" + bytes([number]) + b"\x86" for number in range(1, 100)
    ) + b"Ns.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_T5_bombs_take_neither_memory_nor_time(bomb: bytes) -> None:
    tracemalloc.start()
    began = time.process_time()
    with contextlib.suppress(ValueError):
        read_pickle(bomb, lambda _: False)
    assert time.process_time() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_T5_any_damage_is_a_value_or_a_ValueError() -> None:
    chance = random.Random(0)
    data = pickle.dumps(VALUE)
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        with contextlib.suppress(ValueError):
            read_pickle(bytes(damaged[: chance.randint(1, len(damaged))]), lambda _: True)
