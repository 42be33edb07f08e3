"""Text from outside, wherever a command reads it: it controls no terminal, page or log."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
import yaml

from t5g2convert import convert
from t5g2convert.checkpoint.file_names import INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest, seal
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.mapping.library import mappings_folder
from tests.cli.commandline import CommandLine, Result, unsafe

pytestmark = pytest.mark.sampled

PAYLOADS: Final = {
    # Colours, a window title, a link, C1, bell and backspaces, NUL, bidi, the other line ends, what has no width.
    "controls": "\x1b[31mred\x1b]0;title\x07\x1b]8;;https://example.org\x1b\\x\x9b31m\x85\x08\x7f\x0b\x0c\t\x00\u202egpj"
    "\u202c\u2066\u2069\u200f\u2028\u2029\u200b\u200c\u200d\u2060\ufeff\u00ad",
    "line": "one\nt5g2: two\r\nnote: three\rfour",
    "half-pair": "a\ud800b\udc80",
    "markup": "[bold red]x[/] [link=https://example.org]y[/link] [/nonsense] [/] [ "
    '<script>alert("1")</script> \']]> &lt; <!--',
}

Record = Callable[[str, object], None]


class Terminals(CommandLine):
    """Run `t5g2` with a pipe, a narrow and a wide terminal, as text, as JSON and with traceback.

    The terminals have no colours, so any escape shows; stderr is not a terminal, so no progress is drawn.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(capsys)
        self.monkeypatch = monkeypatch
        self.turn = 0
        self.count = 0

    def harmless(self, *call: str | Path) -> Result:
        """Run once; no text from outside may take effect."""
        width = (None, "20", "240")[self.turn % 3]
        choices: list[list[str]] = [[], ["--debug"], ["--json"]]
        options = choices[self.turn // 3 % (2 if call[0] in ("generate", "demo") else 3)]
        self.turn += 1
        self.count += 1
        with self.monkeypatch.context() as patch:
            if width is not None:
                patch.setenv("COLUMNS", width)
                patch.setenv("TERM", "dumb")
                patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
                patch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
            result = self(*call, *options)
        shown = (call, options, width, result)
        assert result.code in (0, 2, 3, 4, 5, 6), shown
        assert "a bug in t5g2" not in result.err, shown
        assert unsafe(result.out + result.err) == set(), shown
        # Generated text may have line ends; a line break from outside must not start a line like ours.
        for line in (result.err if call[0] == "generate" else result.out + result.err).splitlines():
            assert not line.startswith(("t5g2: two", "note: three", "four")), shown
        if options == ["--json"]:
            assert isinstance(json.loads(result.out), dict), shown
            assert result.out.isascii(), shown
        if call[0] == "convert" and call[1] != call[2]:
            shutil.rmtree(call[2], ignore_errors=True)
        return result


@pytest.fixture
def t5g2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> Iterator[Terminals]:
    runner = Terminals(capsys, monkeypatch)
    yield runner
    record_property("hostile_texts", runner.count)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a source and its conversion; do not change them."""
    folder = tmp_path_factory.mktemp("sound")
    build_demo_source(folder / "source")
    convert(folder / "source", folder / "out", flush=False)
    (folder / "text.txt").write_text("a text to be read")
    return folder


@pytest.fixture
def work(sound: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may change."""
    return shutil.copytree(sound, tmp_path / "work")


def source_calls(work: Path, source: Path | None = None) -> list[list[str | Path]]:
    source = source or work / "source"
    return [
        ["inspect", source, "--tensors"],
        ["plan", source, "--tensors"],
        ["convert", source, work / "new"],
        ["mappings", "check", "gemma3", "--against", source],
    ]


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = (folder / SINGLE_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    change(document)
    path.write_text(json.dumps(document))


UP: Final = "language_model.model.layers.0.mlp.up_proj.weight"


def config(*path: str, whole: Callable[[str], Any] = lambda payload: payload) -> Callable[[Path, str], None]:
    def change(source: Path, payload: str) -> None:
        def edit(document: dict[str, Any]) -> None:
            node = document
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = whole(payload)

        edit_json(source / "config.json", edit)

    return change


def index_of(tensor: Callable[[str], str], shard: Callable[[str], Any]) -> Callable[[Path, str], None]:
    def change(source: Path, payload: str) -> None:
        (source / INDEX_FILE).write_text(json.dumps({"weight_map": {tensor(payload): shard(payload)}}))
        (source / SINGLE_FILE).rename(source / "one.safetensors")

    return change


def renamed_file(source: Path, payload: str) -> None:
    """Rename the weights to a name that only an index allows."""
    name = payload.replace("/", "|").replace("\\", "|").replace("\0", "0") + ".safetensors"
    name = os.fsdecode(name.encode(errors="surrogatepass").replace(b"\xed\xa0\x80", b"\xff").replace(b"\xed\xb2", b""))
    header = json.loads((source / SINGLE_FILE).read_bytes()[8:].partition(b"}}")[0] + b"}}")
    names = [tensor for tensor in header if tensor != "__metadata__"]
    (source / SINGLE_FILE).rename(source / name)
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))


