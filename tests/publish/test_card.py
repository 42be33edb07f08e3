"""The card of every kind of folder: its statements, the owner's text that it keeps, and hostile text."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.checkpoint.manifest_section import digest_of
from t5g2convert.errors import CheckpointError, OutputError, UsageError
from t5g2convert.publish.card import CARD_FILE, model_card
from t5g2convert.publish.license import GEMMA_TERMS
from tests.adaptation.runs import SETTINGS
from tests.cli.test_hostile_text import PAYLOADS
from tests.publish.folders import COMMIT, KINDS, RECORD, change_manifest, from_hub
from tests.publish.rendered import render, table_lines

GEMMA = "---\nlicense: gemma\nlibrary_name: transformers\n---\n# Gemma 3\n"
SECTIONS = [
    "h2 What this is",
    "h2 How it was made",
    "h2 Parameters",
    "h2 Verification",
    "h2 How to load it",
    "h2 How to adapt it",
    "h2 License",
]
KNOWN_LINKS = ("https://arxiv.org/abs/2512.14856", "https://arxiv.org/abs/2504.06225", GEMMA_TERMS)
PIPELINES = {
    "images": "image-text-to-text",
    "text": "text-generation",
    "grafted": "image-text-to-text",
    "encoder": "feature-extraction",
    "encoder-text": "feature-extraction",
    "decoder": "image-text-to-text",
    "decoder-text": "text-generation",
    "paired": "text-generation",
    "t5gemma": "text-generation",
    "adapted": "image-text-to-text",
    "merged": "image-text-to-text",
}


def made(folder: Path, existing: str | None = None, **options: Any) -> str:
    chosen = {"repo": "me/mine", "source_card": None, "mode": "update", **options}
    card = model_card(folder, existing=existing, **chosen)
    assert card is not None
    return card


def begin(card: str) -> list[str]:
    (found,) = re.findall(r"^<!-- t5g2:begin(.*) -->$", card, re.MULTILINE)
    return str(found).split()


@pytest.mark.parametrize("repo", ["me/mine", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_the_card_of_every_kind_renders(kind: str, repo: str, kinds: Path) -> None:
    card = made(kinds / kind, repo=repo, source_card=GEMMA)
    found = render(card)
    title, *sections = found.headings
    assert title.startswith("h1 ")
    assert ("`mine`" in title) == bool(repo)
    assert sections == SECTIONS
    assert len(set(table_lines(card))) <= 3
    for rows in found.tables:
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    assert set(found.links) <= set(KNOWN_LINKS)
    assert GEMMA_TERMS in found.links
    assert all(html.startswith("<!-- t5g2") for html in found.html)
    for language, text in found.code:
        assert language in ("console", "python")
        if language == "python":
            compile(text, "card", "exec")
    assert str(kinds) not in card
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", card)
    assert {character for character in card if character != "\n" and not character.isprintable()} == set()
    assert max(map(len, card.splitlines())) < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_of_every_kind(kind: str, kinds: Path) -> None:
    card = made(kinds / kind, source_card=GEMMA)
    metadata = render(card).metadata
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == PIPELINES[kind]
    assert metadata["license"] == "gemma"
    assert metadata["tags"][0] == "t5g2convert"
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata
    assert begin(card) == ["license", "library_name", "pipeline_tag"]


@pytest.mark.parametrize("kind", KINDS)
def test_huggingface_hub_reads_it_and_writes_it_again(kind: str, kinds: Path, tmp_path: Path) -> None:
    card = made(kinds / kind, source_card=GEMMA)
    (tmp_path / CARD_FILE).write_text(card)
    loaded = ModelCard.load(tmp_path / CARD_FILE)
    assert loaded.data.to_dict() == render(card).metadata
    assert str(loaded) == card


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_names_the_kind_of_folder(kind: str, kinds: Path) -> None:
    card = made(kinds / kind)
    if kind.startswith(("encoder", "decoder")):
        assert "It was not trained after extraction." in card
        assert "not trained further.**" not in card
        assert f"$ t5g2 extract SOURCE OUTPUT --part {kind.partition('-')[0]}" in card
    elif kind == "adapted":
        assert "and **trained further**" in card
        assert "needs adaptation" not in card
        options = "--lr 0.001 --steps 200 --batch-tokens 512 --encoder-length 64 --decoder-length 64"
        options += " --warmup 100 --seed 0 --save-every 20"
        assert f"$ t5g2 adapt SOURCE DATA RUN {options}\n$ t5g2 average RUN --last 3" in card
    elif kind == "merged":
        assert "a **LoRA adapter merged into its weights**" in card
        assert "$ t5g2 merge SOURCE ADAPTER OUTPUT" in card
        assert "The model that the adapter was merged into was trained like this:" in card
        assert "$ t5g2 adapt START DATA RUN --lr 0.001" in card
    else:
        assert "**It was converted and not trained further.**" in card
        assert "it needs adaptation before it is useful" in card
        assert "$ t5g2 convert SOURCE OUTPUT" in card
    assert ("text only" in card) == (kind in ("text", "paired"))
    assert ("some of its parent's layers" in card) == (kind == "paired")
    assert ("use the embedding table of the source" in card) == (kind == "paired")
    assert ("zeros" in card) == (kind == "grafted")
    assert ("A Gemma 2 converted" in card) == (kind == "t5gemma")


@pytest.mark.slow
def test_the_code_of_the_cards_runs(kinds: Path) -> None:
    """Load and generate in transformers; run the card's training step if it has one."""
    script = (
        "import json, os, sys\n"
        "for folder, blocks in json.loads(sys.argv[1]).items():\n"
        "    os.chdir(folder)\n    scope = {}\n"
        "    for block in blocks:\n        exec(block, scope)\n"
        "    grads = [p.grad is not None for p in scope['model'].parameters()]\n"
        "    done = type(scope['model']).__name__, 'written' in scope, 'states' in scope, any(grads)\n"
        "    print(os.path.basename(folder), *done)\n"
    )
    blocks = {
        str(kinds / kind): [text for language, text in render(made(kinds / kind, repo="")).code if language == "python"]
        for kind in KINDS
    }
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(blocks)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.split(" ")[0] in KINDS]
    assert lines == [
        ["images", "T5Gemma2ForConditionalGeneration", "True", "False", "True"],
        ["text", "T5Gemma2ForConditionalGeneration", "False", "False", "False"],
        ["grafted", "T5Gemma2ForConditionalGeneration", "False", "False", "False"],
        ["encoder", "T5Gemma2Encoder", "False", "True", "False"],
        ["encoder-text", "T5Gemma2Encoder", "False", "False", "False"],
        ["decoder", "Gemma3ForConditionalGeneration", "True", "False", "False"],
        ["decoder-text", "Gemma3ForCausalLM", "False", "False", "False"],
        ["paired", "T5Gemma2ForConditionalGeneration", "False", "False", "False"],
        ["t5gemma", "T5GemmaForConditionalGeneration", "False", "False", "False"],
        ["adapted", "T5Gemma2ForConditionalGeneration", "True", "False", "True"],
        ["merged", "T5Gemma2ForConditionalGeneration", "True", "False", "True"],
    ]


