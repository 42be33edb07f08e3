import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from t5g2convert import UsageError
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.parity import batches as module
from t5g2convert.parity.batches import (
    BEYOND_WINDOW,
    ImageBatch,
    Inputs,
    first_tokens,
    image_ids,
    pixels,
    read_inputs,
    read_text,
    text_batch,
    token_batch,
)
from t5g2convert.parity.source_models import Gemma3Source
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.conftest import TwinFolder

NEVER = {0, 5, 291, 299}


def opened(folder: Path, dtype: torch.dtype = torch.bfloat16) -> T5Gemma2Reference:
    return T5Gemma2Reference(open_checkpoint(folder), dtype=dtype)


def changed_config(folder: Path, target: Path, stack: str, **values: object) -> Path:
    """Copy a converted folder and change settings of one stack."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    section = config["decoder"] if stack == "decoder" else config["encoder"]["text_config"]
    section |= values
    (target / "config.json").write_text(json.dumps(config))
    return target


# Seeded tokens


@pytest.mark.parametrize("length", [8, 31, 200])
def test_seeded_tokens_are_in_the_vocabulary_and_the_same_every_time(length: int) -> None:
    batch, again = (token_batch(300, length, never=NEVER) for _ in range(2))
    assert batch.ids_BT.shape == batch.kept_BT.shape == (2, length)
    assert 0 <= int(batch.ids_BT.min()) <= int(batch.ids_BT.max()) < 300
    assert not NEVER & set(batch.ids_BT.flatten().tolist())
    assert torch.equal(batch.ids_BT, again.ids_BT)
    assert not torch.equal(batch.ids_BT[0], batch.ids_BT[1])


def test_every_allowed_token_occurs() -> None:
    assert set(token_batch(20, 400, never={3, 19}).ids_BT.flatten().tolist()) == set(range(20)) - {3, 19}


@pytest.mark.parametrize("length", [8, 9, 31, 200])
def test_only_the_second_sequence_has_padding_on_both_sides(length: int) -> None:
    kept = token_batch(300, length, never=set()).kept_BT
    assert bool(kept[0].all())
    assert kept[1].nonzero().flatten().tolist() == list(range(3, length - 2))


@pytest.mark.parametrize("length", [8, 9, 10, 31, 200])
def test_the_placed_token_is_not_in_padding(length: int) -> None:
    batch = token_batch(300, length, never=NEVER, placed=291)
    placed = batch.ids_BT == 291
    assert (placed & batch.kept_BT).any(1).tolist() == [True, True]
    assert int(placed[0].sum()) == len({length // 3, length // 2, length - 6})
    plain = token_batch(300, length, never=NEVER)
    assert torch.equal(batch.ids_BT[~placed], plain.ids_BT[~placed])


def test_reserved_tokens_are_the_image_and_end_of_image_tokens(converted_twin: TwinFolder, tmp_path: Path) -> None:
    assert opened(converted_twin("images-8")).reserved == {291, 292}
    shutil.copytree(converted_twin("images-8"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    # As in transformers: the image token is at the top level, the end-of-image token in the encoder.
    config["image_token_index"], config["encoder"]["eoi_token_index"] = 17, 18
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert opened(tmp_path / "out").reserved == {17, 18}


# Texts


def test_a_text_is_read_from_its_start_and_again_with_padding() -> None:
    batch = text_batch(list(range(100, 150)), 31)
    assert batch.ids_BT.tolist() == [list(range(100, 131))] * 2
    assert batch.kept_BT[1].nonzero().flatten().tolist() == list(range(3, 29))


def test_a_short_text_is_read_whole() -> None:
    batch = text_batch(list(range(8)), 31)
    assert batch.ids_BT.tolist() == [list(range(8))] * 2
    assert batch.kept_BT.sum(1).tolist() == [8, 3]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_fewer_than_eight_tokens_are_refused(count: int, demo_source: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * count)
    vision = Gemma3Source(Sources.open(demo_source)).vision
    with pytest.raises(UsageError, match=f"has {count} tokens, expected at least 8"):
        read_inputs(tmp_path / "text", None, demo_source, vision, with_source=True)


def test_an_unreadable_text_is_reported(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Zürich".encode("latin-1"))
    for name in ("latin", "missing", "."):
        with pytest.raises(UsageError, match="cannot be read"):
            read_text(tmp_path / name, 100)
    (tmp_path / "utf-8").write_text("Zürich", encoding="utf-8")
    assert read_text(tmp_path / "utf-8", 100) == "Zürich"
    assert read_text(tmp_path / "utf-8", 2) == "Zü"


# Images


def test_an_image_is_in_the_middle_of_a_text() -> None:
    ids = image_ids(300, 4, never=NEVER)
    assert ids.shape == (1, 14)
    assert (ids[0] == -1).nonzero().flatten().tolist() == [6, 7, 8, 9]
    text = ids[ids >= 0].tolist()
    assert text == token_batch(300, 10, never=NEVER).ids_BT[0].tolist()


def test_an_image_batch_has_its_readers_image_token() -> None:
    batch = ImageBatch(torch.tensor([[4, -1, -1, 5]]), torch.zeros(1, 2, 3))
    assert batch.with_token(292).tolist() == [[4, 292, 292, 5]]
    assert batch.with_token(7).tolist() == [[4, 7, 7, 5]]


def test_seeded_pixels_are_standard_normal_and_the_same_every_time(converted_twin: TwinFolder) -> None:
    tower = opened(converted_twin("images-8")).vision
    assert tower is not None
    images = pixels(tower, 3, torch.float32)
    assert images.shape == (3, 3, 56, 56)
    assert float(images.mean()) == pytest.approx(0, abs=0.02)
    assert float(images.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(pixels(tower, 3, torch.float32), images)
    assert torch.equal(pixels(tower, 3, torch.bfloat16), images.to(torch.bfloat16))


# Inputs


@pytest.mark.parametrize(("decoder", "encoder"), [(5, 5), (19, 5), (5, 23)])
def test_sequences_are_longer_than_the_larger_window(
    decoder: int, encoder: int, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    one = changed_config(converted_twin("images-8"), tmp_path / "one", "decoder", sliding_window=decoder)
    both = changed_config(one, tmp_path / "both", "encoder", sliding_window=encoder)
    batch = Inputs().batch(opened(both))
    assert batch.ids_BT.shape == (2, max(decoder, encoder) + BEYOND_WINDOW)
    assert batch.remarks == ()


def test_the_end_of_image_row_is_read_in_its_own_dtype(converted_twin: TwinFolder) -> None:
    folder = converted_twin("images-8")
    exact, widened = Inputs().batch(opened(folder)), Inputs().batch(opened(folder, torch.float32))
    assert int((exact.ids_BT == 291).sum()) == 6
    assert exact.remarks == ()
    assert 291 not in widened.ids_BT
    (remark,) = widened.remarks
    assert remark.startswith("the end-of-image token was left out: its row is scaled and rounded in bfloat16")


def test_a_vocabulary_without_the_end_of_image_token_needs_no_remark(converted_twin: TwinFolder) -> None:
    folder = converted_twin("text-8")
    batch = Inputs().batch(opened(folder, torch.float32))
    assert int(batch.ids_BT.max()) < 300
    assert batch.remarks == ()


@pytest.mark.parametrize(("longest", "remarks"), [(15, 1), (16, 1), (17, 0)])
def test_a_window_that_was_not_reached_is_reported(
    longest: int, remarks: int, converted_twin: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed_config(converted_twin("text-8"), tmp_path / "out", "decoder", sliding_window=16)
    monkeypatch.setattr(module, "MAX_TOKENS", longest)
    batch = Inputs().batch(opened(folder))
    assert batch.ids_BT.shape == (2, longest)
    expected = (f"the sequences have {longest} tokens, so the sliding window of 16 was not exceeded",)
    assert batch.remarks == expected * remarks


def test_a_custom_text_and_picture_are_used(demo_source: Path, converted_twin: TwinFolder, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(converted_twin("images-8"), folder)
    shutil.copy(demo_source / "tokenizer.json", folder)
    (tmp_path / "text").write_text("a text of my own, as long as it has to be")
    Image.effect_noise((40, 30), 50).save(tmp_path / "picture.png")
    target = opened(folder)
    assert target.vision is not None
    vision = Gemma3Source(Sources.open(demo_source)).vision
    given = read_inputs(tmp_path / "text", tmp_path / "picture.png", folder, vision, with_source=True)
    expected = TextCodec(folder).encode("a text of my own, as long as it has to be")[: 5 + BEYOND_WINDOW]
    assert given.batch(target).ids_BT.tolist() == [expected] * 2
    found = given.pixels(target.vision)
    assert torch.equal(found, picture(tmp_path / "picture.png", target.vision, folder, torch.bfloat16))
    assert torch.equal(Inputs().pixels(target.vision), pixels(target.vision, 1, torch.bfloat16))


@pytest.mark.sampled
@pytest.mark.parametrize("count", [1, 8, 100, 4000, 10**6])
@pytest.mark.parametrize("kind", ["words", "spaces", "nothing"])
def test_only_as_much_text_is_read_as_the_tokens_need(
    demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, kind: str
) -> None:
    text = {"words": "the quick brown fox\n" * 20_000, "spaces": " " * 300_000 + "end", "nothing": ""}[kind]
    (tmp_path / "text").write_text(text)
    codec = TextCodec(demo_source)
    whole, encode, longest = codec.encode(text), TextCodec.encode, 0

    def noted(self: TextCodec, text: str, **options: bool) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(TextCodec, "encode", noted)
    assert first_tokens(codec, tmp_path / "text", count) == whole[:count]
    assert longest <= 2 * 16 * count
    assert longest <= len(text)


class Greedy(TextCodec):
    """A tokenizer with a first token that depends on the whole text, unlike any real one."""

    def __init__(self) -> None:
        """Skip the folder that the base class reads."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [min(len(text), 50_000), *map(ord, text)]


def test_a_text_is_read_until_its_tokens_stop_changing(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 200_000)
    assert first_tokens(Greedy(), tmp_path / "text", 100) == [50_000, *[97] * 99]
