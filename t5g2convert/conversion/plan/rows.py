"""The number of rows of the embedding table to keep; the ids in use decide it, not the size of the table."""

import math
import struct
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.file_names import GENERATION_FILE, TOKENIZER_CONFIG_FILE
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.header import CONFIG_NAMES, element_bytes
from t5g2convert.checkpoint.hub.open_and_fetch import read_held, read_range
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, VISION_FROM, Role
from t5g2convert.checkpoint.tokenizer.files import Tokenizer
from t5g2convert.checkpoint.tokenizer.ids_in_use import IdsInUse, UsedId
from t5g2convert.checkpoint.tokenizer.special_ids import IMAGE_IDS, config_ids, generation_ids
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.name_patterns import expand, root_of
from t5g2convert.mapping.operations import TakeRows
from t5g2convert.mapping.resolution import SUBJECTS, read_model
from t5g2convert.mapping.schema import WeightMap

IMAGE_VALUES: Final = ("boi_token_index", "eoi_token_index", "image_token_index")
KEEP_HINT: Final = "--keep-rows keeps them"
MOST_NAMED: Final = 5

MOST_SPREADS: Final = 8.0
"""Distance from the centre, in spreads, from which a row is an outlier. Random rows of a real model's width stay
within it; of tables with rows of 8 numbers, one in 400 has a row beyond it (simulated)."""

LEAST_SPREAD: Final = 0.02
"""Smaller relative differences are rounding: bfloat16 has 8 bits."""


@dataclass(frozen=True, slots=True)
class KeptRows:
    """The number of rows of the target's embedding table, and notes on the choice."""

    rows: int
    notes: tuple[str, ...] = ()


def kept_rows(
    weight_map: WeightMap, checkpoints: Mapping[Role, Checkpoint], table: Role, tokenizer: Tokenizer, *, keep: bool
) -> KeptRows:
    """Decide which rows of the embedding table the target keeps.

    Args:
        weight_map: The map, which states to how many rows a table may be cut.
        checkpoints: The checkpoints, by role.
        table: The role of the checkpoint that gives the table.
        tokenizer: The source's tokenizer.
        keep: Keep all rows in any case.

    Raises:
        CheckpointError: An id in use has no row, or a tokenizer file has an id that is not valid.
        HubError: The Hub does not provide a file, or cannot be reached.
        MappingError: The map is for other families.
    """
    source = checkpoints[SOURCE]
    model = read_model(weight_map, source)
    owner = model if table == SOURCE else read_model(weight_map, checkpoints[table], subject=SUBJECTS[table])
    rows = owner.dims["rows"]
    cut = weight_map.vocabulary.cut.get(rows, rows)
    seeing: Role = VISION_FROM if VISION_FROM in checkpoints else SOURCE
    tokens = model if seeing == SOURCE else read_model(weight_map, checkpoints[seeing], subject=SUBJECTS[seeing])
    files = weight_map.files.tokenizer
    moved = {item.token: _number(tokens, item.id) for item in (() if files is None else files.moved)}
    ids = IdsInUse(cut, rows, moved)
    moving = {_number(tokens, name) for name in weight_map.vocabulary.moved}
    for used in _special_ids(weight_map, checkpoints, tokenizer, tokens, seeing, moving):
        ids.add(used)
    ids.add_tokenizer(tokenizer)
    if ids.beyond is not None:
        raise _no_row(ids.beyond, rows)
    remarks = tuple(ids.remarks)
    if "vision" in tokens.features:
        _check_image_token(ids, tokenizer, donated=seeing != SOURCE)
    if keep:
        reason = (
            f"all {rows} rows of the embedding table are kept, as requested" if cut != rows else "no row would be cut"
        )
        return KeptRows(rows, (*remarks, f"--keep-rows: {reason}{_image_token(tokens, cut, rows)}"))
    if cut == rows:
        return KeptRows(rows, remarks)
    if ids.spare is not None:
        reason = f"all {rows} rows of the embedding table are kept, not {cut}: {ids.spare}"
        return KeptRows(rows, (*remarks, reason + _image_token(tokens, cut, rows)))
    if ids.has_vocabulary:
        return KeptRows(cut, remarks)
    kept, reason = _compare_spare_rows(weight_map, checkpoints[table], cut, rows)
    return KeptRows(rows if kept else cut, (*remarks, reason + (_image_token(tokens, cut, rows) if kept else "")))