def test_the_same_input_gives_the_same_bytes(kinds: Path, tmp_path: Path) -> None:
    other = shutil.copytree(kinds / "images", tmp_path / "elsewhere")
    assert made(other, source_card=GEMMA) == made(kinds / "images", source_card=GEMMA)


def test_a_source_of_the_hub_is_the_base_model(converted: Path) -> None:
    change_manifest(converted, from_hub())
    card = made(converted)
    found = render(card)
    assert found.metadata["base_model"] == "org/gemma-3"
    assert found.metadata["base_model_relation"] == "finetune"
    assert begin(card)[:2] == ["base_model", "base_model_relation"]
    assert f"$ t5g2 convert org/gemma-3@{COMMIT} OUTPUT" in card
    assert f"https://huggingface.co/org/gemma-3/tree/{COMMIT}" in found.links


def test_the_training_is_described(kinds: Path, tmp_path: Path) -> None:
    card = made(kinds / "adapted", source_card=GEMMA)
    trained = {row[0]: row[1] for rows in render(card).tables if rows[0] == ["training", "value"] for row in rows}
    assert trained["weights"] == "mean of 3 checkpoints, from steps 60, 80, 100"
    assert trained["training tokens"] == "51,200"
    assert trained["trained on"] == "the data"
    assert trained["frozen parts"] == "`embedding`, `projector`, `vision`"
    assert trained["data"] == f"sha256 `{'c' * 64}`"
    (tasks,) = (rows[1:] for rows in render(card).tables if rows[0][0] == "task")
    assert len(tasks) == 5
    assert tasks[0] == ["`spans-3-15`", "spans", "0.15", "3", "1", "sentinels"]
    assert tasks[-1] == ["`prefix`", "prefix", "0.75", "one", "4", "none"]
    assert trained["learning rate"] == "0.001 after 100 steps, then a cosine to 0.1 of that at step 200"
    assert trained["optimizer"] == "AdamW, betas 0.9 and 0.95, weight decay 0, gradients clipped at 1"
    assert "Google has not published these parts of its own training" in card
    assert "learning rate, weight decay, optimizer" in card
    folder = shutil.copytree(kinds / "adapted", tmp_path / "adapted")
    taught = {"teacher": "d" * 64, "image_every": 4, "freeze_until": 50, "trainable": ["*.projector.`<b>*"]}
    taught["documents"] = "single"
    settings = {**SETTINGS.to_json(), **taught}
    settings["mixture"] = {**settings["mixture"], "first_sentinel": "<unused6237>"}
    trained = {"checkpoints": [100], "settings": settings, "settings_sha256": digest_of(settings)}
    change_manifest(folder, lambda manifest: manifest["adaptation"].update(trained))
    change_manifest(folder, lambda manifest: manifest["options"].update(dtype="float32"))
    card = made(folder)
    trained = {row[0]: row[1] for rows in render(card).tables if rows[0] == ["training", "value"] for row in rows}
    assert trained["weights"] == "step 100, in `float32`"
    assert trained["trained on"] == f"the data and the teacher `{'d' * 64}`"
    assert trained["first sentinel"] == "`<unused6237>`; the others descend from it"
    flags = "--image-every 4 --warmup 100 --seed 0 --documents single --kd PARENT --freeze-until 50"
    assert f"{flags} --trainable '*.projector.`<b>*'" in card
    assert "<b>" not in render(card).html
    assert "t5g2 average" not in card


