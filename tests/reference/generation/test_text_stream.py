import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from t5g2convert.reference.generation.text_stream import TextStream
from t5g2convert.reference.prompts import TextCodec

BYTES = 3
WORDS = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "END", "EN", "é", "\n"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """Return a tokenizer like Gemma's: a token for every byte, decoded with the bytes around it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(
        models.BPE({word: number for number, word in enumerate(WORDS)}, [], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder)


def spelled(text: str | bytes) -> list[int]:
    """Return the byte tokens of a text."""
    return [BYTES + byte for byte in (text.encode() if isinstance(text, str) else text)]


def words(*names: str) -> list[int]:
    return [WORDS.index(name) for name in names]


def pieces(codec: TextCodec, tokens: Sequence[int], stops: Sequence[str] = (), *, special: bool = False) -> list[str]:
    stream, found = TextStream(codec, stops, special=special), []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.finish()]


def test_a_character_of_several_tokens_comes_with_its_last_one(codec: TextCodec) -> None:
    assert pieces(codec, spelled("aé東🎉")) == ["a", "", "é", "", "", "東", "", "", "", "🎉", ""]


def test_characters_between_words_come_whole(codec: TextCodec) -> None:
    tokens = [*words("a"), *spelled("東"), *words("▁", "b"), *spelled("é"), *words("\n")]
    assert pieces(codec, tokens) == ["a", "", "", "東", " ", "b", "", "é", "\n", ""]


def test_no_piece_ever_has_a_part_of_a_character(codec: TextCodec) -> None:
    draw = random.Random(3)
    for _ in range(50):
        text = "".join(draw.choice("aé東🎉 b\nß") for _ in range(30))
        tokens = [
            token
            for character in text
            for token in (
                words(character)
                if character in WORDS and draw.random() < 0.5
                else words("▁")
                if character == " "
                else spelled(character)
            )
        ]
        found = pieces(codec, tokens)
        assert "".join(found) == text == codec.decode(tokens)
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in found)


def test_bytes_that_are_no_character_are_replaced_and_what_was_written_stays(codec: TextCodec) -> None:
    # The tokenizer decodes a run of bytes as a whole: the broken one changes the é before it.
    tokens = [*spelled("é"), *spelled(b"\xe6"), *words("a")]
    assert codec.decode(tokens) == "\ufffd\ufffd\ufffda"
    assert pieces(codec, tokens) == ["", "é", "", "\ufffda", ""]


def test_an_incomplete_character_at_the_end_is_replaced(codec: TextCodec) -> None:
    found = pieces(codec, [*words("a"), *spelled("東")[:2]])
    assert found[:3] == ["a", "", ""]
    assert set(found[3]) == {"\N{REPLACEMENT CHARACTER}"}


def test_special_tokens_are_shown_only_on_request(codec: TextCodec) -> None:
    tokens = words("a", "<bos>", "b")
    assert "".join(pieces(codec, tokens)) == "ab"
    assert "".join(pieces(codec, tokens, special=True)) == "a<bos>b"


@pytest.mark.parametrize(
    ("tokens", "stops", "expected"),
    [
        (["a", "END", "b"], ["END"], ["a", ""]),
        (["a", "EN", "b"], ["END"], ["a", "", "ENb", ""]),
        (["a", "EN"], ["END"], ["a", "", "EN"]),
        (["a", "b", "a", "b"], ["ba"], ["a", "", ""]),
        (["a", "a", "b"], ["b", "ab"], ["", "a", ""]),
        (["a", "▁", "a", "▁", "b"], ["a b"], ["", "", "a ", "", ""]),
        (["END"], ["ND"], ["E"]),
        (["a", "b"], ["a"], [""]),
    ],
)
def test_the_text_ends_before_a_stop_text(
    tokens: list[str], stops: list[str], expected: list[str], codec: TextCodec
) -> None:
    assert pieces(codec, words(*tokens), stops) == expected


def test_no_piece_has_the_beginning_of_a_stop_text_that_follows(codec: TextCodec) -> None:
    draw = random.Random(4)
    stopped = 0
    for _ in range(300):
        tokens = [draw.choice(words("a", "b", "▁", "EN", "END")) for _ in range(12)]
        stops = [draw.choice(["ab", "ba b", "END", "ENa", "aaa"]) for _ in range(2)]
        whole = codec.decode(tokens)
        places = [whole.find(stop) for stop in stops if stop in whole]
        assert "".join(pieces(codec, tokens, stops)) == (whole[: min(places)] if places else whole)
        stopped += bool(places)
    assert 50 < stopped < 300