def _special_ids(
    weight_map: WeightMap,
    checkpoints: Mapping[Role, Checkpoint],
    tokenizer: Tokenizer,
    tokens: SourceModel,
    seeing: Role,
    moved: Collection[int],
) -> Iterator[UsedId]:
    """Yield the ids that configs name, except the image token's if the map moves it: its id moves too."""
    images = "vision" in tokens.features
    for role in (role for role in (SOURCE, DECODER_FROM) if role in checkpoints):
        checkpoint = checkpoints[role]
        for field, number in config_ids(checkpoint.config, images=False):
            yield UsedId(number, field, checkpoint.path / "config.json")
        settings = tokenizer.settings if role == SOURCE else read_held(checkpoint, TOKENIZER_CONFIG_FILE)
        for file, document in (
            (GENERATION_FILE, read_held(checkpoint, GENERATION_FILE)),
            (TOKENIZER_CONFIG_FILE, settings),
        ):
            for field, number in generation_ids(document or {}):
                # The image token of the tokenizer moves with the model's.
                if number not in moved and (file == GENERATION_FILE or field not in IMAGE_IDS):
                    yield UsedId(number, field, checkpoint.path / file)
    for name in (name for name in IMAGE_VALUES if images and name not in weight_map.vocabulary.moved):
        yield UsedId(_number(tokens, name), name, checkpoints[seeing].path / "config.json")


def _number(model: SourceModel, name: str) -> int:
    value = model.values[name]
    assert type(value) is int, "the schema asks for a whole number"
    return value


def _no_row(used: UsedId, rows: int) -> CheckpointError:
    hint = (
        "resize the table, model.resize_token_embeddings(len(tokenizer)), or remove the token from the tokenizer files"
    )
    if "token " not in used.what:
        hint = f"set {used.what} to the id of a token that has a row"
    return CheckpointError(f"{used.finding}, but the embedding table has {rows} rows", where=used.where, hint=hint)


def _image_token(tokens: SourceModel, cut: int, rows: int) -> str:
    """Describe the effect of kept rows on the image token."""
    if "vision" in tokens.features and cut <= (number := _number(tokens, "image_token_index")) < rows:
        return f"; image_token_index stays {number}"
    return ""


def _check_image_token(ids: IdsInUse, tokenizer: Tokenizer, *, donated: bool) -> None:
    """Refuse a tokenizer that has, at the image token's id, another token than it names, or than the donor has.

    A source may give its image token any name if all of its files agree.
    """
    others = [used for token, used in ids.at_moved.items() if token not in ids.moved]
    if others and (donated or len(ids.at_moved) > len(others)):
        elsewhere = "is the donor's image token" if donated else f"is {', '.join(ids.moved)} in another file"
        raise CheckpointError(
            f"{others[0].finding}, which {elsewhere}",
            where=others[0].where,
            hint="use a unique id for the token",
        )
    named = (tokenizer.settings or {}).get("image_token")
    if ids.at_moved and type(named) is str and named not in ids.at_moved:
        (token, used), *_ = ids.at_moved.items()
        raise CheckpointError(
            f"image_token is {named!r}, the token that config.json means is {token!r}, {used.number}",
            where=tokenizer.checkpoint.path / TOKENIZER_CONFIG_FILE,
        )