SOURCE_FIELDS: Final[dict[str, Callable[[Path, str], None]]] = {
    "tensor": lambda source, payload: edit_header(source, lambda header: header.update({payload: header.pop(UP)})),
    "tensor-suffix": lambda source, payload: edit_header(
        source, lambda header: header.update({UP + payload: header.pop(UP)})
    ),
    "lora": lambda source, payload: edit_header(
        source, lambda header: header.update({f"{payload}lora_A": header.pop(UP)})
    ),
    "dtype-of-tensor": lambda source, payload: edit_header(source, lambda header: header[UP].update(dtype=payload)),
    "shape-of-tensor": lambda source, payload: edit_header(source, lambda header: header[UP].update(shape=[payload])),
    "offsets": lambda source, payload: edit_header(
        source, lambda header: header[UP].update(data_offsets=[payload] * 2)
    ),
    "entry-key": lambda source, payload: edit_header(source, lambda header: header[UP].update({payload: 1})),
    "metadata": lambda source, payload: edit_header(
        source, lambda header: header.update(__metadata__={"format": "pt", payload[:3] + "key": payload})
    ),
    "model_type": config("model_type"),
    "architectures": config("architectures", whole=lambda payload: [payload]),
    "torch_dtype": config("torch_dtype"),
    "_name_or_path": config("_name_or_path"),
    "transformers_version": config("transformers_version"),
    "any-key": lambda source, payload: config(payload)(source, payload),
    "any-key-of-text": lambda source, payload: config("text_config", payload)(source, payload),
    "hidden_activation": config("text_config", "hidden_activation"),
    "hidden_act": config("vision_config", "hidden_act"),
    "hidden_size": config("text_config", "hidden_size"),
    "layer_types": config("text_config", "layer_types", whole=lambda payload: [payload] * 8),
    "pattern": config("text_config", "sliding_window_pattern"),
    "rope-type": config("text_config", "rope_scaling", "rope_type"),
    "rope-parameters": config("text_config", "rope_parameters", "sliding_attention", "rope_type"),
    "rope-theta": config("text_config", "rope_theta"),
    "eos-of-generation": lambda source, payload: edit_json(
        source / "generation_config.json", lambda document: document.update(eos_token_id=payload)
    ),
    "index-tensor": index_of(lambda payload: payload, lambda payload: "one.safetensors"),
    "index-shard": index_of(lambda payload: "a.weight", lambda payload: f"{payload}.safetensors"),
    "index-path": index_of(lambda payload: payload, lambda payload: f"../{payload}"),
    "index-list": index_of(lambda payload: payload, lambda payload: [payload]),
    "file-name": renamed_file,
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("field", SOURCE_FIELDS)
def test_T1_text_of_a_source_is_never_obeyed(field: str, payload: str, t5g2: Terminals, work: Path) -> None:
    SOURCE_FIELDS[field](work / "source", PAYLOADS[payload])
    t5g2.turn = list(PAYLOADS).index(payload) + 4 * list(SOURCE_FIELDS).index(field)
    for call in source_calls(work):
        t5g2.harmless(*call)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("field", ["tensor-suffix", "hidden_activation", "any-key"])
def test_T1_text_of_a_source_is_never_obeyed_by_computing_commands(
    field: str, payload: str, t5g2: Terminals, work: Path
) -> None:
    SOURCE_FIELDS[field](work / "source", PAYLOADS[payload])
    t5g2.turn = list(PAYLOADS).index(payload)
    t5g2.harmless("convert", work / "source", work / "new", "--verify")
    t5g2.harmless("compare", work / "source", work / "out", "--text", work / "text.txt")
    judge(t5g2, work)


def judge(t5g2: Terminals, work: Path) -> None:
    """Verify with all reports; the reports must stay well-formed."""
    html, junit = work / "x.html", work / "x.xml"
    call: list[str | Path] = ["verify", work / "out", "--source", work / "source"]
    t5g2.harmless(*call, "--junit", junit, "--html", html)
    if html.exists():
        assert_sound_reports(html, junit)
    # The result was recorded, or the manifest is unchanged.
    json.loads((work / "out" / MANIFEST_FILE).read_text())


def assert_sound_reports(html: Path, junit: Path) -> None:
    ElementTree.parse(junit)
    page = html.read_text(encoding="utf-8")
    # The page has its own stylesheet and line ends.
    assert unsafe(page + junit.read_text(encoding="utf-8")) == set()
    assert set(re.findall(r"</?([a-zA-Z!][\w-]*)", page)) <= OUR_TAGS
    assert not re.search(r"<[^>]*\s(src|href|on\w+)\s*=", page)


OUR_TAGS: Final = {
    "!doctype", "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "code", "table", "thead", "tbody",
    "tr", "th", "td", "details", "summary", "ul", "li", "svg", "line", "rect", "text", "g", "small",
}  # fmt: skip


# Text of the output: tensors, settings, manifest and tokenizer


def reseal(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((output / MANIFEST_FILE).read_text())
    change(document)
    try:
        (output / MANIFEST_FILE).write_bytes(seal(document))
    except UnicodeEncodeError:
        (output / MANIFEST_FILE).write_text(json.dumps(document))


def tokenizer(output: Path, payload: str) -> None:
    def change(document: dict[str, Any]) -> None:
        vocabulary = document["model"]["vocab"]
        document["model"]["vocab"] = {
            (f"{payload}{number}" if number > 3 and number < 253 else token): number
            for token, number in vocabulary.items()
        }

    edit_json(output / "tokenizer.json", change)


OUTPUT_FIELDS: Final[dict[str, Callable[[Path, str], None]]] = {
    "tensor": lambda output, payload: edit_header(
        output, lambda header: header.update({payload: header.pop("model.decoder.norm.weight")})
    ),
    "metadata": lambda output, payload: edit_header(
        output, lambda header: header.update(__metadata__={"format": payload})
    ),
    "config-key": lambda output, payload: edit_json(
        output / "config.json", lambda document: document.update({payload: 1})
    ),
    "config-value": lambda output, payload: edit_json(
        output / "config.json", lambda document: document["decoder"].update(hidden_activation=payload)
    ),
    "family": lambda output, payload: reseal(output, lambda document: document["source"].update(family=payload)),
    "layout": lambda output, payload: reseal(
        output, lambda document: document["source"].update(layout={payload: payload})
    ),
    "notes": lambda output, payload: reseal(output, lambda document: document.update(notes=[payload])),
    "mapping": lambda output, payload: reseal(output, lambda document: document["mapping"].update(name=payload)),
    "dropped": lambda output, payload: reseal(
        output, lambda document: document.update(dropped=[{"name": payload, "because": payload}])
    ),
    "changes": lambda output, payload: reseal(
        output,
        lambda document: document.update(
            changes=[
                {"field": "decoder.sliding_window", "source": payload, "target": payload},
                {"field": payload, "source": payload, "target": payload},
            ]
        ),
    ),
    "cast": lambda output, payload: reseal(
        output,
        lambda document: document.update(changes=[{"field": "dtype", "source": payload, "target": "float32"}]),
    ),
    "files": lambda output, payload: reseal(
        output, lambda document: document["files"].update({payload: {"bytes": 1, "sha256": payload}})
    ),
    "tool": lambda output, payload: reseal(output, lambda document: document["tool"].update(name=payload)),
    "verification": lambda output, payload: reseal(
        output, lambda document: document.update(verification={payload: payload})
    ),
    "unknown-key": lambda output, payload: reseal(output, lambda document: document.update({payload: payload})),
    "tokenizer": tokenizer,
    "tokenizer-broken": lambda output, payload: edit_json(
        output / "tokenizer.json", lambda document: document["model"].update(type=payload)
    ),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("field", OUTPUT_FIELDS)
def test_T1_text_of_an_output_is_never_obeyed(field: str, payload: str, t5g2: Terminals, work: Path) -> None:
    text = PAYLOADS[payload]
    OUTPUT_FIELDS[field](work / "out", text)
    t5g2.turn = list(PAYLOADS).index(payload) + list(OUTPUT_FIELDS).index(field)
    judge(t5g2, work)
    t5g2.harmless("inspect", work / "out", "--tensors")
    if field.startswith(("tokenizer", "config")):
        t5g2.harmless("generate", work / "out", "--prompt", f"x{text}", "--max-new-tokens", "3")
        t5g2.harmless("compare", work / "source", work / "out", "--text", work / "text.txt")


# Maps


def map_fields(payload: str) -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    yield "title", lambda document: document.update(title=payload)
    yield "name", lambda document: document.update(name=payload)
    yield "because", lambda document: document["drop"][0].update(because=payload)
    yield "drop-from", lambda document: document["drop"][0].update({"from": payload})
    yield "from", lambda document: document["weights"][-1].update({"from": payload})
    yield "root", lambda document: document["weights"][0].update({"from": f"{{{payload}}}x"})
    yield "spelling", lambda document: document["roots"]["text"].append(payload)
    yield "root-name", lambda document: document["roots"].update({payload: [payload]})
    yield "to", lambda document: document["weights"][0]["to"].update(embedding=payload)
    yield "part", lambda document: document["weights"][0]["to"].update({payload: payload})
    yield "tied", lambda document: document["weights"][0].update(tied=[payload])
    yield "symbol", lambda document: document["weights"][0].update(shape=[payload, payload])
    yield "op", lambda document: document["weights"][0].update(op={payload: payload})
    yield "when", lambda document: document["weights"][0].update(when=payload)
    yield "key", lambda document: document.update({payload: payload})
    yield "value", lambda document: document["config"].update({payload: f"${payload}"})
    yield "setting", lambda document: document["config"].update({payload: payload})
    yield "model-type", lambda document: document["source"].update(model_type=[payload])
    yield "architecture", lambda document: document["target"].update(architecture=payload)
    yield "carry", lambda document: document["files"].update(carry=[payload])
    yield "moved", lambda document: document["vocabulary"].update(moved={payload: 1})


def write_map(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, which is YAML and can escape any character; a lone surrogate stays unescaped."""
    path.write_text(json.dumps(document))


@pytest.mark.slow
@pytest.mark.parametrize("payload", PAYLOADS)
def test_T1_text_of_a_map_is_never_obeyed(payload: str, t5g2: Terminals, work: Path) -> None:
    good = yaml.safe_load((mappings_folder() / "gemma3.yaml").read_text())
    path = work / "mine.yaml"
    faults = []
    for field, change in map_fields(PAYLOADS[payload]):
        document = json.loads(json.dumps(good))
        document["vocabulary"]["cut"] = {}
        change(document)
        write_map(path, document)
        for call in (
            ["mappings", "show", path],
            ["mappings", "check", path, "--against", work / "source"],
            ["convert", work / "source", work / "new", "--mapping", path],
        ):
            try:
                t5g2.harmless(*call)
            except AssertionError as error:
                faults.append(f"{field} in {call[0]}: {error}")
    assert "\n\n".join(faults) == ""


# Names of folders and files, and arguments


@pytest.mark.parametrize("payload", PAYLOADS)
def test_T1_names_are_never_obeyed(payload: str, t5g2: Terminals, work: Path) -> None:
    name = PAYLOADS[payload].replace("/", "|").replace("\0", "0").replace("\ud800", "\udcff")
    odd = work / name
    odd.mkdir()
    (work / "source").rename(odd / name)
    shutil.copy(mappings_folder() / "gemma3.yaml", odd / f"{name}.yaml")
    (odd / f"{name}-bad.yaml").write_text("format: 2\n")
    (odd / f"{name}-tag.yaml").write_text("a: !x y\n")
    calls = source_calls(work, odd / name)
    calls += [
        ["convert", odd / name, odd / "new"],
        ["convert", odd / name, odd / name],
        ["plan", odd / name, "--mapping", odd / f"{name}.yaml"],
        *(["mappings", "check", odd / f"{name}{end}.yaml"] for end in ("-bad", "-tag", "-gone")),
        ["mappings", "show", name],
        ["inspect", odd / "gone"],
        ["inspect", odd / f"{name}.yaml"],
        ["plan", odd / name, f"--{name}"],
        ["plan", odd / name, "--dtype", name],
        ["plan", odd / name, "--max-shard-size", name],
        ["plan", odd / name, "--mapping", "gemma3", "--output", odd / "gone"],
        [name],
        ["mappings", name],
        ["verify", work / "out", "--mapping", name],
        ["verify", work / "out", "--text", odd / name, "--source", odd / name],
        ["verify", work / "out", "--image", odd / f"{name}.yaml", "--source", odd / name],
        ["verify", work / "out", "--junit", odd / name],
        ["compare", odd / name, work / "out", "--text", odd / "gone"],
        ["generate", odd / "gone", "--prompt", name],
        ["generate", work / "out", "--prompt", name, "--image", odd / "gone"],
    ]
    faults = []
    for call in calls:
        try:
            t5g2.harmless(*call)
        except AssertionError as error:
            faults.append(f"{call[0]}: {error}")
    assert "\n\n".join(faults) == ""


@pytest.mark.parametrize("payload", PAYLOADS)
def test_T1_a_name_is_never_obeyed_by_the_demo_and_the_verification(payload: str, t5g2: Terminals, work: Path) -> None:
    name = PAYLOADS[payload].replace("/", "|").replace("\0", "0").replace("\ud800", "\udcff")
    (work / "out").rename(work / name)
    (work / name / "below").mkdir()
    t5g2.harmless("demo", "--out", work / name / "below")
    shutil.rmtree(work / name / "below")
    html, junit = work / "x.html", work / "x.xml"
    for options in ([], ["--source", work / "source"]):
        t5g2.harmless("verify", work / name, *options, "--html", html, "--junit", junit)
        assert_sound_reports(html, junit)
    assert read_manifest(work / name).document()["verification"]["passed"] is True
