"""The model card, README.md, made from the folder's manifest and config.json and from the source's card.

Text from outside is treated as data: it is quoted in the YAML, and shown as code in the Markdown. The same input gives
the same bytes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import yaml

from t5g2convert.checkpoint.card_seal import CARD_FILE, is_sealed
from t5g2convert.checkpoint.file_store import is_repo_id
from t5g2convert.checkpoint.folder import check_folder, read_json_object
from t5g2convert.checkpoint.manifest import Manifest, read_manifest
from t5g2convert.checkpoint.training_record import PairSettings
from t5g2convert.errors import CheckpointError, OutputError, UsageError
from t5g2convert.publish.base_model import base_checkpoints, missing_manifest, read_trained_elsewhere
from t5g2convert.publish.card_sections import CardContent, read_verification, sections
from t5g2convert.publish.card_templates import template_for, template_for_trained_elsewhere
from t5g2convert.publish.frontmatter import Card, Value, parse_card
from t5g2convert.publish.license import LICENSE_KEYS, license_text, read_license
from t5g2convert.publish.markdown import code

MODES: Final = ("update", "replace", "keep")

_BASE_KEYS: Final = ("base_model", "base_model_relation")

_BEGIN: Final = re.compile(r"^<!-- t5g2:begin((?: [a-z_]+)*) -->(?=[ \t]*\r?$)", re.MULTILINE)
_END: Final = re.compile(r"^<!-- t5g2:end -->(?=[ \t]*\r?$)", re.MULTILINE)

Metadata = Mapping[str, str | list[str]]


def model_card(
    folder: Path, *, repo: str, source_card: str | None, existing: str | None, mode: str, start: Path | None = None
) -> str | None:
    """Return the card of a folder that this tool wrote or that was trained elsewhere.

    Args:
        folder: The folder; its manifest and config.json are read, its weights are not.
        repo: Its name on the Hub, `org/name`; empty if unknown.
        source_card: The source's card, which names the license; None if it is not available.
        existing: The folder's present card; None if it has none.
        mode: `update` rewrites this tool's section and metadata and keeps everything else; `replace` rewrites the whole
            card; `keep` leaves it alone.
        start: The T5Gemma 2 it was trained from, for a folder trained elsewhere, which has no manifest.

    Returns:
        The card; None to leave the existing card alone.

    Raises:
        CheckpointError: This tool did not write the folder, or the source's card cannot be read.
        OutputError: The existing card cannot be updated safely.
        UsageError: An argument is not valid.

    Example:
        >>> model_card(Path("t5gemma-2-4b-4b"), repo="me/mine", source_card=None, existing=None, mode="update")
    """
    if mode not in MODES:
        raise UsageError(f"unknown card mode {mode!r}", hint=f"expected {', '.join(MODES)}")
    if repo and not is_repo_id(repo):
        raise UsageError(f"{repo!r} is not a valid model name on the Hub", hint="expected org/name")
    if mode == "keep":
        return None
    check_folder(folder)
    if start is None:
        content = _content(folder, repo, source_card)
    else:
        content = _content_trained_elsewhere(folder, start, repo, source_card)
    if mode == "replace" or existing is None or not existing.strip() or is_sealed(existing):
        existing = f"\n# {code(repo.rpartition('/')[2]) if repo else content.template.title}\n"
    return _merge(content, existing)


def _content(folder: Path, repo: str, source_card: str | None) -> CardContent:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise missing_manifest(error, folder) from None
    config = folder / "config.json"
    sources = base_checkpoints(manifest, folder)
    return CardContent(
        template=template_for(read_json_object(config), config, trained=_trained(manifest)),
        manifest=manifest,
        files=manifest.files,
        parameters=manifest.parameters,
        sources=sources,
        verification=read_verification(manifest, folder),
        license=read_license(source_card, sources[0].address),
        repo=repo,
    )


def _trained(manifest: Manifest) -> Literal["ul2", "pairs", "merged"] | None:
    """Return how a model was changed after its conversion, if it was."""
    if manifest.merged is not None:
        return "merged"
    if manifest.adaptation is None:
        return None
    return "pairs" if isinstance(manifest.adaptation.settings, PairSettings) else "ul2"


def _content_trained_elsewhere(folder: Path, start: Path, repo: str, source_card: str | None) -> CardContent:
    check_folder(start)
    found = read_trained_elsewhere(folder, start)
    config = folder / "config.json"
    return CardContent(
        template=template_for_trained_elsewhere(read_json_object(config), config),
        manifest=found.start,
        files=found.files,
        parameters=found.parameters,
        sources=found.sources,
        verification=None,
        license=read_license(source_card, found.sources[0].address),
        repo=repo,
        trained_dtype=found.dtype,
    )


def _merge(content: CardContent, existing: str) -> str:
    """Merge this tool's metadata and section into an existing card."""
    card = parse_card(
        existing, error=OutputError, where=f"the existing {CARD_FILE}", hint="fix it, or replace or keep the card"
    )
    before, owned, after = _split(card.body)
    stated = _metadata(content)
    ours, changes = _changes(card, owned, stated)
    own_license: Value = card.entries["license"].value if "license" in card.entries else None
    if "license" in ours and "license" in stated:
        value = stated["license"]
        own_license = value if isinstance(value, str) else tuple(value)
    text = license_text(content.license, own_license, from_source="license" in ours)
    section = "\n".join(
        [
            " ".join(["<!-- t5g2:begin", *ours, "-->"]),
            "<!-- t5g2 card rewrites everything down to t5g2:end, and the metadata named in the line above. -->",
            "",
            "\n\n".join(sections(content, text)),
            "",
            "<!-- t5g2:end -->",
        ]
    )
    return card.joined(changes, before + section.replace("\n", card.newline) + after)


