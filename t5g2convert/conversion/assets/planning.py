"""The files beside the weights: which are copied from the source, which are made, and of what."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.checkpoint.hub.model import fetch, read_held
from t5g2convert.checkpoint.inputs import SOURCE, named, role_of
from t5g2convert.checkpoint.manifest import encode_json
from t5g2convert.checkpoint.tokenizer.chat_templates import held, is_template
from t5g2convert.conversion.assets.aux_files import PlannedFile, TokenChange
from t5g2convert.conversion.assets.tokenizer import PatchedTokenizer, TokenMove, patch_tokenizer
from t5g2convert.conversion.assets.tokenizer_config import processor_config, refuse_use, tokenizer_config
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.resolve import Resolution
from t5g2convert.mapping.schema import PROCESSOR_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, TokenizerFiles, WeightMap
from t5g2convert.mapping.template import fill

SPECIAL_TOKENS_FILE: Final = "special_tokens_map.json"
TEMPLATE_FILES: Final = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True)
class FilesBeside:
    """The files beside the weights, what became of the tokenizer's tokens, and notes."""

    files: tuple[PlannedFile, ...]
    tokens: tuple[TokenChange, ...]
    notes: tuple[str, ...]


def plan_files(weight_map: WeightMap, resolution: Resolution) -> FilesBeside:
    """Plan the files beside the weights: the source's tokenizer, and the image processor of the tower's checkpoint.

    Args:
        weight_map: The map, which says what is carried over and what is made.
        resolution: The map applied to the source.

    Raises:
        CheckpointError: A file of the source cannot be read, or does not fit the model.
    """
    source = resolution.checkpoints[SOURCE]
    folder = source.path
    carried = [copied(source, name) for name in held(source, weight_map.files.carry)]
    made: list[PlannedFile] = []
    tokens: tuple[TokenChange, ...] = ()
    notes: list[str] = []
    if (declared := weight_map.files.tokenizer) is not None:
        moves, has_file = _moves(declared, resolution), source.holds(TOKENIZER_FILE)
        patched = _patch(declared, moves, resolution, folder) if has_file else None
        if patched is not None:
            tokens = patched.changes
        elif moves and has_file:
            notes.append(f"tokenizer.json is copied as it is: it knows no {moves[0].token} to be moved")
            moves = []
        made += _tokenizer_files(declared, moves, resolution, patched)
    if weight_map.files.processor is not None and "vision" in resolution.model.features:
        filled = fill(weight_map.files.processor, resolution.values, resolution.model.features)
        role = role_of("vision", resolution.checkpoints)
        document, reads = processor_config(filled, resolution.checkpoints[role])
        origins = tuple(named(role, name) for name in ("config.json", *reads))
        made.append(PlannedFile(PROCESSOR_FILE, origins, encode_json(document)))
    files = (*made, *carried)
    notes += _notes(files, tokens, source, converted=weight_map.extracts is None)
    return FilesBeside(files, tokens, tuple(notes))


def copied(source: Checkpoint, name: str) -> PlannedFile:
    """A file of the source, as it is now; of one that is on the Hub only the size is known."""
    path = source.path / name
    if source.hub is not None and not path.exists():
        return PlannedFile(name, (name,), identity=FileIdentity.elsewhere(source.hub.files[name].size))
    try:
        return PlannedFile(name, (name,), identity=FileIdentity.of(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None


def _moves(declared: TokenizerFiles, resolution: Resolution) -> list[TokenMove]:
    """The tokens whose ids the plan moved."""
    before, after = resolution.model.values, resolution.values
    return [
        TokenMove(item.token, item.replaces, int(before[item.id]), int(after[item.id]))  # type: ignore[arg-type]
        for item in declared.moved
        if before[item.id] != after[item.id]
    ]


def _patch(
    declared: TokenizerFiles, moves: Sequence[TokenMove], resolution: Resolution, folder: Path
) -> PatchedTokenizer | None:
    """What is exchanged in the source's tokenizer.json; None where it stays as it is."""
    if not moves:
        return None
    # All that a plan reads of a model of the Hub, beside headers and small files.
    fetch(resolution.checkpoints[SOURCE], [TOKENIZER_FILE])
    return patch_tokenizer(
        folder / TOKENIZER_FILE,
        moves,
        declared.special,
        rows=resolution.dims["vocab"],
        required="vision" in resolution.model.features,
    )


def _tokenizer_files(
    declared: TokenizerFiles, moves: Sequence[TokenMove], resolution: Resolution, patched: PatchedTokenizer | None
) -> Iterator[PlannedFile]:
    """tokenizer.json and tokenizer_config.json."""
    source = resolution.checkpoints[SOURCE]
    if source.holds(TOKENIZER_FILE) and patched is not None:
        yield PlannedFile(TOKENIZER_FILE, (TOKENIZER_FILE,), None, patched.splices, patched.identity)
    elif source.holds(TOKENIZER_FILE):
        yield copied(source, TOKENIZER_FILE)
    if moves and (special := read_held(source, SPECIAL_TOKENS_FILE)) is not None:
        refuse_use(special, moves, source.path / SPECIAL_TOKENS_FILE)
    given = read_held(source, TOKENIZER_CONFIG_FILE)
    if given is None and not source.holds(TOKENIZER_FILE):
        return
    additions: Mapping[str, Any] = fill(declared.config, resolution.values, resolution.model.features)
    path = source.path / TOKENIZER_CONFIG_FILE
    # What becomes special does so in both files.
    special_too = declared.special if patched is not None else ()
    config = tokenizer_config(given or {}, additions, moves, special_too, path)
    if config != (given or {}):
        reads = () if given is None else (TOKENIZER_CONFIG_FILE,)
        yield PlannedFile(TOKENIZER_CONFIG_FILE, reads, encode_json(config))
    elif given is not None:
        yield copied(source, TOKENIZER_CONFIG_FILE)


def _notes(
    files: tuple[PlannedFile, ...], tokens: tuple[TokenChange, ...], source: Checkpoint, *, converted: bool
) -> Iterator[str]:
    names = {file.name for file in files}
    if TOKENIZER_FILE not in names:
        yield "the source has no tokenizer.json: the output cannot read text"
    for change in tokens:
        if change.replaces is not None:
            yield f"tokenizer.json: {change.token} takes the place of {change.replaces}, id {change.target}"
    if not converted:
        return
    if any(name in TEMPLATE_FILES or is_template(name) for name in names) or "chat_template" in (
        read_held(source, TOKENIZER_CONFIG_FILE) or {}
    ):
        yield "the chat template is the source's: it was written for a decoder without an encoder"