def test_a_donor_of_the_hub_is_a_base_model_too(kinds: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kinds / "grafted", tmp_path / "grafted")
    hub = {"repo": "org/donor", "revision": COMMIT}
    change_manifest(folder, lambda manifest: manifest["vision_from"].update(hub=hub))
    metadata = render(made(folder)).metadata
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/donor", "merge")
    change_manifest(folder, from_hub())
    card = made(folder)
    assert render(card).metadata["base_model"] == ["org/gemma-3", "org/donor"]
    assert f"OUTPUT --vision-from org/donor@{COMMIT} --projector zeros" in card
    change_manifest(folder, from_hub("org/donor"))
    assert render(made(folder)).metadata["base_model"] == "org/donor"


def test_a_decoder_of_another_parent_is_described(kinds: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kinds / "paired", tmp_path / "paired")
    hub = {"repo": "org/other", "revision": COMMIT}
    change_manifest(folder, lambda manifest: manifest["decoder_from"].update(hub=hub))
    change_manifest(folder, lambda manifest: manifest["options"].update(embedding_from="decoder-from"))
    card = made(folder)
    assert (render(card).metadata["base_model"], render(card).metadata["base_model_relation"]) == ("org/other", "merge")
    assert f"--decoder-from org/other@{COMMIT} --encoder-layers 0,1,2,3,4,5,6 --decoder-layers 0,2,4,6" in card
    assert "--embedding-from decoder-from" in card
    assert "use the embedding table of the decoder's parent" in card


@pytest.mark.parametrize(
    "repo",
    ["gemma", "../x", "a/b/c", "a/b\n# c", "a b/c", "a/<b>", "a/b)", "a/--b", "a/b.git", "a/" + "b" * 97, "/b", ""],
)
def test_an_invalid_hub_name_as_source_is_refused(repo: str, converted: Path) -> None:
    change_manifest(converted, from_hub(repo))
    with pytest.raises(CheckpointError, match="expected org/name and a commit"):
        made(converted)
    if repo:
        with pytest.raises(UsageError, match="not a valid model name"):
            made(converted, repo=repo)


@pytest.mark.parametrize("revision", ["main", "", COMMIT[:-1], f"{COMMIT}\n", COMMIT.upper()])
def test_a_revision_that_is_not_a_commit_is_refused(revision: str, converted: Path) -> None:
    change_manifest(converted, from_hub(revision=revision))
    with pytest.raises(CheckpointError, match="expected org/name and a commit"):
        made(converted)


