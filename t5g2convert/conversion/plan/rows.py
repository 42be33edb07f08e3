"""How many rows of an embedding table are kept: the ids in use decide, not the count of rows."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES, element_bytes
from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.file_names import GENERATION_FILE, TOKENIZER_CONFIG_FILE
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.hub.model import read_held, read_range
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, VISION_FROM, Role
from t5g2convert.checkpoint.tokenizer.files import Tokenizer
from t5g2convert.checkpoint.tokenizer.ids_in_use import IdsInUse, UsedId
from t5g2convert.checkpoint.tokenizer.special_ids import IMAGE_IDS, config_ids, generation_ids
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.names import expand, root_of
from t5g2convert.mapping.operations import TakeRows
from t5g2convert.mapping.resolve import SUBJECTS, read_model
from t5g2convert.mapping.schema import WeightMap

IMAGE_VALUES: Final = ("boi_token_index", "eoi_token_index", "image_token_index")
KEEP_HINT: Final = "--keep-rows keeps them"
MOST_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class KeptRows:
    """The rows of the target's embedding table, and what a user should know of how they were chosen."""

    rows: int
    notes: tuple[str, ...] = ()


def kept_rows(
    weight_map: WeightMap, checkpoints: Mapping[Role, Checkpoint], table: Role, tokenizer: Tokenizer, *, keep: bool
) -> KeptRows:
    """Decide which rows of the embedding table the target keeps.

    Args:
        weight_map: The map, which says to how many rows a table may be cut.
        checkpoints: What is read, by role.
        table: The role of the checkpoint that gives the table.
        tokenizer: The source's tokenizer.
        keep: Keep all rows in any case.

    Raises:
        CheckpointError: An id in use has no row at all, or a tokenizer file has an id that is not one.
        HubError: The Hub does not give a file out, or cannot be reached.
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
        told = f"all {rows} rows of the embedding table are kept, as asked" if cut != rows else "no row would be cut"
        return KeptRows(rows, (*remarks, f"--keep-rows: {told}{_image_token(tokens, cut, rows)}"))
    if cut == rows:
        return KeptRows(rows, remarks)
    if ids.spare is not None:
        told = f"all {rows} rows of the embedding table are kept, not {cut}: {ids.spare}"
        return KeptRows(rows, (*remarks, told + _image_token(tokens, cut, rows)))
    if ids.has_vocabulary:
        return KeptRows(cut, remarks)
    kept, told = _look_at_spare_rows(weight_map, checkpoints[table], cut, rows)
    return KeptRows(rows if kept else cut, (*remarks, told + (_image_token(tokens, cut, rows) if kept else "")))


def _special_ids(
    weight_map: WeightMap,
    checkpoints: Mapping[Role, Checkpoint],
    tokenizer: Tokenizer,
    tokens: SourceModel,
    seeing: Role,
    moved: Collection[int],
) -> Iterator[UsedId]:
    """Yield the ids that configs name. The image token is left out where the map moves it: its id moves there too."""
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
                # The tokenizer's own image token moves with the model's.
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
        "resize the table, model.resize_token_embeddings(len(tokenizer)), or take the token out of the tokenizer files"
    )
    if "token " not in used.what:
        hint = f"give {used.what} the id of a token that has a row"
    return CheckpointError(f"{used.finding}, the embedding table has {rows} rows", where=used.where, hint=hint)


def _image_token(tokens: SourceModel, cut: int, rows: int) -> str:
    """Say what rows that are kept mean for the image token."""
    if "vision" in tokens.features and cut <= (number := _number(tokens, "image_token_index")) < rows:
        return f"; image_token_index stays {number}"
    return ""


def _check_image_token(ids: IdsInUse, tokenizer: Tokenizer, *, donated: bool) -> None:
    """Refuse a tokenizer that has another token at the id of the image token than it names, or than the donor has.

    A source may call its image token as it likes, as long as all of its files do.
    """
    others = [used for token, used in ids.at_moved.items() if token not in ids.moved]
    if others and (donated or len(ids.at_moved) > len(others)):
        elsewhere = "is the donor's image token" if donated else f"is {', '.join(ids.moved)} in another file"
        raise CheckpointError(
            f"{others[0].finding}, which {elsewhere}",
            where=others[0].where,
            hint="give the token an id of its own",
        )
    named = (tokenizer.settings or {}).get("image_token")
    if ids.at_moved and type(named) is str and named not in ids.at_moved:
        (token, used), *_ = ids.at_moved.items()
        raise CheckpointError(
            f"image_token is {named!r}, the token that config.json means is {token!r}, {used.number}",
            where=tokenizer.checkpoint.path / TOKENIZER_CONFIG_FILE,
        )


def _look_at_spare_rows(weight_map: WeightMap, checkpoint: Checkpoint, cut: int, rows: int) -> tuple[bool, str]:
    """Whether to keep rows that no file tells of, by what they hold, and a note on that."""
    stored = _find_table(weight_map, checkpoint, rows)
    if stored is None or stored.entry.dtype not in CONFIG_NAMES:
        # The map does not fit this checkpoint, which is refused elsewhere.
        return False, "the spare rows of the embedding table were not looked at"
    width = stored.entry.shape[1]
    size = width * element_bytes(stored.entry.dtype)
    start = stored.entry.start + cut * size
    from t5g2convert.conversion.plan.spare_rows import rows_that_stand_out

    data = read_range(checkpoint, stored.file, start, start + (rows - cut) * size)
    found = [cut + number for number in rows_that_stand_out(data, stored.entry.dtype, width)]
    if not found:
        return False, (
            f"no tokenizer tells whether rows {cut} to {rows - 1} of the embedding table are in use; they look alike, "
            f"and are cut as random fill; rows that were all trained alike, or hardly, look so too ({KEEP_HINT})"
        )
    named = ", ".join(map(str, found[:MOST_NAMED]))
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return True, (
        f"all {rows} rows of the embedding table are kept, not {cut}: no tokenizer tells which are in use, and among "
        f"the last {rows - cut} these are unlike the others and may be trained: {named}{more}"
    )


def _find_table(weight_map: WeightMap, checkpoint: Checkpoint, rows: int) -> StoredTensor | None:
    """The embedding table, under whichever spelling it is there."""
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
