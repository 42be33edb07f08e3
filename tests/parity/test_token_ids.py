"""Token ids without a row fail verification, in every kind of conversion and every file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from t5g2convert import convert
from t5g2convert.adaptation.export import export
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.parity.token_ids import special_faults, table_rows, token_faults
from tests.adaptation.runs import FACTS, text_only, trained_from, write_checkpoint
from tests.checkpoint.tokenizer.test_ids_in_use import sentencepiece
from tests.conftest import TwinFolder
from tests.parity.mutations import Bench, Document, check_of, message_of

KINDS = ("gemma3", "gemma2", "encoder", "decoder", "adapted")
MakeKind = Callable[[str], Bench]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, twin_folder: TwinFolder) -> MakeKind:
    """Return a conversion of this kind, with tokenizer files, that the test may damage."""
    root = tmp_path_factory.mktemp("kinds")
    demo, model = root / "demo", root / "model"
    build_demo_source(demo)
    settings: Document = json.loads((demo / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"0": {"content": "<pad>", **FLAGS}}
    (demo / "tokenizer_config.json").write_text(json.dumps(settings))
    (demo / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    convert(demo, model, flush=False)

    def make(kind: str) -> Bench:
        folder, source = root / f"{kind}.made", model
        if kind == "gemma3":
            return Bench.of(demo, model, root / kind)
        if kind == "gemma2":
            source = root / "gemma2.source"
            shutil.copytree(twin_folder("gemma2-5"), source)
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                shutil.copy(demo / name, source / name)
            convert(source, folder, flush=False)
        elif kind.startswith("adapted"):
            trained = CheckpointReader(write_checkpoint(root / f"{kind}.step", trained_from(model, text_only), 100))
            export(model, trained, folder, facts=FACTS, flush=False)
        else:
            convert(model, folder, part=kind, flush=False)
        return Bench.of(source, folder, root / kind)

    return make


def listed(document: Document) -> None:
    document["added_tokens"].append({"id": 5000, "content": "<x>", **FLAGS})


def in_the_vocabulary(document: Document) -> None:
    document["model"]["vocab"]["<x>"] = 5000


def in_the_decoder(document: Document) -> None:
    document["added_tokens_decoder"]["5000"] = {"content": "<x>", **FLAGS}


DAMAGE: dict[str, tuple[str, Callable[[Document], object], str, str]] = {
    "added": ("tokenizer.json", listed, "tokenizer", "tokenizer.json: the token '<x>' has id 5000"),
    "vocabulary": ("tokenizer.json", in_the_vocabulary, "tokenizer", "tokenizer.json: the token '<x>' has id 5000"),
    "settings": (
        "tokenizer_config.json", in_the_decoder, "tokenizer", "tokenizer_config.json: the token '<x>' has id 5000",
    ),
    "pad": ("config.json", lambda document: document.update(pad_token_id=5000), "config", "pad_token_id is 5000"),
    "generation": (
        "generation_config.json", lambda document: document.update(eos_token_id=[1, 5000]), "config",
        "generation_config.json: eos_token_id is 5000",
    ),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_an_id_without_a_row_fails_in_every_kind_of_conversion(kind: str, kinds: MakeKind) -> None:
    bench = kinds(kind)
    rows = table_rows(open_checkpoint(bench.folder))
    assert check_of(bench.judge(), "tokenizer").passed
    for name, (file, damage, check, says) in DAMAGE.items():
        if (bench.folder / file).exists():
            bench.edit(file, damage)
            found = check_of(bench.resealed(), check)
            assert not found.passed, name
            assert f"{says}, but the embedding table has {rows} rows" in message_of(found), name


def test_the_same_token_in_the_source_is_no_excuse(kinds: MakeKind) -> None:
    bench = kinds("adapted-too")
    text = json.loads((bench.folder / "tokenizer.json").read_text())
    listed(text)
    sound = (bench.source / "tokenizer.json").read_bytes()
    for folder in (bench.folder, bench.source):
        (folder / "tokenizer.json").write_text(json.dumps(text))
    found = check_of(bench.judge(), "tokenizer")
    (bench.source / "tokenizer.json").write_bytes(sound)
    assert found.offenders == ("tokenizer.json: the token '<x>' has id 5000, but the embedding table has 256 rows",)


# Each file alone


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a Gemma 3 with 256 embedding rows and no tokenizer."""
    build_demo_source(tmp_path / "demo")
    for path in (tmp_path / "demo").glob("*token*"):
        path.unlink()
    return tmp_path / "demo"


def model_of(vocabulary: Any) -> Document:
    return {"model": {"vocab": vocabulary}}


WORDS = {f"w{number}": number for number in range(256)}

FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sound": ({"tokenizer.json": model_of(WORDS), "special_tokens_map.json": {"pad_token": "w3"}}, []),
    "unigram": (
        {"tokenizer.json": model_of([[f"w{number}", 0.0] for number in range(257)])},
        ["tokenizer.json: the token 'w256' has id 256"],
    ),
    "added-file": ({"added_tokens.json": {"<x>": 256}}, ["added_tokens.json: the token '<x>' has id 256"]),
    "pieces": ({"tokenizer.model": 257}, ["tokenizer.model: the token 'w256' has id 256"]),
    "pieces-that-fit": ({"tokenizer.model": 256}, []),
    "name": (
        {"tokenizer.json": model_of(WORDS), "special_tokens_map.json": {"pad_token": {"content": "<x>"}}},
        ["special_tokens_map.json: the token '<x>' has id 256"],
    ),
    "names": (
        {"tokenizer.json": model_of(WORDS), "tokenizer_config.json": {"additional_special_tokens": ["w1", "<x>"]}},
        ["tokenizer_config.json: the token '<x>' has id 256"],
    ),
    "written-into-every-text": (
        {
            "tokenizer.json": {
                **model_of(WORDS),
                "post_processor": {
                    "processors": [{"special_tokens": {"w2": {"id": "w2", "ids": [300]}}}, {"sep": ["w1", 300]}]
                },
            }
        },
        ["tokenizer.json: the token 'w2' has id 300"],
    ),
    "padding": (
        {"tokenizer.json": {**model_of(WORDS), "padding": {"pad_id": 256, "pad_token": "w0"}}},
        ["tokenizer.json: the token 'w0' has id 256"],
    ),
    "an-id-that-a-loader-does-not-give": (
        {"tokenizer.json": {**model_of(WORDS), "added_tokens": [{"id": 3, "content": "<x>"}]}},
        ["tokenizer.json: the token '<x>' has id 256"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_each_file_is_read(case: str, folder: Path) -> None:
    documents, faults = FILES[case]
    for name, document in documents.items():
        if name == "tokenizer.model":
            (folder / name).write_bytes(sentencepiece(*(f"w{number}" for number in range(document))))
        else:
            (folder / name).write_text(json.dumps(document))
    found = list(token_faults(open_checkpoint(folder)))
    assert found == [f"{fault}, but the embedding table has 256 rows" for fault in faults]


def test_an_id_that_is_not_a_number_is_a_fault(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<x>": "3"}')
    assert list(token_faults(open_checkpoint(folder))) == [
        "added_tokens.json: the token '<x>' has id '3', which is not a whole number"
    ]


def test_the_smallest_of_table_and_config_counts(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert table_rows(open_checkpoint(folder)) == 256
    assert "embed_tokens" in " ".join(load_file(folder / "model.safetensors"))
    config["text_config"]["vocab_size"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    target = open_checkpoint(folder)
    assert table_rows(target) == 200
    assert "image_token_index is 255, but the embedding table has 200 rows" in list(special_faults(target))
