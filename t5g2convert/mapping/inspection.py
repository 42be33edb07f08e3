"""Describe a checkpoint from its config and headers, for `t5g2 inspect`.

A source is compared with the rows of its map; a T5Gemma or T5Gemma 2 folder with the tensors that its config implies.
Unlike a plan, an inspection lists problems instead of refusing the checkpoint.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.altered_weights import remarks
from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.families.gemma3 import TOWERLESS, is_towerless
from t5g2convert.checkpoint.families.registry import TARGETS, expected_tensors
from t5g2convert.checkpoint.families.t5gemma2_spellings import as_published, is_t5gemma2
from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.file_store import HubOrigin
from t5g2convert.checkpoint.folder import Checkpoint, refuse_unheld, some
from t5g2convert.checkpoint.hub.open_and_fetch import open_source
from t5g2convert.mapping.library import map_for
from t5g2convert.mapping.name_patterns import expand
from t5g2convert.mapping.resolution import find_layout, read_model
from t5g2convert.mapping.row_resolution import dropped_names
from t5g2convert.mapping.schema import Row, WeightMap, count_parameters

DROPPED: Final = "dropped"
"""Part of a tensor that the map drops."""

TIED: Final = "tied copy"
"""Part of an encoder-decoder's tensor that repeats the embedding table."""

UNEXPECTED: Final = "unexpected"
"""Part of a tensor that neither the map nor the config implies."""

HEAD: Final = "head"
"""Part of a tensor that another class adds, like a classifier's head."""

_TARGET_PREFIXES: Final = {
    "lm_head.": TIED,
    "model.decoder.embed_tokens.": TIED,
    "model.decoder.": "decoder",
    "model.encoder.embed_tokens.": "embedding",
    "model.encoder.": "encoder",
}
"""The part of an encoder-decoder's tensor by the start of its name; the first match counts."""


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """A tensor of the checkpoint, and its part."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The description of a checkpoint.

    Attributes:
        path: The folder; for a model on the Hub, its folder in the Hub's cache.
        family: The `model_type` of its config.
        layout: The spelling of each root. For an encoder-decoder `{"names": "published"}`, the spelling of each root if
            loaders also accept other names, or `different from the published one` if tensors are missing.
        parameters: Number of parameters by part, with `total`; tied copies are not counted.
        dtypes: Number of parameters by safetensors dtype.
        files: Bytes by safetensors file.
        facts: The settings that determine the computation, by their names in config.json.
        missing: Names that the config implies but the checkpoint lacks.
        unexpected: Names that neither the map nor the config implies.
        tensors: All tensors, ordered by name.
        notes: Other findings.
        hub: The model on the Hub, if it is one.
    """

    path: Path
    family: str
    layout: Mapping[str, str]
    parameters: Mapping[str, int]
    dtypes: Mapping[str, int]
    files: Mapping[str, int]
    facts: Mapping[str, Any]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    tensors: tuple[InspectedTensor, ...]
    notes: tuple[str, ...]
    hub: HubOrigin | None = None

    @property
    def title(self) -> str:
        """Return the family and origin."""
        place = str(self.path) if self.hub is None else f"{self.hub.repo}@{self.hub.revision}"
        return f"{self.family} in {place}"

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """Return the inspection as `t5g2 inspect --json` prints it."""
        document: dict[str, Any] = {
            "path": str(self.path),
            "family": self.family,
            "layout": dict(self.layout),
            "parameters": dict(self.parameters),
            "dtypes": dict(self.dtypes),
            "files": [{"name": name, "bytes": size} for name, size in self.files.items()],
            "config": dict(self.facts),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "notes": list(self.notes),
        }
        if self.hub is not None:
            document["hub"] = self.hub.to_json()
        if tensors:
            document["tensors"] = [
                {
                    "name": item.name,
                    "part": item.part,
                    "dtype": item.dtype,
                    "shape": list(item.shape),
                    "file": item.file,
                }
                for item in self.tensors
            ]
        return document


def inspect(source: Path | str) -> Inspection:
    """Describe a Gemma, T5Gemma or T5Gemma 2 checkpoint without reading any weights.

    Example:
        >>> inspect("google/gemma-3-270m").parameters["total"]

    Args:
        source: A folder; a str may also name a model on the Hub, org/name[@revision].

    Raises:
        CheckpointError: The checkpoint is damaged, or its family is unknown.
        HubError: The Hub does not have the model, refuses access, or cannot be reached.
    """
    checkpoint = open_source(source, allow_unheld=True)
    target = TARGETS.get(str(checkpoint.config.get("model_type")))
    if target is None or target.read_settings is None:
        return _inspect_source(checkpoint)
    refuse_unheld(checkpoint)
    return _inspect_target(checkpoint, target.read_settings(checkpoint.config, checkpoint.path / "config.json"))


