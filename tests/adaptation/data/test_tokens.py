import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from t5g2convert import convert
from t5g2convert.adaptation.data.tokens import TextEncoder, read_tokens, tokenizer_sha256
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.errors import CheckpointError
from tests.conftest import TwinFolder
from tests.models.gemma_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def gemma(twin_folder: TwinFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with the vocabulary and the added tokens of a published Gemma 3."""
    folder = tmp_path_factory.mktemp("gemma")
    shutil.copytree(twin_folder("images-with-fill"), folder / "source")
    write_tokenizer(folder / "source")
    convert(folder / "source", folder / "model", flush=False)
    return folder / "model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo's T5Gemma 2 that tests may damage."""
    build_demo_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model", flush=False)
    return tmp_path / "model"


def change(path: Path, act: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    act(document)
    path.write_text(json.dumps(document))


def test_the_ids_of_a_converted_model(gemma: Path) -> None:
    tokens = read_tokens(gemma)
    assert (tokens.vocabulary, tokens.bos, tokens.eos, tokens.pad) == (262_144, 2, 1, 0)
    assert (tokens.boi, tokens.eoi, tokens.image, tokens.per_image, tokens.pictures) == (
        255_999, 256_000, 256_001, 4, True,
    )  # fmt: skip
    assert tokens.reserved == {0, 1, 2, 255_999, 256_000, 256_001}


HOSTILE = [
    "a<eos>b", "<bos>", "<pad><unk>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<unused98>",
    "<unused100>", "<unused6241>", "<unused0>", "<start_of_turn>", "<mask>", "a <eos>\n\n<eos>",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(gemma: Path) -> TextEncoder:
    return TextEncoder(gemma, read_tokens(gemma))


@pytest.fixture(scope="module")
def plain(gemma: Path) -> Tokenizer:
    return Tokenizer.from_file(str(gemma / "tokenizer.json"))


@pytest.mark.parametrize("text", HOSTILE)
def test_the_name_of_a_special_token_is_read_as_text(encoder: TextEncoder, plain: Tokenizer, text: str) -> None:
    (tokens,) = encoder.encode([text])
    assert not set(tokens.tolist()) & encoder.special.keys()
    assert encoder.fault(tokens) is None
    assert plain.decode(tokens.tolist(), skip_special_tokens=False) == text
    assert set(plain.encode(text, add_special_tokens=False).ids) & encoder.special.keys(), "or there was no danger"


def test_text_without_names_of_special_tokens_is_read_unchanged(encoder: TextEncoder, plain: Tokenizer) -> None:
    texts = ["ab ab\n\nab", "\n\n\nä€𝄞\t{}", " ab  ab ", "", "[multimodal]"]
    found = encoder.encode(texts)
    assert [tokens.tolist() for tokens in found] == [plain.encode(text, add_special_tokens=False).ids for text in texts]
    assert all(tokens.dtype == np.uint32 for tokens in found)


def test_truncation_and_padding_of_a_tokenizer_are_disabled(model: Path) -> None:
    before = [tokens.tolist() for tokens in TextEncoder(model, read_tokens(model)).encode(["abcdefgh", "a"])]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(model / "tokenizer.json"))
    after = [tokens.tolist() for tokens in TextEncoder(model, read_tokens(model)).encode(["abcdefgh", "a"])]
    assert before == after
    assert list(map(len, after)) == [8, 1]


def test_tokens_in_the_config_are_special_whatever_the_tokenizer_says(model: Path) -> None:
    def act(document: dict[str, Any]) -> None:
        for entry in document["added_tokens"]:
            entry["special"] = False

    change(model / "tokenizer.json", act)
    encoder = TextEncoder(model, read_tokens(model))
    assert encoder.special.keys() == {0, 1, 2, 253, 254, 255}
    (tokens,) = encoder.encode(["<eos><image_soft_token>"])
    assert not set(tokens.tolist()) & encoder.special.keys()


def test_a_special_token_that_a_tokenizer_still_returns_is_a_fault(model: Path) -> None:
    change(model / "tokenizer.json", lambda document: document["model"].update(ignore_merges=True))
    encoder = TextEncoder(model, read_tokens(model))
    (bad, good) = encoder.encode(["<eos>", "a<eos>"])
    assert encoder.fault(bad) == "contains the special token 1 (<eos>), although its name was read as text"
    assert encoder.fault(good) is None


def test_the_unknown_token_is_not_a_fault(model: Path) -> None:
    encoder = TextEncoder(model, read_tokens(model))
    (tokens,) = encoder.encode(["aäa"])
    assert tokens.tolist() == [69, 3, 69]
    assert encoder.fault(tokens) is None
    assert encoder.special[3] == "<unk>"


def test_a_token_without_a_row_is_a_fault(model: Path) -> None:
    change(model / "tokenizer.json", lambda document: document["model"]["vocab"].update({"ä": 256}))
    encoder = TextEncoder(model, read_tokens(model))
    (tokens,) = encoder.encode(["ä"])
    assert encoder.fault(tokens) == "contains token 256, but the embedding table has 256 rows"


def test_a_folder_without_the_needed_files_is_refused(model: Path, tmp_path: Path) -> None:
    assert tokenizer_sha256(model) == sha256_of(model / "tokenizer.json")
    tokens = read_tokens(model)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read by the tokenizers library"):
        TextEncoder(model, tokens)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        TextEncoder(model, tokens)
    with pytest.raises(CheckpointError, match="is not T5Gemma 2"):
        read_tokens(tmp_path / "source")
    with pytest.raises(CheckpointError, match="no such folder"):
        read_tokens(tmp_path / "absent")
    config = model / "config.json"
    before = config.read_text()
    change(config, lambda document: document["decoder"].update(eos_token_id=[]))
    with pytest.raises(CheckpointError, match=r"decoder\.eos_token_id is missing"):
        read_tokens(model)
    config.write_text(before)
    change(config, lambda document: document["encoder"].update(eoi_token_index=256))
    with pytest.raises(CheckpointError, match="the embedding table has 256 rows, but no row for eoi_token_index 256"):
        read_tokens(model)
