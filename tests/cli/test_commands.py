import hashlib
import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from jsonschema import Draft202012Validator
from safetensors import safe_open

from t5g2convert.conversion.write.resources import ASSET_BYTES
from t5g2convert.mapping.library import mappings_folder
from tests.cli.commandline import CommandLine, Result
from tests.conftest import TwinFolder
from tests.folders import contents

PARTS: Final = ["embedding", "encoder", "decoder", "vision", "projector"]
WIDTHS: Final = {"BF16": 2, "F16": 2, "F32": 4}


class Successful(CommandLine):
    """Run `t5g2` and require success."""

    def __call__(self, *arguments: str | Path) -> Result:
        result = super().__call__(*arguments)
        assert result.code == 0, result.err
        assert [line for line in result.err.splitlines() if not line.startswith("note: ")] == []
        return result

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        result = self(*arguments, "--json")
        assert result.err == "", "with --json the notes are in the document"
        return dict(json.loads(result.out))


@pytest.fixture
def t5g2(capsys: pytest.CaptureFixture[str]) -> Successful:
    return Successful(capsys)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    document = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    document.pop("__metadata__")
    return dict(document)


def by_part(tensors: list[dict[str, Any]]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for tensor in tensors:
        counted[tensor["part"]] += prod(tensor["shape"])
    return dict(counted)


def assert_sound_parameters(parameters: dict[str, int]) -> None:
    assert list(parameters) == [*PARTS, "total"]
    assert parameters["total"] == sum(parameters[part] for part in PARTS) > 0


# inspect


def test_inspect_json_counts_what_the_headers_say(t5g2: Successful, demo_source: Path) -> None:
    document = t5g2.json("inspect", demo_source, "--tensors")
    assert document["family"] == "gemma3"
    assert_sound_parameters(document["parameters"])
    stored = header(demo_source / "model.safetensors")
    assert {item["name"]: item["shape"] for item in document["tensors"]} == {
        name: entry["shape"] for name, entry in stored.items()
    }
    assert document["parameters"]["total"] == sum(prod(entry["shape"]) for entry in stored.values())
    assert {part: count for part, count in document["parameters"].items() if count and part != "total"} == by_part(
        document["tensors"]
    )
    assert document["dtypes"] == {"BF16": document["parameters"]["total"]}
    size = (demo_source / "model.safetensors").stat().st_size
    assert document["files"] == [{"name": "model.safetensors", "bytes": size}]
    assert document["missing"] == document["unexpected"] == []
    assert document["config"]["sliding_window"] == 16
    assert document["config"]["layer_types"].count("full_attention") == 1


def test_inspect_json_lists_tensors_only_on_request(t5g2: Successful, demo_source: Path) -> None:
    assert "tensors" not in t5g2.json("inspect", demo_source)


def test_inspect_says_which_part_each_tensor_belongs_to(t5g2: Successful, demo_source: Path) -> None:
    parts = {item["name"]: item["part"] for item in t5g2.json("inspect", demo_source, "--tensors")["tensors"]}
    assert parts["language_model.model.embed_tokens.weight"] == "embedding"
    assert parts["language_model.model.layers.0.mlp.up_proj.weight"] == "decoder"
    assert parts["multi_modal_projector.mm_input_projection_weight"] == "projector"
    vision = {part for name, part in parts.items() if name.startswith("vision_tower.")}
    assert vision == {"vision"}


def test_inspect_reads_what_convert_wrote(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    done = t5g2.json("convert", demo_source, tmp_path / "out")
    document = t5g2.json("inspect", tmp_path / "out")
    assert document["family"] == "t5gemma2"
    assert document["parameters"] == done["parameters"]
    assert document["missing"] == document["unexpected"] == []
    assert sum(file["bytes"] for file in document["files"]) == done["bytes"]


def test_inspect_reports_a_lost_tensor_instead_of_refusing(t5g2: Successful, demo_source: Path) -> None:
    config = json.loads((demo_source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (demo_source / "config.json").write_text(json.dumps(config))
    document = t5g2.json("inspect", demo_source)
    assert len(document["missing"]) == 13
    assert all("layers.8." in name for name in document["missing"])
    assert "missing: language_model.model.layers.8.input_layernorm.weight\n" in t5g2("inspect", demo_source).out


def test_inspect_for_people_names_family_parts_and_numbers(t5g2: Successful, demo_source: Path) -> None:
    out = t5g2("inspect", demo_source).out
    total = t5g2.json("inspect", demo_source)["parameters"]["total"]
    assert f"gemma3 in {demo_source}" in out
    for part in (*PARTS, "total"):
        assert f"\n {part} " in out
    assert f"{total:,}" in out
    assert "1 full_attention" in out
    assert "layers.0.self_attn.q_proj.weight" not in out
    listed = t5g2("inspect", demo_source, "--tensors").out
    assert all(name in listed for name in header(demo_source / "model.safetensors"))


# plan


def test_a_plan_names_the_checkpoints_and_computed_tensors(t5g2: Successful, twin_folder: TwinFolder) -> None:
    shown = t5g2("plan", twin_folder("text-8"), "--vision-from", twin_folder("donor-wide"), "--tensors").out
    assert "made from config.json of donor-wide" in " ".join(shown.split())
    assert "vision_from/" not in shown.partition("Files")[2].partition("needs")[0]
    assert "zeros (zeros)" not in shown
    assert "downloads" not in shown


@pytest.mark.parametrize("size", ["5GB", "100kB"])
def test_plan_json_is_consistent(t5g2: Successful, demo_source: Path, size: str) -> None:
    document = t5g2.json("plan", demo_source, "--max-shard-size", size)
    assert {"output", "mapping", "tensors", "bytes", "shards", "parameters"} <= document.keys()
    assert document["mapping"] == "gemma3"
    assert_sound_parameters(document["parameters"])
    assert {part: document["parameters"][part] for part in PARTS} == by_part(document["tensors"])
    assert document["bytes"] == sum(shard["bytes"] for shard in document["shards"])
    assert document["disk_needed"] == document["bytes"] + ASSET_BYTES
    assert document["download"] == 0
    shards = {shard["name"]: shard["bytes"] for shard in document["shards"]}
    assert len(shards) == len(document["shards"]) == (1 if size == "5GB" else 9)
    for name, end in shards.items():
        spans = sorted((item["start"], item["end"]) for item in document["tensors"] if item["shard"] == name)
        assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
        assert spans[-1][1] == end
    for item in document["tensors"]:
        assert {"name", "part", "dtype", "shape", "shard", "from"} <= item.keys()
        assert item["end"] - item["start"] == prod(item["shape"]) * WIDTHS[item["dtype"]]


def test_plan_json_names_the_source_of_every_tensor(t5g2: Successful, demo_source: Path) -> None:
    document = t5g2.json("plan", demo_source)
    stored = header(demo_source / "model.safetensors")
    assert {item["from"] for item in document["tensors"]} == set(stored)
    uses = Counter(item["from"] for item in document["tensors"])
    assert uses["language_model.model.layers.3.mlp.up_proj.weight"] == 2
    assert uses["multi_modal_projector.mm_soft_emb_norm.weight"] == 1


def test_plan_writes_nothing(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    before = contents(demo_source)
    t5g2("plan", demo_source, "--output", tmp_path / "new/out")
    assert contents(demo_source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo-source"]


def test_plan_for_people_names_parts_files_and_needs(t5g2: Successful, demo_source: Path) -> None:
    out = t5g2("plan", demo_source, "--max-shard-size", "100kB").out
    for part in (*PARTS, "total"):
        assert f"\n {part} " in out
    assert "merged attention over [decoder states; encoder output]" in out
    assert all(f"model-0000{number}-of-00009.safetensors" in out for number in range(1, 10))
    assert "tokenizer.json" in out
    assert "of disk" in out


def test_plan_for_people_lists_every_tensor_by_its_whole_name(t5g2: Successful, demo_source: Path) -> None:
    document = t5g2.json("plan", demo_source)
    listed = t5g2("plan", demo_source, "--tensors").out
    assert [item["name"] for item in document["tensors"] if f" {item['name']} " not in listed] == []
    assert [item["from"] for item in document["tensors"] if f" {item['from']} " not in listed] == []
    assert "(scaled_row)" in listed


# convert


@pytest.mark.parametrize("size", ["5GB", "100kB"])
def test_convert_json_matches_the_files_on_disk(t5g2: Successful, demo_source: Path, tmp_path: Path, size: str) -> None:
    output = tmp_path / "out"
    planned = t5g2.json("plan", demo_source, "--max-shard-size", size)
    document = t5g2.json("convert", demo_source, output, "--max-shard-size", size)
    assert {"output", "mapping", "tensors", "bytes", "shards", "parameters"} <= document.keys()
    assert document["output"] == str(output)
    assert document["mapping"] == "gemma3"
    assert_sound_parameters(document["parameters"])
    assert document["parameters"] == planned["parameters"]
    names = [shard["name"] for shard in document["shards"]]
    assert names == [shard["name"] for shard in planned["shards"]]
    assert set(names) == {path.name for path in output.glob("*.safetensors")}
    assert document["bytes"] == planned["bytes"] == sum((output / name).stat().st_size for name in names)
    assert all(shard["sha256"] == digest(output / shard["name"]) for shard in document["shards"])
    written = {name: entry for shard in names for name, entry in header(output / shard).items()}
    assert document["tensors"] == len(written) == len(planned["tensors"])
    assert document["parameters"]["total"] == sum(prod(entry["shape"]) for entry in written.values())


def test_convert_for_people_names_parts_and_the_folder(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    result = t5g2("convert", demo_source, tmp_path / "out")
    for part in (*PARTS, "total"):
        assert f"\n {part} " in result.out
    assert f"wrote 251 tensors, 874.86 kB in 1 file(s), to {tmp_path / 'out'} in " in result.out
    assert result.err == ""


def test_notes_go_to_stderr_and_into_the_json(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    config = json.loads((demo_source / "config.json").read_text())
    config["written_by"] = "hand"
    (demo_source / "config.json").write_text(json.dumps(config))
    note = "config.json: settings left behind: written_by (unknown)"
    plain = t5g2("convert", demo_source, tmp_path / "one")
    assert plain.err == f"note: {note}\n"
    assert note not in plain.out
    assert t5g2.json("convert", demo_source, tmp_path / "two")["notes"] == [note]
    assert t5g2("plan", demo_source).err == f"note: {note}\n"


def test_no_hash_writes_the_same_weights_and_no_sha256(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    t5g2("convert", demo_source, tmp_path / "one")
    document = t5g2.json("convert", demo_source, tmp_path / "two", "--no-hash")
    assert [shard["sha256"] for shard in document["shards"]] == [None]
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    manifest = json.loads(two.pop("t5g2.json"))
    assert json.loads(one.pop("t5g2.json"))["files"].keys() == manifest["files"].keys()
    assert one.pop("README.md") != two.pop("README.md")
    assert one == two
    assert {facts["sha256"] for facts in manifest["files"].values()} == {None}


def test_no_flush_writes_the_same_and_waits_for_no_disk(
    t5g2: Successful, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t5g2("convert", demo_source, tmp_path / "one")
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    t5g2("convert", demo_source, tmp_path / "two", "--no-flush")
    assert flushed == []
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    t5g2("convert", demo_source, tmp_path / "three")
    assert len(flushed) >= len(contents(tmp_path / "three")) + 2, "every file, the folder and its parent"


def test_many_shards_have_a_complete_index(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    t5g2("convert", demo_source, output, "--max-shard-size", "100kB")
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00009.safetensors" for number in range(1, 10)]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    held = {name: shard for shard in shards for name in header(output / shard)}
    assert index["weight_map"] == held
    sizes = {
        shard: sum(prod(entry["shape"]) * WIDTHS[entry["dtype"]] for entry in header(output / shard).values())
        for shard in shards
    }
    assert max(sizes.values()) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    t5g2("convert", demo_source, tmp_path / "one")
    with safe_open(tmp_path / "one/model.safetensors", "np") as whole:
        assert set(whole.keys()) == set(held)
    assert not (tmp_path / "one/model.safetensors.index.json").exists()


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("keep", "BF16")])
def test_dtype_casts_every_tensor_and_the_config(
    t5g2: Successful, demo_source: Path, tmp_path: Path, dtype: str, stored: str
) -> None:
    document = t5g2.json("convert", demo_source, tmp_path / "out", "--dtype", dtype)
    written = header(tmp_path / "out/model.safetensors")
    assert {entry["dtype"] for entry in written.values()} == {stored}
    name = {"F32": "float32", "BF16": "bfloat16"}[stored]
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == name
    assert t5g2.json("inspect", tmp_path / "out")["dtypes"] == {stored: document["parameters"]["total"]}


def test_a_copy_of_the_shipped_map_gives_the_same_output(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_bytes((mappings_folder() / "gemma3.yaml").read_bytes())
    t5g2("convert", demo_source, tmp_path / "one")
    for number, name in enumerate((str(mine), "gemma3")):
        t5g2("convert", demo_source, tmp_path / f"two-{number}", "--mapping", name)
        assert contents(tmp_path / "one") == contents(tmp_path / f"two-{number}")
    mine.write_text(mine.read_text() + "# changed\n")
    t5g2("convert", demo_source, tmp_path / "three", "--mapping", mine)
    manifest = json.loads((tmp_path / "three/t5g2.json").read_text())
    assert manifest["mapping"] == {"name": "gemma3", "sha256": digest(mine)}


def test_O1_overwrite_replaces_everything_in_the_folder(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    t5g2("convert", demo_source, tmp_path / "fresh")
    t5g2("convert", demo_source, output, "--max-shard-size", "100kB")
    t5g2("convert", demo_source, output, "--overwrite")
    assert contents(output) == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-source", "fresh", "out"]


def test_O1_an_empty_folder_is_filled(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    t5g2("convert", demo_source, tmp_path / "out")
    assert (tmp_path / "out/t5g2.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-source", "out"]


def test_an_output_by_a_relative_path_goes_there(
    t5g2: Successful, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert t5g2.json("convert", "../demo-source", "out")["output"] == "out"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    t5g2("convert", "../demo-source", "../up/./out")
    assert contents(tmp_path / "up/out") == contents(tmp_path / "work/out")


# mappings


def test_mappings_list_has_every_file(t5g2: Successful) -> None:
    rows = t5g2.json("mappings", "list")["mappings"]
    paths = {path.stem: path for path in mappings_folder().glob("*.yaml")}
    assert {row["name"]: row["sha256"] for row in rows} == {name: digest(path) for name, path in paths.items()}
    (gemma3,) = (row for row in rows if row["name"] == "gemma3")
    assert gemma3["source"] == ["gemma3", "gemma3_text"]
    assert gemma3["target"] == "t5gemma2"
    out = t5g2("mappings", "list").out
    assert all(row["name"] in out for row in rows)


def test_mappings_show_names_every_row(t5g2: Successful) -> None:
    document = yaml.safe_load((mappings_folder() / "gemma3.yaml").read_text())
    shown = t5g2.json("mappings", "show", "gemma3")
    assert [row.get("from") for row in shown["weights"]] == [row.get("from") for row in document["weights"]]
    assert [row["to"] for row in shown["weights"]] == [row["to"] for row in document["weights"]]
    assert [drop["because"] for drop in shown["drop"]] == [drop["because"] for drop in document["drop"]]


def test_mappings_show_for_people_cuts_no_name(t5g2: Successful) -> None:
    document = yaml.safe_load((mappings_folder() / "gemma3.yaml").read_text())
    out = t5g2("mappings", "show", "gemma3").out
    assert "take_rows vocab" in out
    assert "merged attention" in out
    names = [name for row in document["weights"] for name in (row.get("from", "-"), *row["to"].values())]
    for drop in document["drop"]:
        names += [drop["from"]] if isinstance(drop["from"], str) else drop["from"]
    assert [name for name in names if name not in out] == []


def test_mappings_check_counts_the_tensors_of_a_checkpoint(t5g2: Successful, demo_source: Path, tmp_path: Path) -> None:
    path = mappings_folder() / "gemma3.yaml"
    rows = len(yaml.safe_load(path.read_text())["weights"])
    alone = t5g2.json("mappings", "check", "gemma3")
    assert alone == {"mapping": "gemma3", "sha256": digest(path), "rows": rows, "tensors": None}
    assert t5g2.json("mappings", "check", path, "--against", demo_source) == {**alone, "tensors": 251}
    assert f"{rows} rows" in t5g2("mappings", "check", "gemma3").out
    assert "251 tensors" in t5g2("mappings", "check", "gemma3", "--against", demo_source).out


@pytest.fixture
def schema(t5g2: Successful) -> Draft202012Validator:
    document = json.loads(t5g2("mappings", "schema").out)
    assert document["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


@pytest.fixture
def gemma3_document() -> dict[str, Any]:
    """Return the shipped map as an editor sees it, with JSON types only."""
    return dict(json.loads(json.dumps(yaml.safe_load((mappings_folder() / "gemma3.yaml").read_text()))))


def test_the_schema_accepts_every_shipped_map(schema: Draft202012Validator) -> None:
    for path in mappings_folder().rglob("*.yaml"):
        document = json.loads(json.dumps(yaml.safe_load(path.read_text())))
        assert [error.message for error in schema.iter_errors(document)] == []


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "wieghts", []),
        ((), "format", 2),
        ((), "name", "Not A Name"),
        ((), "weights", []),
        (("source",), "family", "gemma"),
        (("target",), "model_type", "gemma4"),
        (("weights", 0), "form", "x"),
        (("weights", 0), "shape", "hidden"),
        (("weights", 0), "op", {"transpose": True}),
        (("weights", 0), "op", {"take_rows": "vocab", "zeros": True}),
        (("weights", 0), "when", "images"),
        (("weights", 2, "to"), "pooler", "x"),
        (("weights", 2), "to", {}),
        (("drop", 0), "reason", "x"),
        (("drop", 0), "because", None),
        (("files",), "copy", []),
        (("vocabulary", "cut"), "262208", "many"),
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_loader_refuses(
    schema: Draft202012Validator,
    gemma3_document: dict[str, Any],
    place: tuple[str | int, ...],
    key: str,
    value: object,
) -> None:
    node: Any = gemma3_document
    for step in place:
        node = node[step]
    node[key] = value
    assert not schema.is_valid(gemma3_document)


@pytest.mark.parametrize("key", ["format", "name", "source", "target", "roots", "weights", "config"])
def test_the_schema_requires_the_fields_of_a_map(
    schema: Draft202012Validator, gemma3_document: dict[str, Any], key: str
) -> None:
    del gemma3_document[key]
    assert not schema.is_valid(gemma3_document)


# demo


def test_demo_shows_both_models_and_where_tensors_go(t5g2: Successful, tmp_path: Path) -> None:
    result = t5g2("demo", "--out", tmp_path / "kept")
    assert result.err == ""
    for part in PARTS:
        assert result.out.count(f"\n {part} ") == 2
    assert "▶ encoder" in result.out
    assert "t5gemma2: 251 tensors" in result.out
    assert result.out.count("passed ") == 8
    assert "verified in bfloat16" in result.out
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"gemma3-tiny", "t5gemma2-tiny"}
    document = t5g2.json("inspect", tmp_path / "kept/t5gemma2-tiny")
    assert document["missing"] == document["unexpected"] == []
    assert f"{document['parameters']['total']:,}" in result.out
    t5g2("convert", tmp_path / "kept/gemma3-tiny", tmp_path / "again", "--verify", "--no-card")
    assert contents(tmp_path / "again") == contents(tmp_path / "kept/t5gemma2-tiny")


def test_demo_leaves_no_files_unless_requested(
    t5g2: Successful, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = t5g2("demo")
    assert "251 tensors" in result.out
    assert "kept in" not in result.out
    assert list(tmp_path.iterdir()) == []


def test_demo_is_the_same_every_time(t5g2: Successful, tmp_path: Path) -> None:
    shown = {t5g2("demo", "--out", tmp_path / name).out.replace(str(tmp_path / name), "") for name in ("one", "two")}
    assert len(shown) == 1
    for model in ("gemma3-tiny", "t5gemma2-tiny"):
        assert contents(tmp_path / "one" / model) == contents(tmp_path / "two" / model)
