import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from t5g2convert import convert
from t5g2convert.adaptation.documents import Document
from t5g2convert.adaptation.pack import Packing, pack
from t5g2convert.adaptation.shards import Packed
from t5g2convert.cli.demo import build_demo_source

EOS, BOS = 1, 2
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's T5Gemma 2: 256 tokens, one for each printable character of ASCII, and images of 4 tokens."""
    folder = tmp_path_factory.mktemp("model")
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "model", flush=False)
    return folder / "model"


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(f"texts:{number}", text) for number, text in enumerate(texts, 1)]


def pack_texts(model: Path, output: Path, texts: Sequence[str], **options: int) -> Packing:
    return pack(model, output, documents(texts), flush=False, **options)


def decoded(packed: Packed, model: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    starts = [0, *map(int, packed.ends)]
    pieces = [packed.read(start, stop) for start, stop in pairwise(starts)]
    assert all(piece[-1] == EOS for piece in pieces)
    return [tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


@pytest.mark.parametrize("shard_tokens", [1, 2, 3, 7, 22, 95, 96, 1000])
def test_what_is_packed_is_read_again_wherever_shards_end(model: Path, tmp_path: Path, shard_tokens: int) -> None:
    texts = ["ab" * (length // 2) + "c" * (length % 2) for length in LENGTHS]
    done = pack_texts(model, tmp_path / "out", texts, shard_tokens=shard_tokens)
    packed = Packed.open(tmp_path / "out", verify=True)
    assert packed.tokens == sum(LENGTHS) + len(LENGTHS) == 95
    assert len(packed.text.paths) == -(-95 // shard_tokens) == done.to_json()["shards"]
    assert decoded(packed, model) == texts
    whole = packed.read(0, 95)
    for start in range(0, 96, 5):
        for stop in range(start, 96, 3):
            assert np.array_equal(packed.read(start, stop), whole[start:stop])
    assert packed.highest == int(whole.max())
    assert packed.special == {EOS: len(LENGTHS)}
    assert np.array_equal(packed.counts, np.bincount(whole, minlength=256))


def test_bos_stands_before_each_document_if_asked_for(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "out", documents(["ab", "c"]), bos=True, flush=False)
    packed = Packed.open(tmp_path / "out")
    assert packed.read(0, packed.tokens).tolist()[::1] == [BOS, 69, 70, EOS, BOS, 71, EOS]
    assert packed.index.bos
    assert json.loads((tmp_path / "out/index.json").read_text())["special"] == {"1": 2, "2": 2}