def test_options_and_changed_settings_are_listed(converted: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["options"] = {"dtype": "float32", "max_shard_bytes": 20_000, "rope_scaling": "linear:8"}
        manifest["changes"] = [{"field": "rope_full_factor", "source": 1.0, "target": 8.0}]

    change_manifest(converted, change)
    card = made(converted)
    assert "$ t5g2 convert SOURCE OUTPUT --dtype float32 --max-shard-size 20000 --rope-scaling linear:8" in card
    assert ["`rope_full_factor`", "`1.0`", "`8.0`"] in [row for rows in render(card).tables for row in rows]


def test_a_custom_map_is_named(converted: Path) -> None:
    change_manifest(converted, lambda manifest: manifest["mapping"].update(sha256="0" * 64))
    assert "$ t5g2 convert SOURCE OUTPUT --mapping MAP.yaml" in made(converted)
    change_manifest(converted, lambda manifest: manifest["tool"].update(version="0.0.1"))
    assert "--mapping" not in made(converted), "that of another version has a different sha256"
    change_manifest(converted, lambda manifest: manifest["mapping"].update(name="../mine"))
    assert "--mapping MAP.yaml" in made(converted)


def test_the_tables_are_the_manifest_s(kinds: Path) -> None:
    manifest = json.loads((kinds / "images" / MANIFEST_FILE).read_text())
    tables = render(made(kinds / "images")).tables
    files, parameters, checks = tables[1:]
    for name, facts in manifest["source"]["files"].items():
        assert ["the source", f"`{name}`", f"`{facts['sha256']}`"] in files
    for part, count in manifest["parameters"].items():
        assert [f"`{part}`", f"{count:,}", f"{count / manifest['parameters']['total']:.1%}"] in parameters
    assert ["`decoder_parity`", "passed", f"`{RECORD['checks'][0]['detail']}`"] in checks
    assert ["`tokenizer`", "skipped", "`the output has no tokenizer`"] in checks


def test_files_without_hashes_are_named(converted: Path) -> None:
    change_manifest(converted, lambda manifest: manifest["source"]["files"]["model.safetensors"].update(sha256=None))
    assert ["the source", "`model.safetensors`", "not computed"] in render(made(converted)).tables[1]


def test_a_card_says_if_there_was_no_verification(converted: Path) -> None:
    change_manifest(converted, lambda manifest: manifest.pop("verification"))
    card = made(converted)
    assert "**Not verified.**" in card
    assert "Verified against" not in card


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(passed=False),
        lambda record: record["checks"][0].update(passed=False),
        lambda record: record.update(checks=[]),
    ],
)
def test_a_card_says_if_verification_failed(change: Callable[[dict[str, Any]], object], converted: Path) -> None:
    assert "Verified against" in made(converted)
    change_manifest(converted, lambda manifest: change(manifest["verification"]))
    card = made(converted)
    assert "**Verification failed: do not use this.**" in card
    assert "Verified against" not in card


def test_a_tolerance_is_stated(converted: Path) -> None:
    assert "allowed no difference" in made(converted)
    change_manifest(converted, lambda manifest: manifest["verification"].update(tolerance=0.01))
    assert "allowed differences up to 0.01" in made(converted)


@pytest.mark.parametrize("record", [{}, {**RECORD, "checks": [{}]}, {**RECORD, "passed": "yes"}])
def test_an_invalid_record_is_refused(record: dict[str, Any], converted: Path) -> None:
    change_manifest(converted, lambda manifest: manifest.update(verification=record))
    with pytest.raises(CheckpointError, match="verification"):
        made(converted)


def test_a_folder_that_is_not_ours_is_refused(kinds: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"t5g2\.json: is missing"):
        made(kinds / "gemma-images")
    with pytest.raises(CheckpointError, match="no such folder"):
        made(tmp_path / "gone")


