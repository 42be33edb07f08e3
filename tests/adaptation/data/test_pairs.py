"""Pairs from every form of row: golden samples, token by token, and the options that decide."""

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from tokenizers import Tokenizer

from t5g2convert.adaptation.data import chat, document_encoder
from t5g2convert.adaptation.data.dataset_rows import read_dataset
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import Packing, pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.pair_documents import PairDocument
from t5g2convert.adaptation.data.rows import ChatRow, Columns, Document, Fault, PairRow, row_of
from t5g2convert.adaptation.data.shown import first_samples
from t5g2convert.errors import CheckpointError, DataError, UsageError
from tests.folders import contents
from tests.models.gemma_chat import write_chat_model

IMAGE = ["<start_of_image>", *["<image_soft_token>"] * 4, "<end_of_image>"]
USER = ["<start_of_turn>", *"user", "\n"]
MODEL = ["<start_of_turn>", *"model", "\n"]
END = ["<end_of_turn>", "\n"]

Names = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tokens of single characters, images of 4 tokens, and Gemma 3's chat template."""
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three images."""
    (tmp_path / "in").mkdir()
    for name in ("red", "blue", "green"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"in/{name}.png")
    return tmp_path / "in"


def packed_rows(model: Path, folder: Path, *rows: object, columns: Columns | None = None, **options: Any) -> Packing:
    """Pack rows of JSONL."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    return pack(model, out, read_files([folder / "rows.jsonl"], columns or Columns(), lambda _: None), **options)


