"""The model card, README.md: what a folder is and is not, from what it was made, and what was proved of it.

It is made of the folder's own manifest and config, and of the card of its source. What comes from outside is data:
quoted in the YAML, code in the Markdown. The same input gives the same bytes.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.folder import check_folder, read_json_object
from t5g2convert.checkpoint.manifest import Manifest, read_manifest
from t5g2convert.errors import CheckpointError, OutputError, UsageError
from t5g2convert.publish.base_model import ROLES, Ancestor, ancestors, command, digest, is_hub_id
from t5g2convert.publish.card_templates import Kind, adapting, kind_elsewhere, kind_of, loading
from t5g2convert.publish.frontmatter import Card, Value, parse_card
from t5g2convert.publish.license import KEYS as LICENSE
from t5g2convert.publish.license import SourceLicense, license_text, read_license
from t5g2convert.publish.markdown import code, fenced, table
from t5g2convert.publish.trained_elsewhere import missing_manifest, read_elsewhere
from t5g2convert.publish.training import training
from t5g2convert.publish.verification import Verification, read_verification, shown, unrecorded

CARD_FILE: Final = "README.md"
MODES: Final = ("update", "replace", "keep")

BASE: Final = ("base_model", "base_model_relation")

_BEGIN: Final = re.compile(r"^<!-- t5g2:begin((?: [a-z_]+)*) -->(?=[ \t]*\r?$)", re.MULTILINE)
_END: Final = re.compile(r"^<!-- t5g2:end -->(?=[ \t]*\r?$)", re.MULTILINE)

Metadata = Mapping[str, str | list[str]]


@dataclass(frozen=True, slots=True)
class _Facts:
    """All that a card is made of; `manifest` is the start's for a folder that was trained elsewhere."""

    kind: Kind
    manifest: Manifest | None
    files: Collection[str]
    parameters: Mapping[str, int]
    sources: list[Ancestor]
    verification: Verification | None
    license: SourceLicense
    repo: str
    trained_elsewhere: str | None = None
    """The dtype of a folder that was trained elsewhere."""


def model_card(
    folder: Path, *, repo: str, source_card: str | None, existing: str | None, mode: str, start: Path | None = None
) -> str | None:
    """The card of a folder that this tool wrote, or that was trained elsewhere.

    Args:
        folder: The folder; its manifest and config.json are read, its weights are not.
        repo: What it is called on the Hub, `org/name`; empty where that is not known.
        source_card: The card of the source, which has the license; None where it is not at hand.
        existing: The card that is there; None if there is none.
        mode: `update` keeps an existing card's own words and metadata, and writes anew what an earlier card of this
            tool stated; `replace` writes all anew; `keep` leaves the card as it is.
        start: The T5Gemma 2 that was trained, for a folder that was trained elsewhere and has no manifest.

    Returns:
        The card; None to leave the one that is there.

    Raises:
        CheckpointError: The folder is none that this tool wrote, or the source's card cannot be read.
        OutputError: The existing card cannot be changed without harm.
        UsageError: An argument has no meaning.
    """
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r} of a card", hint=f"expected {', '.join(MODES)}")
    if repo and not is_hub_id(repo):
        raise UsageError(f"{repo!r} is not the name of a model on the Hub", hint="expected org/name")
    if mode == "keep":
        return None
    check_folder(folder)
    facts = _facts(folder, repo, source_card) if start is None else _facts_elsewhere(folder, start, repo, source_card)
    fresh = mode == "replace" or existing is None or not existing.strip()
    return _merged(
        facts, f"\n# {code(repo.rpartition('/')[2]) if repo else facts.kind.title}\n" if fresh else existing or ""
    )


