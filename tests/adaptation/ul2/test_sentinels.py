from typing import Any

import pytest

from t5g2convert.adaptation.ul2.sentinels import FirstSentinel, Sentinels, check_reserved
from t5g2convert.errors import DataError

SPECIAL = {"pad": 0, "eos": 1, "bos": 2, "boi": 255_999, "eoi": 256_000, "image": 256_001}
RESERVED = frozenset(SPECIAL.values())


def test_gemma_3_has_6142_sentinels() -> None:
    run = Sentinels.available(vocabulary=262_144, reserved=RESERVED)
    assert (run.first, run.count, run.last) == (262_143, 6142, 256_002)
    assert not any(token in run for token in RESERVED)
    assert Sentinels.of(vocabulary=262_144, reserved=RESERVED, needed=6142) == run


def test_only_as_many_as_needed_are_taken() -> None:
    sentinels = Sentinels.of(vocabulary=262_144, reserved=RESERVED, needed=3)
    assert [token for token in range(262_100, 262_200) if token in sentinels] == [262_141, 262_142, 262_143]
    assert sentinels.last == 262_141
    none = Sentinels.of(vocabulary=262_144, reserved=RESERVED, needed=0)
    assert not any(token in none for token in (262_142, 262_143, 262_144))


@pytest.mark.parametrize(
    ("vocabulary", "reserved", "first", "count"),
    [
        (10, set(), 9, 10),
        (10, {9}, 8, 9),
        (10, {8, 9, 3}, 7, 4),
        (10, {0, 5}, 9, 4),
        (10, {12, 2}, 9, 7),  # 12 is not an id
        (3, {0, 1, 2}, -1, 0),
    ],
)
def test_the_run_ends_above_a_reserved_id(vocabulary: int, reserved: set[int], first: int, count: int) -> None:
    run = Sentinels.available(vocabulary=vocabulary, reserved=reserved)
    assert (run.first, run.count) == (first, count)


@pytest.mark.parametrize(
    ("reserved", "needed", "reason"),
    [
        (
            RESERVED,
            6143,
            "need 6143 sentinels, but 6142 are available: ids 256002 to 262143 of a vocabulary of 262144",
        ),
        (RESERVED | {262_140}, 4, "need 4 sentinels, but 3 are available: ids 262141 to 262143"),
        (range(262_144), 1, "need 1 sentinels, but 0 are available: no id"),
    ],
)
def test_a_run_that_is_too_short_is_refused(reserved: Any, needed: int, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Sentinels.of(vocabulary=262_144, reserved=reserved, needed=needed)


@pytest.mark.parametrize(("first", "count"), [(4, 6), (4, -1)])
def test_no_id_is_negative(first: int, count: int) -> None:
    with pytest.raises(DataError, match="expected 0 to 5 sentinels from id 4 down"):
        Sentinels(first, count)
    assert Sentinels(4, 5).last == 0


def check(**changes: Any) -> None:
    """Call `check_reserved` with valid arguments and changes."""
    sound = {
        "sentinels": Sentinels(262_143, 1260),
        "special": SPECIAL,
        "mode_tokens": [256_002, 256_003],
        "highest": 260_883,
        "occurrences": {0: 0, 1: 70, 255_999: 0, 256_001: 0, 260_883: 4, 262_143: 0},
        "absent": ["pad", "image", "boi", "eoi"],
    }
    check_reserved(**{**sound, **changes})


def test_valid_ids_pass() -> None:
    check()
    check(absent=[], occurrences={255_999: 3, 256_000: 3, 256_001: 768})
    check(mode_tokens=[])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"special": {**SPECIAL, "eos": 262_143}}, "eos, id 262143, is among the sentinels, ids 260884 to 262143"),
        ({"special": {**SPECIAL, "image": 260_884}}, "image, id 260884, is among the sentinels"),
        ({"mode_tokens": [256_002, 262_000]}, "the mode token 262000 is also a sentinel"),
        ({"mode_tokens": [2]}, "the mode token 2 is also bos"),
        ({"highest": 260_884}, "token 260884 of the data is a sentinel"),
        ({"highest": 262_143}, "token 262143 of the data is a sentinel"),
        ({"highest": 262_200, "occurrences": {260_884: 1, 262_200: 1}}, "token 260884 of the data is a sentinel"),
        ({"occurrences": {256_003: 2}}, "token 256003 of the data is a mode token"),
        ({"occurrences": {256_001: 256}}, "token 256001 of the data is image, which must not occur in this data"),
        ({"occurrences": {0: 1}}, "token 0 of the data is pad, which must not occur in this data"),
    ],
)
def test_collisions_are_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        check(**changes)