def names_of(model: Path, output: Path) -> list[Names]:
    """Return the names of the tokens of all pairs, without the sign of a space."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [
        (
            [tokenizer.id_to_token(token).replace("▁", " ") for token in pair.source.tolist()],
            [tokenizer.id_to_token(token).replace("▁", " ") for token in pair.target.tolist()],
        )
        for pair in Packed.open(output, verify=True).pairs
    ]


def pairs(model: Path, folder: Path, *rows: object, columns: Columns | None = None, **options: Any) -> list[Names]:
    done = packed_rows(model, folder, *rows, columns=columns, flush=False, **options)
    assert done.index.skipped is None
    return names_of(model, done.output)


def images(folder: Path) -> list[list[bytes]]:
    return [[image.read().data for image in pair.images] for pair in Packed.open(folder.parent / "out").pairs]


def fault(model: Path, folder: Path, row: object, columns: Columns | None = None, **options: Any) -> str:
    """Return why a row is refused; its file and line are named."""
    with pytest.raises(DataError) as failed:
        packed_rows(model, folder, row, columns=columns, flush=False, **options)
    assert failed.value.where == f"{folder}/rows.jsonl:1"
    assert not (folder.parent / "out").exists()
    return failed.value.message


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


def test_input_and_target(model: Path, folder: Path) -> None:
    expected = [(["<bos>", *"ab c"], [*" d", "<eos>"])]
    assert pairs(model, folder, {"input": "ab c", "target": " d", "text": None}) == expected
    named = Columns(input="question", target="answer")
    assert pairs(model, folder, {"question": "ab c", "answer": " d", "text": "x"}, columns=named) == expected


def test_prompt_and_completion_as_texts(model: Path, folder: Path) -> None:
    assert pairs(model, folder, {"prompt": "<eos>\n", "completion": "x <bos>"}) == [
        (["<bos>", *"<eos>", "\n"], [*"x <bos>", "<eos>"])
    ]


def test_prompt_and_completion_as_messages(model: Path, folder: Path) -> None:
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    expected = [
        (
            ["<bos>", *USER, "a", *END, *MODEL, "b", *END, *USER, "c", *END, *MODEL],
            ["d", "<end_of_turn>", "<eos>"],
        )
    ]
    assert pairs(model, folder, row) == expected
    # Only the completion is learnt.
    assert pairs(model, folder, row, all_turns=True) == expected


def test_messages(model: Path, folder: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, user(" Hi\n"), assistant(" Hello \n")]}
    expected = [(["<bos>", *USER, *"Be brief.", "\n", "\n", *"Hi", *END, *MODEL], [*"Hello", "<end_of_turn>", "<eos>"])]
    assert pairs(model, folder, row) == expected
    row["messages"][0]["role"] = "developer"
    assert pairs(model, folder, row) == expected
    shared = {"chat": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    expected = [(["<bos>", *USER, "a", *END, *MODEL], ["b", "<end_of_turn>", "<eos>"])]
    assert pairs(model, folder, shared, columns=Columns(messages="chat")) == expected
    assert pairs(model, folder, {"conversations": shared["chat"]}) == expected
    assert pairs(model, folder, {"messages": [user("a"), {"role": "model", "content": "b"}]}) == expected


def test_every_turn_of_the_assistant(model: Path, folder: Path) -> None:
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    first = (["<bos>", *USER, "a", *END, *MODEL], ["b", "<end_of_turn>", "<eos>"])
    second = ([*first[0], "b", *END, *USER, "c", *END, *MODEL], ["d", "<end_of_turn>", "<eos>"])
    assert pairs(model, folder, row) == [second]
    assert pairs(model, folder, row, all_turns=True) == [first, second]
    (folder / "rows.jsonl").write_text(json.dumps(row))
    rows = read_files([folder / "rows.jsonl"], Columns(), lambda _: None)
    with pytest.raises(DataError, match=r"rows\.jsonl:1 \(message 4\): its input has 36 tokens, more than 35"):
        pack(model, folder.parent / "refused", rows, all_turns=True, max_input=35)


TURN = "2:<bos> 200:<start_of_turn> 89:u 87:s 73:e 86:r 202:\\n"
MODEL_TURN = "201:<end_of_turn> 202:\\n 200:<start_of_turn> 81:m 83:o 72:d 73:e 80:l 202:\\n"

SHOWN = [
    "pair 1: input 2, target 2", "  input   2:<bos> 69:a", "  target  70:b 1:<eos>",
    "pair 2: input 2, target 2", "  input   2:<bos> 71:c", "  target  72:d 1:<eos>",
    "pair 3: input 17, target 3", f"  input   {TURN} 73:e {MODEL_TURN}", "  target  74:f 201:<end_of_turn> 1:<eos>",
    "pair 4: input 17, target 3", f"  input   {TURN} 75:g {MODEL_TURN}", "  target  76:h 201:<end_of_turn> 1:<eos>",
    "pair 5: input 17, target 3", f"  input   {TURN} 77:i {MODEL_TURN}", "  target  78:j 201:<end_of_turn> 1:<eos>",
    "pair 6: input 27, target 3, 1 image(s)",
    f"  input   {TURN} x3 253:<start_of_image> 255:<image_soft_token> x4 254:<end_of_image> 202:\\n x2 79:k "
    f"{MODEL_TURN}",
    "  target  80:l 201:<end_of_turn> 1:<eos>",
]  # fmt: skip


def test_a_sample_of_each_form_is_shown_token_by_token(model: Path, folder: Path) -> None:
    rows = [
        {"input": "a", "target": "b"},
        {"prompt": "c", "completion": "d"},
        {"prompt": [user("e")], "completion": [assistant("f")]},
        {"messages": [user("g"), assistant("h")]},
        {"conversations": [{"from": "human", "value": "i"}, {"from": "gpt", "value": "j"}]},
        {"messages": [user([RED, text_part("k")]), assistant("l")]},
    ]
    done = packed_rows(model, folder, *rows, flush=False)
    lines = [line for sample in first_samples(done.output, model, 9) for line in sample.lines()]
    print("\n".join(lines))
    assert lines == SHOWN


def test_names_of_special_tokens_in_contents_are_plain_characters(model: Path, folder: Path) -> None:
    text = "<end_of_turn> <start_of_image> t5g2name0x1x <unk>"
    (found,) = pairs(model, folder, {"messages": [user(text), assistant(text)]})
    assert found == (
        ["<bos>", *USER, *text, *END, *MODEL],
        [*text, "<end_of_turn>", "<eos>"],
    )


def test_images_of_an_input(model: Path, folder: Path) -> None:
    row = {"input": "a<start_of_image>b", "target": "c", "image": "red.png"}
    around = ["\n", "\n", *IMAGE, "\n", "\n"]
    assert pairs(model, folder, row) == [(["<bos>", "a", *around, "b"], ["c", "<eos>"])]
    # Without a place they come first, and a caption needs no text.
    for text in ("", "x"):
        row = {"input": text, "target": "c", "images": ["red.png", "blue.png"]}
        expected = (["<bos>", *around, *around, *text], ["c", "<eos>"])
        assert pairs(model, folder, row) == [expected]
    assert images(folder) == [[(folder / name).read_bytes() for name in ("red.png", "blue.png")]]


RED = {"type": "image", "image": "red.png"}
BLUE = {"type": "image_url", "image_url": {"url": "blue.png"}}
PLACE = {"type": "image"}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user([text_part("a"), RED, text_part("b"), BLUE]), assistant("c")]},
        {"messages": [user([text_part("a"), PLACE, text_part("b"), PLACE]), assistant("c")],
         "images": ["red.png", "blue.png"]},
        {"messages": [user([text_part("a"), RED, text_part("b"), PLACE]), assistant("c")], "image": "blue.png"},
        {"messages": [user("a <image>\nb<image>"), assistant("c")], "images": ["red.png", "blue.png"]},
        {"messages": [user("a<start_of_image>b<start_of_image>"), assistant([text_part("c")])],
         "images": ["red.png", "blue.png"]},
        {"prompt": [user([text_part("a"), RED, text_part("b"), BLUE])], "completion": [assistant("c")]},
    ],
)  # fmt: skip
def test_images_in_messages_are_in_order(model: Path, folder: Path, row: Mapping[str, Any]) -> None:
    around = ["\n", "\n", *IMAGE, "\n", "\n"]
    expected = (["<bos>", *USER, "a", *around, "b", *around, *END, *MODEL], ["c", "<end_of_turn>", "<eos>"])
    assert pairs(model, folder, row) == [expected]
    assert images(folder) == [[(folder / name).read_bytes() for name in ("red.png", "blue.png")]]


def test_images_without_a_place_come_first_in_the_first_user_message(model: Path, folder: Path) -> None:
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "image": "red.png"}
    around = ["\n", "\n", *IMAGE, "\n", "\n"]
    first = ["<bos>", *USER, *around, "a", *END, *MODEL]
    assert [source for source, _ in pairs(model, folder, row, all_turns=True)] == [
        first, [*first, "b", *END, *USER, "c", *END, *MODEL],
    ]  # fmt: skip
    assert images(folder) == [[(folder / "red.png").read_bytes()]] * 2


def test_images_inside_a_message(model: Path, folder: Path) -> None:
    data = (folder / "red.png").read_bytes()
    part = {"type": "image_url", "image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    pairs(model, folder, {"messages": [user([part]), assistant("b")]})
    assert images(folder) == [[data]]
    wrong = {"type": "image_url", "image_url": {"url": "data:image/png;base64,=="}}
    assert "part 1 of message 1 (user) is not valid base64" in fault(
        model, folder, {"messages": [user([wrong]), assistant("b")]}
    )
    # Tables have all keys in all parts.
    rows = [
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "text": None, "image": {"bytes": data, "path": None}},
                {"type": "text", "text": "a", "image": None},
            ]},
            {"role": "assistant", "content": [{"type": "text", "text": "b", "image": None}]},
        ]}
    ]  # fmt: skip
    (folder / "tables").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), folder / "tables/rows.parquet")
    for number, read in enumerate([
        read_files([folder / "tables/rows.parquet"], Columns(), lambda _: None),
        read_dataset(str(folder / "tables"), "train", Columns()),
    ]):  # fmt: skip
        pack(model, folder / f"out{number}", read, flush=False)
        (pair,) = Packed.open(folder / f"out{number}").pairs
        assert [image.read().data for image in pair.images] == [data]
        (found,) = names_of(model, folder / f"out{number}")
        around = ["\n", "\n", *IMAGE, "\n", "\n"]
        assert found == (["<bos>", *USER, *around, "a", *END, *MODEL], ["b", "<end_of_turn>", "<eos>"])


def test_a_data_set_with_images_in_its_messages(model: Path, folder: Path) -> None:
    import datasets

    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    features = datasets.Features({"messages": [{"role": datasets.Value("string"), "content": [part]}]})
    data = (folder / "red.png").read_bytes()
    question = {**PLACE, "image": {"bytes": data, "path": None}, "text": None}
    messages = [user([question]), assistant([{**text_part("b"), "image": None}])]
    made = datasets.Dataset.from_list([{"messages": messages}], features=features)
    made.to_parquet(folder / "set/train.parquet")
    pack(model, folder.parent / "out", read_dataset(str(folder / "set"), "train", Columns()), flush=False)
    assert images(folder) == [[data]]
    assert [target for _, target in names_of(model, folder.parent / "out")] == [["b", "<end_of_turn>", "<eos>"]]


CSV = 'input,target,image\r\na,"b, ""c""\r\nd",\r\n,e,red.png\r\n'


def test_all_files_give_the_same_pairs(model: Path, folder: Path) -> None:
    import gzip

    rows = [{"input": "a", "target": 'b, "c"\r\nd', "image": None}, {"input": "", "target": "e", "image": "red.png"}]
    packed_rows(model, folder, *rows, flush=False)
    expected = contents(folder.parent / "out")
    (folder / "rows.csv").write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    (folder / "rows.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    for name in ("rows.csv", "rows.csv.gz", "rows.parquet"):
        pack(model, folder.parent / name, read_files([folder / name], Columns(), lambda _: None), flush=False)
        assert contents(folder.parent / name) == expected


def test_rows_of_a_csv_that_are_not_valid(folder: Path) -> None:
    def read(text: bytes, columns: Columns | None = None) -> list[str]:
        (folder / "a.csv").write_bytes(text)
        found = list(read_files([folder / "a.csv"], columns or Columns(), lambda _: None))
        return [
            f"{each.where.rpartition(':')[2]}: {each.reason}" if isinstance(each, Fault) else each.where[-1]
            for each in found
        ]

    assert read(b"") == []
    assert read(b"text\n\na\n") == ["3"]
    assert read(b'text,n\na,1\nb\nc,1,2\nd,2\n') == [
        "2", "3: has 1 fields, but the header has 2", "4: has 3 fields, but the header has 2", "5"
    ]  # fmt: skip
    assert read(b'text\n"c"d\ne\n') == ["2: is not valid CSV: ',' expected after '\"'", "3"]
    not_text = "is not UTF-8: invalid start byte at byte {} of the line"
    assert read(b'text\n"a\nb"\n\xff\ne\n') == ["2", f"4: {not_text.format(0)}", "5"]
    # The rest of a row with bytes that are no text is no row.
    assert read(b'input,target\na,"b \xff\nc, d"\ne,f\n') == [f"2: {not_text.format(5)}", "4"]
    for text, message in (
        (b"a,a\n", r"a\.csv:1: has the column 'a' twice"),
        (b"n\n1\n", r"a\.csv:1: has 'n', expected 'text', or 'input' and 'target'"),
        (b"\xff\n1\n", r"a\.csv:1: has no valid header: is not UTF-8"),
        (b'input,target\na,"b "c" d\ne, f"\ng,h\n', r"a\.csv:2: is not valid CSV: ',' expected after '\"'"),
        (b'text\na\n"b\nc', r"a\.csv:3: has a quote that is not closed"),
    ):
        with pytest.raises(DataError, match=message):
            read(text)
    with pytest.raises(DataError, match=r"a\.csv:1: has no column 'body', but 'n'"):
        read(b"n\n1\n", Columns(text="body"))


def test_a_parquet_file_with_two_columns_of_a_name_is_refused(folder: Path) -> None:
    columns = pa.table([["a"], ["b"], ["c"]], names=["input", "target", "input"])
    parquet.write_table(columns, folder / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has the column 'input' twice"):
        list(read_files([folder / "a.parquet"], Columns(), lambda _: None))


def test_values_nested_deeply_are_refused(model: Path, folder: Path) -> None:
    value: Any = []
    for _ in range(300):
        value = [value]
    row = {"messages": [{**user("a"), "extra": value}, assistant("b")]}
    assert "is nested more than 100 deep" in fault(model, folder, row)


def test_options_decide_between_forms(model: Path, folder: Path) -> None:
    row = {"text": "t", "input": "a", "target": "b", "messages": [user("c"), assistant("d")]}
    message = fault(model, folder, row)
    assert message == (
        "has 'text', and 'input' and 'target', and 'messages': choose with --column text or --input-column input "
        "--target-column target or --messages-column messages"
    )
    assert pairs(model, folder, row, columns=Columns(messages="messages"))[0][1][0] == "d"
    assert pairs(model, folder, row, columns=Columns(target="target"))[0][1][0] == "b"
    assert packed_rows(model, folder, row, columns=Columns(text="text"), flush=False).index.text.documents == 1
    # A form without values does not count.
    assert pairs(model, folder, {**row, "text": None, "messages": None})[0][1][0] == "b"
    assert fault(model, folder, {"question": "a", "answer": "b"}) == (
        "has 'answer', 'question', expected 'text', or 'input' and 'target', or 'prompt' and 'completion', or "
        "'messages', or 'conversations'; --column, --input-column and --target-column, or --messages-column name others"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "target": " "}, "'target' is empty: there is nothing to learn"),
        ({"input": "\n", "target": "b"},
         "'input' is empty; pack a text without an input as a document, with --column target"),
        ({"input": None, "target": "b"}, "'input' is null"),
        ({"input": "a", "target": 3}, "'target' is of type int"),
        ({"input": "a\0", "target": "b"}, "'input' contains NUL at character 1: it is not text"),
        ({"input": "a", "target": "\ud800"}, "'target' contains half of a surrogate pair"),
        ({"input": "a", "target": [assistant("b")]}, "only one of 'input' and 'target' is a list of messages"),
        ({"prompt": [], "completion": [assistant("b")]}, "'prompt' is empty"),
        ({"prompt": [user("a")], "completion": [user("b"), assistant("c")]},
         "'completion' has 2 messages, expected one of 'assistant'"),
        ({"prompt": [user("a")], "completion": [user("b")]},
         "ends with a message of 'user', expected one of 'assistant' to learn"),
        ({"input": "a<start_of_image>", "target": "b", "images": ["red.png", "red.png"]},
         "has 2 image(s), but <start_of_image> 1 time(s)"),
        ({"input": "a", "target": "b", "image": "none.png"}, "none.png is missing"),
        ({"messages": None}, "the messages are null"),
        ({"messages": "a"}, "the messages are of type str"),
        ({"messages": []}, "the list of messages is empty"),
        ({"messages": [None]}, "message 1 is null"),
        ({"messages": ["a"]}, "message 1 is of type str"),
        ({"messages": [{"content": "a"}]},
         "message 1 has the role None, expected one of system, developer, user, assistant, tool"),
        ({"messages": [{"role": "user"}, assistant("b")]}, "the content of message 1 (user) is null"),
        ({"messages": [user(" "), assistant("b")]}, "message 1 (user) is empty"),
        ({"messages": [user([]), assistant("b")]}, "message 1 (user) is empty"),
        ({"messages": [user("a"), assistant([text_part("\n")])]}, "message 2 (assistant) is empty"),
        ({"messages": [user(3), assistant("b")]}, "the content of message 1 (user) is of type int"),
        ({"messages": [user([3]), assistant("b")]}, "part 1 of message 1 (user) is of type int"),
        ({"messages": [user([{"type": "audio"}]), assistant("b")]},
         "part 1 of message 1 (user) has the type 'audio', expected 'text' or 'image'"),
        ({"messages": [user([{"type": "text"}]), assistant("b")]}, "the text of part 1 of message 1 (user) is null"),
        ({"messages": [user([PLACE]), assistant("b")]},
         "has 0 image(s) outside its messages, but 1 part(s) without an image"),
        ({"messages": [user([RED]), assistant("b")], "image": "red.png"},
         "has 1 image(s) outside its messages, but 0 part(s) without an image"),
        ({"messages": [user("<image>"), assistant("b")], "images": ["red.png"] * 2},
         "has 2 image(s), but <image> 1 time(s)"),
        ({"messages": [user([{"type": "image", "url": "https://x/y.png"}]), assistant("b")]},
         "part 1 of message 1 (user) is an address, which is not fetched; store the image with the data"),
        ({"messages": [user([{"type": "image", "image": "../x.png"}]), assistant("b")]},
         "the image '../x.png' is not a file below the folder of its file"),
        ({"messages": [user([{**RED, "path": "x"}]), assistant("b")]}, "part 1 of message 1 (user) has several images"),
        ({"messages": [user([{"type": "image_url"}]), assistant("b")]}, "part 1 of message 1 (user) has no address"),
        ({"messages": [user("a"), assistant([text_part("b"), RED])]}, "message 2 is to be learnt, but has an image"),
        ({"messages": [user("a")]}, "ends with a message of 'user', expected one of 'assistant' to learn"),
        ({"messages": [assistant("a")]}, "has only an answer, but no message before it"),
        ({"messages": [user("a"), user("b"), assistant("c")]},
         "the chat template fails: Conversation roles must alternate user/assistant/user/assistant/..."),
        ({"messages": [{"role": "system", "content": []}, user("b"), assistant("c")]},
         "the chat template fails: list object has no element 0"),
        ({"messages": [user("a"), {**assistant(None), "tool_calls": [{"name": "f"}]}]},
         "the chat template renders no text for message 2"),
        ({"messages": [user("a"), {**assistant("b"), "tool_calls": ["\0"]}]},
         "message 2 (assistant) contains NUL at character 0: it is not text"),
        ({"messages": [user("a"), assistant("b")], "tools": "f"}, "'tools' is of type str, expected a list"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_valid_is_refused_by_file_and_line(
    model: Path, folder: Path, row: object, message: str
) -> None:
    found = fault(model, folder, row)
    assert found.removeprefix(f"{folder}/") == message


def test_conversations_that_would_fill_the_memory_are_refused(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"messages": [user("a"), assistant("b")] * 40}
    assert len(pairs(model, folder, row, all_turns=True, truncate="input")) == 40
    monkeypatch.setattr(chat, "LONGEST", 2000)
    assert fault(model, folder, row, truncate="input").startswith("is longer than 2000 characters")
    monkeypatch.setattr(chat, "LONGEST", 1000)
    assert fault(model, folder, {"messages": [user("a"), assistant("b" * 999)]}).startswith("is longer than 1000")
    row = {"messages": [user("a"), assistant("b")] * 40}
    assert fault(model, folder, row, all_turns=True) == (
        "is too long for 40 pairs that each repeat all before them; split it"
    )


def with_template(model: Path, tmp_path: Path, template: str | None) -> Path:
    shutil.copytree(model, tmp_path / "other")
    path = tmp_path / "other/chat_template.jinja"
    if template is None:
        path.unlink()
    else:
        path.write_text(template)
    return tmp_path / "other"


def test_a_model_without_a_chat_template_has_no_conversations(model: Path, folder: Path, tmp_path: Path) -> None:
    other = with_template(model, tmp_path, None)
    with pytest.raises(DataError) as failed:
        packed_rows(other, folder, {"messages": [user("a"), assistant("b")]}, skip_bad=9)
    assert failed.value.message == f"is a conversation, but {other} has no chat template"
    assert failed.value.where == f"{folder}/rows.jsonl:1"
    assert len(pairs(other, folder, {"prompt": "a", "completion": "b"})) == 1
    (other / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="the chat template fails"):
        packed_rows(other, folder, {"messages": [user("a"), assistant("b")]}, skip_bad=9)


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # No bos, and no token at the end of a turn.
        (TURNS + "{% if add_generation_prompt %}assistant: {% endif %}",
         (["<bos>", *"user: a", "\n", *"assistant: "], ["b", "<eos>"])),
        # eos ends the turn.
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
         (["<bos>", "a", "<eos>"], ["b", "<eos>"])),
        # A tool is described.
        ("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}",
         (["<bos>", *'[{"name":', " ", *'"<eos>"}]a'], ["b", "<eos>"])),
        # The last turn is marked.
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}|{% endif %}{% endfor %}",
         "cannot be split before message 2: with it, the chat template renders other text before it"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "the chat template renders no text for message 2"),
        ("{{ eoi_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
         "the chat template renders the tokens inside an image itself"),
    ],
)  # fmt: skip
def test_other_templates(model: Path, folder: Path, tmp_path: Path, template: str, expected: Names | str) -> None:
    other = with_template(model, tmp_path, template)
    row = {"messages": [user("a"), assistant("b")], "tools": [{"name": "<eos>"}]}
    if isinstance(expected, str):
        assert fault(other, folder, row) == expected
    else:
        assert pairs(other, folder, row) == [expected]


def test_pairs_that_are_too_long(model: Path, folder: Path) -> None:
    rows = [
        {"input": "abcdef", "target": "x"},
        {"input": "ab", "target": "xyz"},
        {"input": "a<start_of_image>b", "target": "x", "image": "red.png"},
        {"input": "ok", "target": "x"},
    ]
    with pytest.raises(DataError) as failed:
        packed_rows(model, folder, *rows, max_input=5, max_target=3, flush=False)
    assert [line.partition("rows.jsonl:")[2] for line in failed.value.details] == [
        "1: its input has 7 tokens, more than 5",
        "2: its target has 4 tokens, more than 3",
        "3: its input has 13 tokens, more than 5",
    ]
    with pytest.raises(DataError, match="--truncate skip leaves such pairs out"):
        packed_rows(model, folder, *rows, max_input=5, max_target=3, flush=False)
    with pytest.raises(DataError, match=r"no document can be packed \(0 empty, 1 skipped\)"):
        packed_rows(model, folder, {"input": "a", "target": ""}, skip_bad=1, flush=False)
    done = packed_rows(model, folder, *rows, max_input=5, max_target=3, truncate="skip", flush=False)
    assert (done.index.pair.documents, done.index.pair.too_long, done.index.skipped) == (1, 3, None)
    assert done.to_json()["too_long"] == 3
    # The end of an input stays, after its bos; a part of an image does not.
    done = packed_rows(model, folder, *rows, max_input=5, max_target=4, truncate="input", flush=False)
    assert (done.index.pair.cut, done.index.pair.too_long, done.to_json()["cut"]) == (2, 0, 2)
    assert [source for source, _ in names_of(model, done.output)] == [
        ["<bos>", *"cdef"], ["<bos>", *"ab"], ["<bos>", "\n", "\n", "b"], ["<bos>", *"ok"],
    ]  # fmt: skip
    assert images(folder) == [[], [], [], []]
    done = packed_rows(model, folder, rows[2], max_input=10, truncate="input", flush=False)
    assert names_of(model, done.output)[0][0] == ["<bos>", *IMAGE, "\n", "\n", "b"]
    assert images(folder) == [[(folder / "red.png").read_bytes()]]
    assert "its target has 4 tokens" in fault(model, folder, rows[1], max_target=3, truncate="input")
    with pytest.raises(DataError, match=r"no document can be packed \(0 empty, 1 too long\)"):
        packed_rows(model, folder, rows[0], max_input=5, truncate="skip", flush=False)
    with pytest.raises(UsageError, match="--max-target is 513, but the model reads at most 512 tokens"):
        packed_rows(model, folder, rows[0], max_target=513)
    assert "its input has 601 tokens, more than 512" in fault(model, folder, {"input": "a" * 600, "target": "b"})


def test_an_input_of_which_nothing_stays_is_too_long(model: Path, folder: Path) -> None:
    row = PairDocument("a:1", ("a", 253), ("b",), (folder / "red.png",))
    with pytest.raises(DataError, match="a:1: its input ends with an image of more than 6 tokens"):
        pack(model, folder / "out", [row], max_input=6, truncate="input", flush=False)
    pack(model, folder / "out", [row], max_input=7, truncate="input", flush=False)
    assert names_of(model, folder / "out") == [(["<bos>", *IMAGE], ["b", "<eos>"])]


def test_the_bytes_do_not_depend_on_workers_and_batches(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t5g2convert.adaptation.data import document_batches

    rows: list[object] = [
        {"messages": [user(f"a{n}"), assistant("b" * n), user("c"), assistant("d")]} for n in range(1, 9)
    ]
    rows += [{"input": "x" * n, "target": "y"} for n in range(20, 50)] + [{"text": "z"}, {"input": "q"}]
    rows += [{"input": "<start_of_image>", "target": "y", "images": ["red.png"]}]
    options: dict[str, Any] = {"all_turns": True, "max_input": 40, "truncate": "skip", "skip_bad": 1, "flush": False}
    expected = packed_rows(model, folder, *rows, **options)
    assert (expected.index.pair.documents, expected.index.pair.too_long) == (8 + 4 + 20 + 1, 4 + 10)
    found = contents(folder.parent / "out")
    monkeypatch.setattr(document_batches, "BATCH_DOCUMENTS", 3)
    for workers in (0, 2):
        assert packed_rows(model, folder, *rows, **options, workers=workers).sha256 == expected.sha256
        assert contents(folder.parent / "out") == found


def test_appended_pairs_are_counted_together(model: Path, folder: Path) -> None:
    packed_rows(model, folder, {"input": "abcdef", "target": "x"}, max_input=4, truncate="input", flush=False)
    rows = [PairRow("a", "abcdef", "x"), PairRow("b", "ab", "xyz"), Document("c", "d")]
    done = pack(
        model, folder.parent / "out", rows, append=True, max_input=4, max_target=3, truncate="skip", flush=False
    )
    index = done.index
    assert (index.pair.documents, index.pair.cut, index.pair.too_long, index.text.documents) == (1, 1, 2, 1)


def test_a_faulty_worker_result_is_passed_on_as_it_is() -> None:
    import pickle

    found = pickle.loads(pickle.dumps(document_encoder.TooLong("a:1", "too long")))
    assert isinstance(found, document_encoder.TooLong)
    assert found == document_encoder.TooLong("a:1", "too long")


@pytest.mark.parametrize("key", ["system", "instruction"])
def test_what_stands_beside_a_pair_is_never_lost_in_silence(key: str) -> None:
    row = {"input": "a", "target": "b", key: "c"}
    fault = row_of("f:1", row, Columns(), None)
    assert isinstance(fault, Fault)
    assert fault.reason.startswith(f"has {key!r} beside 'input' and 'target', which is not read")
    assert isinstance(row_of("f:1", row, Columns(input="input"), None), PairRow)
    assert isinstance(row_of("f:1", {**row, key: ""}, Columns(), None), PairRow)


def test_a_system_message_may_stand_outside_the_messages() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = row_of("f:1", {"conversations": turns, "system": "c"}, Columns(), None)
    assert isinstance(row, ChatRow)
    assert row.conversation.messages[0] == {"role": "system", "content": "c"}
    assert row_of("f:1", {"conversations": turns, "system": " "}, Columns(), None) == row_of(
        "f:1", {"conversations": turns}, Columns(), None
    )
    for both in ({"from": "system", "value": "d"}, {"role": "system", "content": "d"}):
        fault = row_of("f:1", {"conversations": [both, *turns], "system": "c"}, Columns(), None)
        assert isinstance(fault, Fault)
        assert fault.reason == "has 'system', and a message with this role"
    assert isinstance(row_of("f:1", {"conversations": turns, "system": 3}, Columns(), None), Fault)


def test_nulls_in_arguments_are_kept_from_json_and_left_out_from_tables(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"x": None, "y": [1, None]}}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    found = {}
    for name in ("rows.jsonl", "rows.parquet"):
        (chat,) = read_files([tmp_path / name], Columns(), lambda _: None)
        assert isinstance(chat, ChatRow)
        found[name] = chat.conversation.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert found == {"rows.jsonl": {"x": None, "y": [1, None]}, "rows.parquet": {"y": [1, None]}}
