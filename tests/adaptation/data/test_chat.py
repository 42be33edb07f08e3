"""Conversations become the tokens that transformers and `t5g2 generate --chat` make of them."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from t5g2convert import convert
from t5g2convert.adaptation.data import chat, document_batches
from t5g2convert.adaptation.data import pack as pack_module
from t5g2convert.adaptation.data.document_encoder import Pieces, encode_batches
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.pairs import Pair
from t5g2convert.adaptation.data.rows import Columns, Row, row_of
from t5g2convert.errors import DataError
from t5g2convert.reference.generation.chat_template import ChatTemplate
from t5g2convert.reference.generation.generator import Generator, Prompt
from t5g2convert.reference.options import GenerateOptions
from tests.conftest import TwinFolder
from tests.folders import contents
from tests.models.gemma_chat import TEMPLATE, write_chat_model
from tests.models.gemma_tokenizer import write_processor, write_tokenizer

EOS = 1

CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "ab ab"}, {"role": "assistant", "content": "ab"}],
    [{"role": "user", "content": "\n\nab  \n\n\nab \t"}, {"role": "assistant", "content": "  é \n\n 日本 "}],
    [
        {"role": "system", "content": " ab\n"},
        {"role": "user", "content": '{"id": 3}'},
        {"role": "assistant", "content": "\n\n"  "a"},
        {"role": "user", "content": [{"type": "text", "text": " ab "}, {"type": "text", "text": " \nab"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "ab\n\nab"}]},
    ],
    [
        {"role": "user", "content": [
            {"type": "text", "text": "ab "}, {"type": "image", "path": "red.png"}, {"type": "text", "text": "\n\nab"},
            {"type": "image", "path": "blue.png"},
        ]},
        {"role": "assistant", "content": "a ab"},
        {"role": "user", "content": [{"type": "image", "path": "blue.png"}, {"type": "text", "text": "ab"}]},
        {"role": "assistant", "content": "ab"},
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def model(twin_folder: TwinFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with Gemma 3's vocabulary and chat template, and images of 4 tokens; `red.png` and `blue.png`."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(twin_folder("images-with-fill"), folder / "source")
    write_tokenizer(folder / "source")
    write_processor(folder / "source", side=56, tokens=4)
    (folder / "source/chat_template.jinja").write_text(TEMPLATE)
    convert(folder / "source", folder / "model", flush=False)
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(folder / f"{name}.png")
    return folder / "model"


def packed(model: Path, output: Path, *conversations: list[dict[str, Any]], all_turns: bool = False) -> list[Pair]:
    rows: list[Row] = [row_of("a", {"messages": each}, Columns(), model.parent) for each in conversations]
    pack(model, output, rows, all_turns=all_turns, flush=False)
    return list(Packed.open(output, verify=True).pairs)


def with_files(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a message with whole paths, as transformers reads them."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = [{**part, "path": str(folder / part["path"])} if "path" in part else part for part in message["content"]]
    return {**message, "content": parts}


@pytest.mark.slow
def test_tokens_equal_those_of_transformers(model: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(model)

    def theirs(messages: list[dict[str, Any]], *, answer_next: bool) -> list[int]:
        given = [with_files(each, model.parent) for each in messages]
        made = processor.apply_chat_template(
            given, tokenize=True, add_generation_prompt=answer_next, return_dict=True, return_tensors="np"
        )
        return [int(token) for token in made["input_ids"][0]]

    pairs = iter(packed(model, tmp_path / "out", *CONVERSATIONS, all_turns=True))
    compared = 0
    for conversation in CONVERSATIONS:
        for number, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            pair = next(pairs)
            before = theirs(conversation[:number], answer_next=True)
            assert pair.source.tolist() == before
            whole = theirs(conversation[: number + 1], answer_next=False)
            assert whole[: len(before)] == before
            # Behind the end of the turn, the template puts a line break.
            assert pair.target.tolist() == [*whole[len(before) : -1], EOS]
            compared += 1
    assert compared == 6
    assert next(pairs, None) is None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    return write_chat_model(folder)


def test_an_input_is_what_generate_reads_for_the_same_prompt(small: Path, tmp_path: Path) -> None:
    generator = Generator(small, GenerateOptions(chat=True))
    image = small.parent / "red.png"
    for number, text in enumerate((" Tell me\n", "a  b\n\n\nc", "{}")):
        answer = {"role": "assistant", "content": "x"}
        asked = {"role": "user", "content": text}
        with_image = {**asked, "content": [{"type": "image", "path": "red.png"}, {"type": "text", "text": text}]}
        plain, pictured = packed(small, tmp_path / f"{number}", [asked, answer], [with_image, answer])
        assert plain.source.tolist() == generator.row(Prompt(text)).encoder
        assert pictured.source.tolist() == generator.row(Prompt(text, image=image)).encoder
        assert len(pictured.source) == len(plain.source) + 6 + 4


def test_bos_comes_first_once_whether_the_template_writes_it_or_not(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE.replace("{{ bos_token }}", ""))
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = [
        [
            packed(folder, tmp_path / f"out{number}", asked)[0].source.tolist(),
            Generator(folder, GenerateOptions(chat=True)).row(Prompt("a")).encoder,
        ]
        for number, folder in enumerate((small, tmp_path / "model"))
    ]
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
    assert found[0][0].count(2) == 1


def test_a_plain_input_is_what_generate_reads(small: Path, tmp_path: Path) -> None:
    generator = Generator(small, GenerateOptions())
    pack(small, tmp_path / "out", [row_of("a", {"input": "a b\n", "target": "c"}, Columns(), None)], flush=False)
    (pair,) = Packed.open(tmp_path / "out").pairs
    # The demo's tokenizer has no rule that puts bos before a text; Gemma's has one.
    assert pair.source.tolist() == [2, *generator.row(Prompt("a b\n")).encoder]


def test_answers_of_weight_0_are_not_learnt(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "a", "weight": 0}]
    last = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab ab", "weight": 1}]
    (pair,) = packed(model, tmp_path / "weighed", [*turns, *last], all_turns=True)
    (alone,) = packed(model, tmp_path / "alone", [*turns, *last])
    assert (pair.source.tolist(), pair.target.tolist()) == (alone.source.tolist(), alone.target.tolist())
    for conversation, reason in (
        ([*last, *turns], "ends with an answer of weight 0"),
        (turns, "only answers of weight 0"),
    ):
        with pytest.raises(DataError, match=reason):
            packed(model, tmp_path / "refused", conversation)


def test_templates_that_mark_answers_render_the_same(model: Path, tmp_path: Path) -> None:
    marked = TEMPLATE.replace(
        "        {{ message['content'] | trim }}\n",
        "{%- generation -%}{{ message['content'] | trim }}{%- endgeneration -%}\n",
    )
    assert marked != TEMPLATE
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(marked)
    plain, other = (ChatTemplate(folder) for folder in (model, tmp_path / "model"))
    theirs = AutoProcessor.from_pretrained(tmp_path / "model")
    for messages in CONVERSATIONS[:3]:
        expected = plain.render_messages(list(messages), answer_next=False)
        assert other.render_messages(list(messages), answer_next=False) == expected
        assert theirs.apply_chat_template(list(messages), tokenize=False) == expected


def test_the_pairs_of_a_long_conversation_fill_several_batches(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "ab ab"}, {"role": "assistant", "content": "ab"}] * 6
    whole = packed(model, tmp_path / "whole", turns, turns[:4], all_turns=True)
    assert len(whole) == 6 + 2
    characters = []

    def measured(batches: Iterable[list[Pieces]], *others: Any, **options: Any) -> Iterator[Any]:
        def each() -> Iterator[list[Pieces]]:
            for batch in batches:
                characters.append(sum(len(part) for it in batch for part in it.source if isinstance(part, str)))
                yield batch

        return encode_batches(each(), *others, **options)

    monkeypatch.setattr(pack_module, "encode_batches", measured)
    monkeypatch.setattr(document_batches, "BATCH_CHARACTERS", 100)
    # Every pair is rendered twice where the texts of all do not fit into memory.
    monkeypatch.setattr(chat, "HELD", 150)
    again = packed(model, tmp_path / "again", turns, turns[:4], all_turns=True)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert [pair.target.tolist() for pair in again] == [pair.target.tolist() for pair in whole]
    # A batch has at most one pair more than fits.
    assert len(characters) >= 3
    assert max(characters) < 100 + 6 * 30


def test_one_bad_turn_is_a_fault_of_the_whole_conversation(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab"}] * 3
    bad = [*turns, {"role": "assistant", "content": "a"}]
    rows = [row_of(f"r:{number}", {"messages": each}, Columns(), None) for number, each in enumerate((turns, bad))]
    done = pack(model, tmp_path / "out", rows, all_turns=True, skip_bad=1, flush=False)
    assert (done.index.pair.documents, done.to_json()["skipped"]) == (3, 1)
