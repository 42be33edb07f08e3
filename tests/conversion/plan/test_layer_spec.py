from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2convert import UsageError
from t5g2convert.conversion.plan.layer_spec import parse_layers, with_full_attention, written


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("first:1", [0]),
        ("first:4", [0, 1, 2, 3]),
        ("2:5", [2, 3, 4]),
        ("0:8:3", [0, 3, 6]),
        ("0:9:3", [0, 3, 6]),
        ("4:5", [4]),
        ("0,3,5", [0, 3, 5]),
        ("0,3,5:12", [0, 3, 5, 6, 7, 8, 9, 10, 11]),
        ("0:6:2,6:8,10", [0, 2, 4, 6, 7, 10]),
        ("0007,9", [7, 9]),
        ([2], [2]),
        ((0, 5), [0, 5]),
        (range(1, 9, 4), [1, 5]),
    ],
    ids=str,
)
def test_every_form_is_a_list_of_numbers(spec: str | Sequence[int], expected: list[int]) -> None:
    assert parse_layers(spec, "--decoder-layers") == tuple(expected)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("12", "--decoder-layers 12 is a single number (first:12 for the first 12 layers, 12:13 for only this one)"),
        ("first:0", "selects no layer"),
        ("3:3", "selects no layer"),
        ("5:2", "selects no layer"),
        ([], "selects no layer"),
        ("0:8:0", "the step of 0:8:0 is 0"),
        ("0,0", "layer 0 is selected twice"),
        ("0:4,3", "layer 3 is selected twice"),
        ("3,1", "layer 1 comes after 3"),
        ([4, 2], "layer 2 comes after 4"),
        ("", "expected first:N, a range A:B or A:B:STEP, or a list as 0,3,5:12"),
        ("0,", "'' in '0,' is not a selection of layers"),
        (":5", "is not a selection of layers"),
        ("5:", "is not a selection of layers"),
        ("::2", "is not a selection of layers"),
        ("0:8:2:1", "is not a selection of layers"),
        ("-1", "is not a selection of layers"),
        ("8:0:-1", "is not a selection of layers"),
        ("0, 3", "' 3' in '0, 3' is not a selection of layers"),
        ("1.5:3", "is not a selection of layers"),
        ("first:-2", "is not a selection of layers"),
        ("first:2,5", "is not a selection of layers"),
        ("last:2", "is not a selection of layers"),
        ("٣:٥", "is not a selection of layers"),
        ("all", "is not a selection of layers"),
        ("0:99999", "no model has 99999 layers"),
        ("first:" + "9" * 5000, "no model has 99999999999999999999 layers"),
        ("9" * 5000, "no model has"),
        ([-1], "-1 is not the number of a layer"),
        ([10_000], "10000 is not the number of a layer"),
        ([True], "True is not the number of a layer"),
        (["1"], "'1' is not the number of a layer"),
        ([1.0], "1.0 is not the number of a layer"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_invalid_selection_is_refused_in_one_line(spec: str | Sequence[int], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers(spec, "--decoder-layers")
    message = str(caught.value)
    assert says in message
    assert message.startswith("--decoder-layers")
    assert "\n" not in message
    assert len(message) < 200


@given(st.sets(st.integers(0, 60), min_size=2))
def test_numbers_come_back_from_their_list(numbers: set[int]) -> None:
    ordered = sorted(numbers)
    assert parse_layers(",".join(map(str, ordered)), "x") == parse_layers(ordered, "x") == tuple(ordered)


@given(st.text(alphabet="0123456789:,first ", max_size=12))
def test_any_text_is_refused_or_gives_increasing_layers(text: str) -> None:
    try:
        layers = parse_layers(text, "x")
    except UsageError:
        return
    assert layers
    assert list(layers) == sorted(set(layers))


def kinds(depth: int, pattern: int = 6) -> list[str]:
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(depth)]


@pytest.mark.parametrize(
    ("spec", "depth", "keeping"),
    [
        ("0:34:2", 34, ("1:34:2", 5)),
        ("0:18:2", 18, ("1:18:2", 3)),
        ("0:4", 34, ("2:6", 1)),
        ("0:1", 8, ("5:6", 1)),
        ("0,3,6", 8, ("0,3,5", 1)),
        ("6:11", 13, ("7:12", 1)),
    ],
)
def test_the_nearest_selection_with_full_attention(spec: str, depth: int, keeping: tuple[str, int]) -> None:
    chosen = with_full_attention(parse_layers(spec, "--decoder-layers"), kinds(depth))
    assert chosen is not None
    kept = [kinds(depth)[layer] for layer in chosen].count("full_attention")
    assert (written(chosen, depth), kept) == keeping


def test_a_parent_without_full_attention_gets_no_suggested_selection() -> None:
    assert with_full_attention([0, 2], ["sliding_attention"] * 4) is None


@given(data=st.data(), depth=st.integers(6, 40))
def test_any_selection_is_written_as_it_is_read_and_its_remedy_is_one(data: st.DataObject, depth: int) -> None:
    sliding = [layer for layer, kind in enumerate(kinds(depth)) if kind == "sliding_attention"]
    layers = tuple(sorted(data.draw(st.sets(st.sampled_from(sliding), min_size=1))))
    assert parse_layers(written(layers, depth), "--decoder-layers") == layers
    chosen = with_full_attention(layers, kinds(depth))
    assert chosen is not None
    assert len(chosen) == len(layers)
    assert any(kinds(depth)[layer] == "full_attention" for layer in chosen)
    assert parse_layers(written(chosen, depth), "--decoder-layers") == chosen