def _inspect_source(checkpoint: Checkpoint) -> Inspection:
    weight_map = map_for(checkpoint.config, checkpoint.path / "config.json").map
    model = read_model(weight_map, checkpoint)
    layout = find_layout(weight_map, model, checkpoint)
    parts: dict[str, str] = {}
    for row in weight_map.weights:
        if row.from_ is not None and row.op.carries and row.applies(model.features):
            parts |= {name: _source_part(row) for _, name in expand(row.from_, layout, model.dims)}
    missing = [name for name in parts if name not in checkpoint.tensors]
    dropped = _dropped_names(weight_map, model, layout)
    parts |= {name: DROPPED for name in dropped if name in checkpoint.tensors}
    values = model.values
    facts = {name: values[name] for name in _SOURCE_FACTS} | {"rope_parameters": _rope_facts(values)}
    facts |= {name: values[name] for name in _SOFTCAPS if values[name] is not None}
    notes = [TOWERLESS] if is_towerless(model) else []
    if unheld := [name for name in checkpoint.unheld if name not in dropped]:
        notes.append(f"{INDEX_FILE} names {len(unheld)} tensor(s) that no shard holds: {some(unheld)}")
    return _inspection(checkpoint, layout, parts, missing, facts, notes)


_SOURCE_FACTS: Final = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "query_pre_attn_scalar", "sliding_window", "layer_types", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


_SOFTCAPS: Final = ("attn_logit_softcapping", "final_logit_softcapping")


def _rope_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_theta" in values:
        return {"rope_theta": values["rope_theta"], "factor": values["rope_factor"]}
    return {
        "full_attention": {"rope_theta": values["rope_full_theta"], "factor": values["rope_full_factor"]},
        "sliding_attention": {"rope_theta": values["rope_sliding_theta"]},
    }


def _source_part(row: Row) -> str:
    """Return the part of a row in a decoder-only source: a tensor of both stacks counts as decoder."""
    return "decoder" if "decoder" in row.to else next(iter(row.to))


def _dropped_names(weight_map: WeightMap, model: SourceModel, layout: Mapping[str, str]) -> set[str]:
    """Return the names that the map drops, with or without an option."""
    drops = (drop for drop in weight_map.drop if drop.applies(model.features))
    return {name for drop in drops for _, name in dropped_names(drop, layout, model.dims)}


def _inspect_target(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Inspection:
    implied = {item.name: item.part for item in expected_tensors(checkpoint.config, checkpoint.path / "config.json")}
    if is_t5gemma2(checkpoint):
        published = as_published(checkpoint)
        parts = {stored: implied[name] for name, stored in published.spelled.items()}
        parts |= dict.fromkeys(published.copies, TIED) | dict.fromkeys(published.heads, HEAD)
        missing = [name for name in implied if name not in published.spelled]
        if published.respelled and not missing:
            return _inspection(checkpoint, published.layout, parts, missing, facts)
    else:
        parts = {name: _target_part(name) for name in checkpoint.tensors} | implied
        missing = [name for name in implied if name not in checkpoint.tensors]
    layout = "different from the published one" if missing else "published"
    return _inspection(checkpoint, {"names": layout}, parts, missing, facts)


def _target_part(name: str) -> str:
    return next((part for prefix, part in _TARGET_PREFIXES.items() if name.startswith(prefix)), UNEXPECTED)


def _inspection(
    checkpoint: Checkpoint,
    layout: Mapping[str, str],
    parts: Mapping[str, str],
    missing: list[str],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Inspection:
    tensors = tuple(
        InspectedTensor(name, parts.get(name, UNEXPECTED), stored.entry.dtype, stored.entry.shape, stored.file)
        for name, stored in sorted(checkpoint.tensors.items())
    )
    counted: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for item in tensors:
        elements = checkpoint.tensors[item.name].entry.elements
        dtypes[item.dtype] += elements
        counted[item.part] += elements
    return Inspection(
        path=checkpoint.path,
        family=str(checkpoint.config["model_type"]),
        layout=layout,
        parameters=count_parameters(counted),
        dtypes=dict(dtypes.most_common()),
        files={name: header.identity.size for name, header in checkpoint.files.items()},
        facts=facts,
        missing=tuple(missing),
        unexpected=tuple(item.name for item in tensors if item.part == UNEXPECTED),
        tensors=tensors,
        notes=(*checkpoint.notes, *remarks(checkpoint), *notes),
        hub=checkpoint.hub,
    )
