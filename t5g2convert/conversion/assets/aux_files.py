"""The auxiliary files (tokenizer, processor, chat templates): which are copied, which are made, and from what."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from t5g2convert.checkpoint.file_names import (
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.checkpoint.hub.open_and_fetch import read_held
from t5g2convert.checkpoint.manifest import encode_json
from t5g2convert.checkpoint.sources import Role, named, plain_name, role_in, role_of
from t5g2convert.checkpoint.tokenizer.chat_templates import held, is_template
from t5g2convert.checkpoint.tokenizer.files import Tokenizer
from t5g2convert.conversion.assets.tokenizer import (
    TokenChange,
    TokenMove,
    edit_tokenizer,
    refuse_replaced,
    tokenizer_config,
)
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.resolution import Resolution
from t5g2convert.mapping.schema import TokenizerFiles, WeightMap
from t5g2convert.mapping.template import fill

TEMPLATE_FILES: Final = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """An auxiliary file of the output.

    Attributes:
        name: Its name in the output.
        reads: The source files that it is made from; a copied file has one.
        text: Its bytes; None if the file is copied.
        identity: The identity of the copied or edited file when the plan was made.
    """

    name: str
    reads: tuple[str, ...]
    text: bytes | None = None
    identity: FileIdentity | None = None

    @property
    def how(self) -> Literal["copied", "changed", "made"]:
        """Whether it is copied, changed from the source's file of the same name, or made."""
        if self.text is None:
            return "copied"
        return "changed" if self.reads == (self.name,) else "made"


@dataclass(frozen=True, slots=True)
class AuxFiles:
    """The auxiliary files, the tokens that change in them, and notes."""

    files: tuple[PlannedFile, ...]
    tokens: tuple[TokenChange, ...]
    notes: tuple[str, ...]


def plan_files(weight_map: WeightMap, resolution: Resolution, tokenizer: Tokenizer) -> AuxFiles:
    """Plan the auxiliary files: the source's tokenizer, and the image processor of the tower's checkpoint.

    Args:
        weight_map: The map, which declares the files to copy and the files to make.
        resolution: The map applied to the source.
        tokenizer: The source's tokenizer.

    Raises:
        CheckpointError: A file of the source cannot be read, or does not fit the model.
        HubError: The Hub does not provide a file, or cannot be reached.
    """
    files: list[PlannedFile] = []
    tokens: tuple[TokenChange, ...] = ()
    notes: list[str] = []
    if (declared := weight_map.files.tokenizer) is not None:
        moves = _moves(declared, resolution)
        edited = _edited(declared, moves, resolution, tokenizer)
        if edited is not None:
            planned, tokens = edited
            files.append(planned)
        elif tokenizer.checkpoint.holds(TOKENIZER_FILE):
            files.append(copied(tokenizer.checkpoint, TOKENIZER_FILE))
            if moves:
                notes.append(f"tokenizer.json is copied unchanged: it has no {moves[0].token} to move")
                moves = []
        # A token that becomes special does so in both files.
        files += _settings(declared, moves, declared.special if edited is not None else (), resolution, tokenizer)
    if weight_map.files.processor is not None and "vision" in resolution.model.features:
        filled = fill(weight_map.files.processor, resolution.values, resolution.model.features)
        role = role_of("vision", resolution.checkpoints)
        document, reads = processor_config(filled, resolution.checkpoints[role])
        origins = tuple(named(role, name) for name in ("config.json", *reads))
        files.append(PlannedFile(PROCESSOR_FILE, origins, encode_json(document)))
    source = tokenizer.checkpoint
    files += [copied(source, name) for name in held(source, weight_map.files.carry)]
    notes += _notes(files, tokens, tokenizer, converted=weight_map.extracts is None)
    return AuxFiles(tuple(files), tokens, tuple(notes))


def downloaded(file: PlannedFile, checkpoints: Mapping[Role, Checkpoint]) -> PlannedFile:
    """Return an auxiliary file with the identity of the file it copies, if that was remote when the plan was made."""
    if file.identity is None or file.identity != FileIdentity.elsewhere(file.identity.size):
        return file
    name = file.reads[0]
    return replace(file, identity=FileIdentity.of(checkpoints[role_in(name)].path / plain_name(name)))