def _split(body: str) -> tuple[str, list[str], str]:
    """Return the text before our section, the metadata keys we own, and the text after it; a new section goes last.

    Raises:
        OutputError: One of the two marks is missing, or a mark is repeated.
    """
    begins, ends = list(_BEGIN.finditer(body)), list(_END.finditer(body))
    if not begins and not ends:
        newline = "\r\n" if "\r\n" in body else "\n"
        kept = body.rstrip("\r\n")
        return f"{kept}{newline * 2}" if kept else newline, [], newline
    if len(begins) != 1 or len(ends) != 1 or begins[0].end() > ends[0].start():
        raise OutputError(
            "expected one t5g2:begin and one t5g2:end after it",
            where=f"the existing {CARD_FILE}",
            hint="fix these marks, or replace or keep the card",
        )
    return body[: begins[0].start()], begins[0][1].split(), body[ends[0].end() :]


def _metadata(content: CardContent) -> Metadata:
    """Return the metadata that this tool writes, by key."""
    known = list(dict.fromkeys(source.repo for source in content.sources if source.repo is not None))
    stated: dict[str, str | list[str]] = {}
    if known:
        stated["base_model"] = known[0] if len(known) == 1 else known
        # The Hub has four values for the relation; these two come closest, and the card describes what was really done.
        stated["base_model_relation"] = "merge" if len(content.sources) > 1 else "finetune"
    stated |= {"library_name": "transformers", "pipeline_tag": content.template.pipeline, **content.license.metadata}
    return {**stated, "tags": ["t5g2convert", *content.template.tags]}


def _changes(card: Card, owned: list[str], stated: Metadata) -> tuple[list[str], dict[str, str | None]]:
    """Return the keys that we own from now on, and the changes to the metadata for `Card.joined`."""
    ours: list[str] = []
    changes: dict[str, str | None] = {}
    for group in (_BASE_KEYS, LICENSE_KEYS, ("library_name",), ("pipeline_tag",)):
        if any(key not in owned and key in card.entries and not card.entries[key].empty for key in group):
            continue
        new = [key for key in group if key in stated]
        # Keep a license that was copied from the source's card as long as that card is not available.
        keep = group is LICENSE_KEYS and not new
        ours += [key for key in group if key in new or (keep and key in owned and key in card.entries)]
        changes |= {key: _yaml(key, stated[key]) for key in new}
        removed = [] if keep else [key for key in group if key in owned and key in card.entries and key not in new]
        changes |= dict.fromkeys(removed)
    tags = card.entries.get("tags")
    if tags is None or tags.readable:
        value = None if tags is None else tags.value
        found = (value,) if isinstance(value, str) else value or ()
        missing = [tag for tag in stated["tags"] if tag not in found]
        changes |= {"tags": _yaml("tags", [*found, *missing])} if missing else {}
    return ours, changes


def _yaml(key: str, value: str | list[str]) -> str:
    """Return one key of the metadata in the form that huggingface_hub writes."""
    return str(yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False)).strip()