def test_a_kind_that_is_unknown_is_refused(converted: Path) -> None:
    (converted / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"no model card for this model: .*'llama'"):
        made(converted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source_card", [None, GEMMA])
def test_updating_twice_is_updating_once(kind: str, source_card: str | None, kinds: Path) -> None:
    first = made(kinds / kind, source_card=source_card)
    assert made(kinds / kind, first, source_card=source_card) == first


OWN = """---
# mine
language: no
license: mit
tags: [mine, t5gemma2]
datasets:
  - a/b   # where it is from
---

# My model

Some words, and <b>HTML</b>.
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_another_s_card_keeps_its_own(newline: str, end: str, converted: Path) -> None:
    change_manifest(converted, from_hub())
    own = (OWN.rstrip() + end).replace("\n", newline)
    card = made(converted, own, source_card=GEMMA)
    assert made(converted, card, source_card=GEMMA) == card
    assert card.count("\r") == (card.count("\n") if newline == "\r\n" else 0)
    card = card.replace("\r\n", "\n")
    for line in OWN.splitlines():
        assert line.startswith("tags") or line in card.splitlines()
    metadata = render(card).metadata
    assert metadata["license"] == "mit"
    assert metadata["tags"] == ["mine", "t5gemma2", "t5g2convert", "encoder-decoder"]
    assert metadata["base_model"] == "org/gemma-3"
    assert begin(card) == ["base_model", "base_model_relation", "library_name", "pipeline_tag"]
    assert "**This card's own metadata name `mit`**" in card
    assert card.index("Some words") < card.index("t5g2:begin")


def test_text_around_our_section_stays(converted: Path) -> None:
    first = made(converted, OWN)
    mine = first.replace("# My model", "# My own model").rstrip() + "\n\n## Thanks\n\nto all.\n"
    change_manifest(converted, lambda manifest: manifest.pop("verification"))
    second = made(converted, mine)
    assert second.startswith(mine.partition("<!--")[0])
    assert second.endswith(mine.rpartition("-->")[2])
    assert "Not verified" in second
    assert "Not verified" not in mine


def test_our_text_is_rewritten_but_edited_text_is_kept(converted: Path) -> None:
    first = made(converted)
    (converted / "config.json").write_text('{"model_type": "gemma3_text"}')
    assert render(made(converted, first)).metadata["pipeline_tag"] == "text-generation"
    mine = first.replace(" pipeline_tag -->", " -->").replace("image-text-to-text\n", "text-ranking\n", 1)
    assert render(made(converted, mine)).metadata["pipeline_tag"] == "text-ranking"


def test_a_base_model_that_is_no_longer_known_is_removed(converted: Path) -> None:
    change_manifest(converted, from_hub())
    first = made(converted)
    change_manifest(converted, lambda manifest: manifest["source"].pop("hub"))
    assert made(converted, first) == made(converted)


def test_a_base_model_of_the_owner_stays(converted: Path) -> None:
    card = made(converted, "---\nbase_model: a/b\n---\n")
    change_manifest(converted, from_hub())
    metadata = render(made(converted, card)).metadata
    assert metadata["base_model"] == "a/b"
    assert "base_model_relation" not in metadata


def test_a_license_stays_without_the_source_card(converted: Path) -> None:
    first = made(converted, source_card=GEMMA)
    second = made(converted, first)
    assert render(second).metadata["license"] == "gemma"
    assert "was copied from a card of the source earlier" in second
    assert made(converted, second) == second
    third = made(converted, second, source_card=GEMMA.replace("license: gemma", "license: mit"))
    assert render(third).metadata["license"] == "mit"


@pytest.mark.parametrize("source_card", [None, "# no metadata\n", "---\nlanguage: en\n---\n"])
def test_there_is_no_default_license(source_card: str | None, kinds: Path) -> None:
    for kind in KINDS:
        card = made(kinds / kind, source_card=source_card)
        assert not {"license", "license_name", "license_link"} & set(render(card).metadata)
        assert ("names no license" if source_card else "was not available") in card
        assert "Gemma Terms" not in card


def test_a_license_key_of_nothing_is_filled(converted: Path) -> None:
    card = made(converted, "---\nlicense:\nlanguage: en\n---\n", source_card=GEMMA)
    assert render(card).metadata["license"] == "gemma"


def test_replace_rewrites_everything_and_keep_writes_nothing(converted: Path) -> None:
    assert made(converted, OWN, mode="replace") == made(converted)
    assert made(converted, "  \n") == made(converted)
    assert model_card(converted, repo="", source_card=None, existing=OWN, mode="keep") is None
    with pytest.raises(UsageError, match="unknown card mode 'merge'"):
        made(converted, mode="merge")


@pytest.mark.parametrize(
    "damage",
    [
        lambda card: card.replace("<!-- t5g2:end -->", ""),
        lambda card: re.sub("<!-- t5g2:begin.*-->", "", card),
        lambda card: card + card[card.index("<!-- t5g2:begin") :],
        lambda card: card.replace("<!-- t5g2:end -->", "").replace(
            "<!-- t5g2:begin", "<!-- t5g2:end -->\n<!-- t5g2:begin"
        ),
    ],
    ids=["no-end", "no-begin", "twice", "turned"],
)
def test_a_section_that_has_no_clear_place_is_refused(damage: Callable[[str], str], converted: Path) -> None:
    with pytest.raises(OutputError, match="expected one t5g2:begin and one t5g2:end") as error:
        made(converted, damage(made(converted)))
    assert error.value.hint is not None
    assert "replace" in error.value.hint


def test_metadata_that_cannot_be_read_are_refused(converted: Path) -> None:
    for text in ("---\na: [\n---\n", "---\n- a\n---\n"):
        with pytest.raises(OutputError, match=r"the existing README\.md: metadata"):
            made(converted, text)
        with pytest.raises(CheckpointError, match="the source's card: metadata"):
            made(converted, source_card=text)


ATTACKS = {
    **PAYLOADS,
    "heading": "x\n# Injected\n\n## More",
    "link": "[a](https://evil.example) ![b](https://evil.example/i) https://evil.example www.evil.example a@evil.org",
    "html": "<script>alert(1)</script><!-- t5g2:end --><img src=x onerror=y>",
    "marks": "x\n<!-- t5g2:end -->\n<!-- t5g2:begin license -->",
    "table": "a | b || c |\n| --- | --- |\n|",
    "code": "``` `x` `` \\` ~~~\n```\n# Injected",
    "yaml": "x\n---\nlicense: mit\n---\n: [ } & *a !!python/object:x 'y' \"z",
    "long": "# [x](y) " * 5000,
}


def attack_manifest(manifest: dict[str, Any], text: str) -> None:
    """Put a text into every free text field of a manifest; digests, tool name and version are typed."""
    manifest["mapping"] = {"name": text, "sha256": "0" * 64}
    manifest["options"] = {"dtype": text, "preset": text, "rope_scaling": text}
    manifest["dtype"] = text
    manifest["parameters"] = {text: 1, "total": 1}
    manifest["changes"] = [{"field": text, "source": text, "target": [text]}]
    manifest["notes"] = [text]
    manifest["source"].update(family=text, layout={text: text}, files={text: {"bytes": 1, "sha256": "0" * 64}})
    manifest["files"] = {text: {"bytes": 1, "sha256": "0" * 64}, **manifest["files"]}
    record = {
        "passed": True,
        "dtype": text,
        "device": text,
        "tolerance": 0.0,
        "skipped": {text: text},
        "remarks": [text],
    }
    manifest["verification"] = {**record, "checks": [{"name": text, "passed": True, "detail": text}]}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_text_from_a_manifest_stays_text(text: str, kinds: Path, converted: Path) -> None:
    text = text.encode(errors="ignore").decode()
    change_manifest(converted, lambda manifest: attack_manifest(manifest, text))
    card = made(converted, source_card=GEMMA)
    found = render(card)
    assert found.headings == ["h1 `mine`", *SECTIONS]
    assert found.metadata == render(made(kinds / "images", source_card=GEMMA)).metadata
    assert set(found.links) <= set(KNOWN_LINKS)
    assert len(found.html) == 3
    assert all(html.startswith("<!-- t5g2") for html in found.html)
    assert {language for language, _ in found.code} == {"console", "python"}
    assert all(len({len(row) for row in rows}) == 1 for rows in found.tables)
    assert {character for character in card if character != "\n" and not character.isprintable()} == set()
    assert made(converted, card, source_card=GEMMA) == card
    assert len(card) < 20_000


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("listed", [False, True])
def test_text_from_the_source_s_card_stays_text(text: str, listed: bool, converted: Path) -> None:
    text = text.encode(errors="ignore").decode()[:400]
    value = json.dumps([text, text] if listed and len(text) < 200 else text)
    theirs = f"---\nlicense: {value}\nlicense_name: {json.dumps(text)}\nlicense_link: {json.dumps(text)}\n---\n# x\n"
    card = made(converted, source_card=theirs)
    found = render(card)
    assert found.headings == ["h1 `mine`", *SECTIONS]
    assert set(found.metadata) == {"license", "license_name", "library_name", "pipeline_tag", "tags"}
    assert ModelCard(card).data.to_dict() == found.metadata
    assert set(found.links) <= set(KNOWN_LINKS)
    assert len(found.html) == 3
    assert {character for character in card if character != "\n" and not character.isprintable()} == set()
    assert made(converted, card, source_card=theirs) == card