def _compare_spare_rows(weight_map: WeightMap, checkpoint: Checkpoint, cut: int, rows: int) -> tuple[bool, str]:
    """Decide from their values whether to keep the rows that no file mentions, and explain it in a note."""
    stored = _find_table(weight_map, checkpoint, rows)
    if stored is None or stored.entry.dtype not in CONFIG_NAMES:
        # The map does not match this checkpoint; planning refuses it later.
        return False, "the spare rows of the embedding table were not checked"
    width = stored.entry.shape[1]
    size = width * element_bytes(stored.entry.dtype)
    start = stored.entry.start + cut * size
    data = read_range(checkpoint, stored.file, start, start + (rows - cut) * size)
    found = [cut + number for number in rows_that_stand_out(data, stored.entry.dtype, width)]
    if not found:
        return False, (
            f"without a tokenizer it is unknown whether rows {cut} to {rows - 1} of the embedding table are in use; "
            f"they look alike, and are cut as random fill; rows trained alike or hardly look so too ({KEEP_HINT})"
        )
    named = ", ".join(map(str, found[:MOST_NAMED]))
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return True, (
        f"all {rows} rows of the embedding table are kept, not {cut}: without a tokenizer it is unknown which are "
        f"in use, and among the last {rows - cut} these are unlike the others and may be trained: {named}{more}"
    )


def _find_table(weight_map: WeightMap, checkpoint: Checkpoint, rows: int) -> StoredTensor | None:
    """Return the embedding table, under any spelling of its name."""
    for row in weight_map.weights:
        if row.from_ is None or not isinstance(row.op, TakeRows):
            continue
        root = root_of(row.from_)
        for spelling in weight_map.roots[root] if root is not None else ("",):
            for _, name in expand(row.from_, {} if root is None else {root: spelling}, {}):
                stored = checkpoint.tensors.get(name)
                if stored is not None and len(stored.entry.shape) == 2 and stored.entry.shape[0] == rows:
                    return stored
    return None


def rows_that_stand_out(data: bytes, dtype: str, width: int) -> list[int]:
    """Return the numbers, from 0, of rows that are unlike most others and so may be trained.

    Untrained rows may be filled with random numbers, with one repeated row, or with zeros. Rows are compared by three
    measures: the length, the distance from the median row, and the mean. The centre and the spread of a measure come
    from the shortest interval that holds half of the rows, so trained rows do not hide each other as long as they are
    fewer than half. Not found are rows that were all trained alike, and a row that hardly moved.

    Args:
        data: The stored bytes of the rows.
        dtype: Their safetensors dtype: BF16, F16 or F32.
        width: Number of elements in a row.
    """
    values = _decoded(data, dtype)
    rows = [values[start : start + width] for start in range(0, len(values), width)]
    broken = {number for number, row in enumerate(rows) if not all(map(math.isfinite, row))}
    sound = [number for number in range(len(rows)) if number not in broken]
    if not sound:
        return sorted(broken)
    lengths = [_root_mean_square(rows[number]) for number in sound]
    typical = median(lengths)
    middle = [median(column) for column in zip(*(rows[number] for number in sound), strict=True)]
    # If all rows are equal, distances are only rounding: add a fraction of the length to all of them.
    floor = LEAST_SPREAD * typical or 1e-30
    distances = [_root_mean_square([a - b for a, b in zip(rows[number], middle, strict=True)]) for number in sound]
    measures = (
        [math.log(length + floor) for length in lengths],
        [math.log(distance + floor) for distance in distances],
        [math.fsum(rows[number]) / width / (length or 1.0) for number, length in zip(sound, lengths, strict=True)],
    )
    found = {sound[place] for measure in measures for place in _outliers(measure)}
    return sorted(broken | found)


def _outliers(values: Sequence[float]) -> list[int]:
    ordered = sorted(values)
    half = (len(ordered) + 1) // 2
    width, start = min((ordered[at + half - 1] - ordered[at], at) for at in range(len(ordered) - half + 1))
    centre = (ordered[start] + ordered[start + half - 1]) / 2
    # Half of a normal distribution lies within 0.674 standard deviations of its mean.
    spread = max(width / (2 * 0.674), LEAST_SPREAD)
    return [place for place, value in enumerate(values) if abs(value - centre) > MOST_SPREADS * spread]


def _root_mean_square(row: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in row) / len(row))


def _decoded(data: bytes, dtype: str) -> Sequence[float]:
    """Decode stored bytes, which are little-endian."""
    count = len(data) // element_bytes(dtype)
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        words = array("I", (word << 16 for (word,) in struct.iter_unpack("<H", data)))
        return memoryview(words).cast("B").cast("f").tolist()
    return struct.unpack(f"<{count}{'e' if dtype == 'F16' else 'f'}", data)