def test_all_colliding_ids_are_counted_and_some_named() -> None:
    occurrences = {262_143 - number: number + 2 for number in range(9)}
    with pytest.raises(DataError, match=r"token 262143 of the data is a sentinel.*, and 8 more such ids") as caught:
        check(highest=262_143, occurrences=occurrences)
    assert caught.value.details == tuple(f"id {262_143 - number} occurs {number + 2} times" for number in range(5))


def test_only_known_ids_are_counted() -> None:
    with pytest.raises(DataError, match="token 262143 of the data is a sentinel, ids 260884 to 262143 ") as caught:
        check(highest=262_143, occurrences={262_140: 0})
    assert caught.value.details == ()


def test_an_id_next_to_the_sentinels_is_text() -> None:
    check(highest=260_883, occurrences={260_883: 1})
    check(highest=262_144, occurrences={262_144: 1})


# The first sentinel


GEMMA = {"<bos>": 2, "<unused99>": 256_001, "<unused6236>": 262_138, "<unused6237>": 262_139, "<unused6241>": 262_143}


def find(wanted: str | int | None, names: dict[str, int] = GEMMA, **changes: Any) -> FirstSentinel:
    return FirstSentinel.find(wanted, names, **{"vocabulary": 262_144, "reserved": RESERVED, **changes})


def test_the_first_sentinel_is_googles() -> None:
    assert find(None) == FirstSentinel(262_139, "<unused6237>")
    run = Sentinels.available(vocabulary=262_144, reserved=RESERVED, first=262_139)
    assert (run.first, run.last, run.count) == (262_139, 256_002, 6138)
    assert Sentinels.of(vocabulary=262_144, reserved=RESERVED, needed=1260, first=262_139) == Sentinels(262_139, 1260)


def test_it_is_found_by_its_name_whatever_its_id() -> None:
    moved = {**GEMMA, "<unused6237>": 500}
    assert find(None, moved) == find("<unused6237>", moved) == FirstSentinel(500, "<unused6237>")


def test_an_id_is_recorded_by_its_name() -> None:
    assert find(262_143) == find("<unused6241>") == FirstSentinel(262_143, "<unused6241>")
    assert find(262_140) == FirstSentinel(262_140, 262_140)


def test_in_another_vocabulary_the_default_is_the_highest_unused_id() -> None:
    names = {"<unused7>": 297, "<eos>": 1}
    assert find(None, names, vocabulary=300, reserved={299, 298, 1}) == FirstSentinel(297, "<unused7>")
    assert find(None, {}, vocabulary=300, reserved={1}) == FirstSentinel(299, 299)
    # The table has no row for Google's.
    assert find(None, GEMMA, vocabulary=262_139, reserved=RESERVED) == FirstSentinel(262_138, "<unused6236>")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("<unused7>", "the tokenizer has no token <unused7>, the mixture's first_sentinel"),
        ("<bos>", "first_sentinel, id 2, is a reserved token"),
        (262_144, "first_sentinel, id 262144, is beyond the table of 262144 rows"),
    ],
)
def test_a_first_sentinel_that_cannot_be_used_is_refused(wanted: str | int, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        find(wanted)