def copied(source: Checkpoint, name: str) -> PlannedFile:
    """Plan to copy a file of the source in its present state; of a file on the Hub, only the size is known."""
    path = source.path / name
    if source.hub is not None and not path.exists():
        return PlannedFile(name, (name,), identity=FileIdentity.elsewhere(source.hub.files[name].size))
    try:
        return PlannedFile(name, (name,), identity=FileIdentity.of(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None


def _moves(declared: TokenizerFiles, resolution: Resolution) -> list[TokenMove]:
    """Return the tokens with different ids in source and target."""
    before, after = resolution.model.values, resolution.values
    return [
        TokenMove(item.token, item.replaces, int(before[item.id]), int(after[item.id]))  # type: ignore[arg-type]
        for item in declared.moved
        if before[item.id] != after[item.id]
    ]


def _edited(
    declared: TokenizerFiles, moves: Sequence[TokenMove], resolution: Resolution, tokenizer: Tokenizer
) -> tuple[PlannedFile, tuple[TokenChange, ...]] | None:
    """Plan tokenizer.json with the tokens moved; return None if no token moves in it."""
    if not moves or tokenizer.json is None:
        return None
    edited = edit_tokenizer(
        tokenizer.json,
        moves,
        declared.special,
        rows=resolution.dims["vocab"],
        required="vision" in resolution.model.features,
    )
    if edited is None:
        return None
    text, changes = edited
    return PlannedFile(TOKENIZER_FILE, (TOKENIZER_FILE,), text if changes else None, tokenizer.json.identity), changes


def _settings(
    declared: TokenizerFiles,
    moves: Sequence[TokenMove],
    special: Sequence[str],
    resolution: Resolution,
    tokenizer: Tokenizer,
) -> Iterator[PlannedFile]:
    """Plan tokenizer_config.json."""
    source = tokenizer.checkpoint
    if moves and tokenizer.special_tokens is not None:
        refuse_replaced(tokenizer.special_tokens, moves, source.path / SPECIAL_TOKENS_FILE)
    settings = tokenizer.settings
    if settings is None and not source.holds(TOKENIZER_FILE):
        return
    additions = fill(declared.config, resolution.values, resolution.model.features)
    config = tokenizer_config(settings or {}, additions, moves, special, source.path / TOKENIZER_CONFIG_FILE)
    if config != (settings or {}):
        yield PlannedFile(
            TOKENIZER_CONFIG_FILE, () if settings is None else (TOKENIZER_CONFIG_FILE,), encode_json(config)
        )
    elif settings is not None:
        yield copied(source, TOKENIZER_CONFIG_FILE)


def _notes(
    files: Sequence[PlannedFile], tokens: Sequence[TokenChange], tokenizer: Tokenizer, *, converted: bool
) -> Iterator[str]:
    names = {file.name for file in files}
    if TOKENIZER_FILE not in names:
        yield "the source has no tokenizer.json: the output cannot tokenize text"
    for change in tokens:
        if change.replaces is not None:
            yield f"tokenizer.json: {change.token} replaces {change.replaces}, id {change.target}"
    if converted and (
        any(name in TEMPLATE_FILES or is_template(name) for name in names)
        or "chat_template" in (tokenizer.settings or {})
    ):
        yield "the chat template is the source's: it was written for a decoder without an encoder"


def processor_config(defaults: Mapping[str, Any], source: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return processor_config.json of the output, and the source files that it is made from.

    The settings of the image processor are the source's, or the map's if the source has none.

    Args:
        defaults: The map's settings, with the source's values filled in.
        source: The source, or the donor of its tower.

    Raises:
        CheckpointError: The source's processor makes images of another size than the model reads, or another number of
            tokens.
    """
    reads = [name for name in (PROCESSOR_FILE, PREPROCESSOR_FILE) if source.holds(name)]
    processor = read_held(source, PROCESSOR_FILE) or {}
    where, image = source.path / PROCESSOR_FILE, processor.pop("image_processor", None)
    if image is None and PREPROCESSOR_FILE in reads:
        where = source.path / PREPROCESSOR_FILE
        image = read_held(source, PREPROCESSOR_FILE)
    if not isinstance(image := image or {}, dict):
        raise CheckpointError("image_processor is not an object", where=where)
    expected = defaults["image_processor"]
    _check_equal(processor, defaults, "image_seq_length", source.path / PROCESSOR_FILE)
    _check_equal(image, defaults, "image_seq_length", where)
    _check_equal(image, expected, "size", where)
    settings = {key: value for key, value in image.items() if key != "processor_class"}
    fixed = {key: defaults[key] for key in ("processor_class",) if key in defaults}
    kind = {key: expected[key] for key in ("image_processor_type",) if key in expected}
    return {**defaults, **processor, **fixed, "image_processor": {**expected, **settings, **kind}}, tuple(reads)


def _check_equal(found: Mapping[str, Any], expected: Mapping[str, Any], key: str, where: Path) -> None:
    """Refuse a setting that contradicts the model's sizes."""
    if found.get(key) is not None and key in expected and found[key] != expected[key]:
        raise CheckpointError(f"{key} is {found[key]!r}, but config.json requires {expected[key]!r}", where=where)