def _facts(folder: Path, repo: str, source_card: str | None) -> _Facts:
    """Those of a folder that this tool wrote."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise missing_manifest(error, folder) from None
    sources = ancestors(manifest, folder)
    return _Facts(
        kind=kind_of(
            read_json_object(folder / "config.json"), folder / "config.json", adapted=manifest.adaptation is not None
        ),
        manifest=manifest,
        files=manifest.files,
        parameters=manifest.parameters,
        sources=sources,
        verification=read_verification(manifest, folder),
        license=read_license(source_card, sources[0].address),
        repo=repo,
    )


def _facts_elsewhere(folder: Path, start: Path, repo: str, source_card: str | None) -> _Facts:
    """Those of a folder that was trained elsewhere: its own, and where its start is from."""
    check_folder(start)
    found = read_elsewhere(folder, start)
    return _Facts(
        kind=kind_elsewhere(read_json_object(folder / "config.json"), folder / "config.json"),
        manifest=found.start,
        files=found.files,
        parameters=found.parameters,
        sources=found.sources,
        verification=None,
        license=read_license(source_card, found.sources[0].address),
        repo=repo,
        trained_elsewhere=found.dtype,
    )


def _merged(facts: _Facts, existing: str) -> str:
    """A card with our metadata and our section in it."""
    card = parse_card(
        existing,
        error=OutputError,
        where=f"the {CARD_FILE} that is there",
        hint="mend it, or let the card be replaced or kept",
    )
    before, owned, after = _around(card.body)
    stated = _metadata(facts)
    ours, changes = _changes(card, owned, stated)
    named: Value = card.entries["license"].value if "license" in card.entries else None
    if "license" in ours and "license" in stated:
        told = stated["license"]
        named = told if isinstance(told, str) else tuple(told)
    section = "\n".join(
        [
            " ".join(["<!-- t5g2:begin", *ours, "-->"]),
            "<!-- t5g2 card writes all down to t5g2:end anew, and the metadata named in the line above. -->",
            "",
            "\n\n".join(_body(facts, named, owns_license="license" in ours)),
            "",
            "<!-- t5g2:end -->",
        ]
    )
    return card.joined(changes, before + section.replace("\n", card.newline) + after)


def _around(body: str) -> tuple[str, list[str], str]:
    """What stands before our section, the metadata that are ours, and what stands behind; it may have to be added.

    Raises:
        OutputError: There is a mark without the other, or there are several.
    """
    begins, ends = list(_BEGIN.finditer(body)), list(_END.finditer(body))
    if not begins and not ends:
        newline = "\r\n" if "\r\n" in body else "\n"
        kept = body.rstrip("\r\n")
        return f"{kept}{newline * 2}" if kept else newline, [], newline
    if len(begins) != 1 or len(ends) != 1 or begins[0].end() > ends[0].start():
        raise OutputError(
            "has the marks t5g2:begin and t5g2:end not once each, in this order",
            where=f"the {CARD_FILE} that is there",
            hint="mend them, or let the card be replaced or kept",
        )
    return body[: begins[0].start()], begins[0][1].split(), body[ends[0].end() :]


def _metadata(facts: _Facts) -> Metadata:
    """What we state, by key."""
    known = list(dict.fromkeys(source.repo for source in facts.sources if source.repo is not None))
    stated: dict[str, str | list[str]] = {}
    if known:
        stated["base_model"] = known[0] if len(known) == 1 else known
        # Of the Hub's four words for a relation these are the two that come near; the card says what was really done.
        stated["base_model_relation"] = "merge" if len(facts.sources) > 1 else "finetune"
    stated |= {"library_name": "transformers", "pipeline_tag": facts.kind.pipeline, **facts.license.metadata}
    return {**stated, "tags": ["t5g2convert", *facts.kind.tags]}


def _changes(card: Card, owned: list[str], stated: Metadata) -> tuple[list[str], dict[str, str | None]]:
    """The keys that are ours from now on, and what changes in the metadata: YAML by key, None for a key that goes."""
    groups = [BASE, LICENSE, ("library_name",), ("pipeline_tag",)]
    ours: list[str] = []
    changes: dict[str, str | None] = {}
    for group in groups:
        if any(key not in owned and key in card.entries and not card.entries[key].empty for key in group):
            continue
        news = [key for key in group if key in stated]
        # A license that was taken from a card of the source stays while no such card is at hand.
        keep = group is LICENSE and not news
        ours += [key for key in group if key in news or (keep and key in owned and key in card.entries)]
        changes |= {key: _yaml(key, stated[key]) for key in news}
        gone = [] if keep else [key for key in group if key in owned and key in card.entries and key not in news]
        changes |= dict.fromkeys(gone)
    tags = card.entries.get("tags")
    if tags is None or tags.legible:
        found = (
            () if tags is None or tags.value is None else (tags.value,) if isinstance(tags.value, str) else tags.value
        )
        missing = [tag for tag in stated["tags"] if tag not in found]
        changes |= {"tags": _yaml("tags", [*found, *missing])} if missing else {}
    return ours, changes


def _yaml(key: str, value: str | list[str]) -> str:
    """One key of the metadata as YAML, as huggingface_hub writes it."""
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = {key: value}
    return str(ModelCardData(**known).to_yaml())


def _body(facts: _Facts, named: Value, *, owns_license: bool) -> Iterator[str]:
    """Our section, a paragraph or block at a time."""
    kind = facts.kind
    yield from ("## What this is", kind.what)
    yield from _differences(facts)
    yield "## How it was made"
    yield from _provenance(facts)
    yield from ("## Parameters", _parameters(facts.parameters))
    yield "## Verification"
    yield from [unrecorded()] if facts.trained_elsewhere is not None else shown(facts.verification)
    yield "## How to load it"
    yield from loading(kind, facts.files, facts.repo or ".")
    if not facts.repo:
        yield 'The name `"."` is this folder, for a program that runs in it; or write its path, or its name on the Hub.'
    yield "## How to adapt it"
    yield from adapting(kind, facts.files)
    yield from ("## License", license_text(facts.license, named, ours=owns_license))


def _differences(facts: _Facts) -> Iterator[str]:
    """In what it is not its parent."""
    if facts.manifest is None:
        return
    options, roles = facts.manifest.options, [source.role for source in facts.sources]
    if options.decoder_layers is not None:
        yield "But its decoder has only some of its parent's layers: they compute what no model computed before."
    if options.encoder_layers is not None:
        yield "Its encoder has only some of the source's layers."
    if "decoder_from" in roles:
        table_of = ROLES["decoder_from" if options.embedding_from == "decoder-from" else "source"]
        yield (
            f"Its encoder has the layers of the source, its decoder those of the decoder's parent, and both read the "
            f"embedding table of {table_of}."
        )
    if "vision_from" in roles and options.projector == "zeros":
        yield "Its projector from images to the encoder is zeros: until it is trained, no image changes anything."
    changes = facts.manifest.changes
    if changes:
        yield "These settings are not its source's; what is said of a parent above holds with the parent's:"
        rows = [[code(item.field), code(_json(item.source)), code(_json(item.target))] for item in changes]
        yield table(["setting", "source", "here"], rows)


def _provenance(facts: _Facts) -> Iterator[str]:
    """The command, the map, the tool, and every file that was read."""
    manifest = facts.manifest
    if facts.trained_elsewhere is not None:
        yield (
            f"It was trained elsewhere; its weights are {code(CONFIG_NAMES.get(facts.trained_elsewhere, 'mixed'))} "
            "now. That is all that is known of its training."
        )
    if manifest is None:
        yield "Of what was trained nothing tells how it was made."
        return
    if facts.trained_elsewhere is not None:
        yield "What was trained was made so:"
    mapped: list[list[str]] = []
    if manifest.adaptation is not None:
        yield from training(manifest.adaptation, manifest.options.dtype, source=facts.sources[0].argument)
    else:
        yield fenced("console", [f"$ {command(manifest, facts.sources, facts.kind.part)}"])
    if manifest.mapping is not None:
        mapped = [["map", f"{code(manifest.mapping.name)}, sha256 {digest(manifest.mapping.sha256)}"]]
    facts_of = [
        ["tool", f"{code(manifest.tool.name)} {code(manifest.tool.version)}"],
        *mapped,
        *[[ROLES[source.role], source.told] for source in facts.sources],
        ["dtype", code(manifest.dtype)],
    ]
    yield table(["what", "which"], facts_of)
    if any(source.repo for source in facts.sources):
        yield "The Hub has no word for such a relation to a base model; that in the metadata is the nearest one."
    rows = [
        [ROLES[source.role], code(name), digest(sha256)]
        for source in facts.sources
        for name, sha256 in source.files.items()
    ]
    yield table(["read of", "file", "sha256"], rows)


def _parameters(parameters: Mapping[str, int]) -> str:
    """Parameters by part, with their share."""
    total = parameters.get("total") or 1
    rows: Iterable[list[str]] = [
        [code(part), f"{count:,}", f"{count / total:.1%}"] for part, count in parameters.items()
    ]
    return table(["part", "parameters", "share"], rows, right=(1, 2))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
