"""What a user may ask of a conversion beside its source; everything here decides the output's bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from t5g2convert.checkpoint.dtypes import BY_CONFIG_NAME
from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.checkpoint.hub.model import Origin
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, Role
from t5g2convert.checkpoint.sources import OtherOrigins
from t5g2convert.conversion.plan.layer_spec import LayerSpec, parse_layers
from t5g2convert.conversion.plan.types import DEFAULT_SHARD_BYTES
from t5g2convert.errors import MappingError, UsageError
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.weightmap import did_you_mean

KEEP: Final = "keep"
"""`--dtype` and `--rope-scaling` that change nothing."""

ROPE_FACTORS: Final = ("rope_full_factor", "rope_factor")
"""The value that `--rope-scaling` sets: that of full layers, or of all layers where a family has one for all."""

PROJECTORS: Final = ("copy", "zeros", "aligned")

TABLES: Final[Mapping[str, Role]] = {"source": SOURCE, "decoder-from": DECODER_FROM}
"""`--embedding-from`, and the role that it names."""

SMALLEST_WINDOW: Final = 2
"""With a window of 1, T5Gemma 2's generate with a cache fails in transformers 5.24: keys and mask differ by one."""

PARTS: Final = ("encoder", "decoder")
"""What `part` may take out of an encoder-decoder."""

UNRECORDED: Final = frozenset({"mapping", "part", "decoder_from", "vision_from"})
"""Options that the manifest has in other words: a map by its sha256, other checkpoints by their files."""


class PlanOptions(OtherOrigins, total=False):
    """The keyword arguments of `plan` and `convert`; see `Options`."""

    mapping: str | None
    part: str | None
    dtype: str
    max_shard_bytes: int
    embedding_from: str
    encoder_layers: LayerSpec | None
    decoder_layers: LayerSpec | None
    projector: str | None
    ridge: float
    rope_scaling: str
    sliding_window: int | None
    preset: str | None
    keep_rows: bool
    drop_heads: bool


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the output's bytes, beside the source.

    Attributes:
        mapping: Name of a shipped map or path of one's own; by default the shipped one for the source's model type.
        part: `encoder` or `decoder` to take that out of an encoder-decoder; None to convert a decoder-only model.
        dtype: `keep`, or `bfloat16`, `float16` or `float32` to cast all tensors to.
        max_shard_bytes: Largest size of one output file's tensors, in bytes.
        decoder_from: A Gemma 3 checkpoint folder, or as a str also a model of the Hub, whose layers the decoder gets;
            it has the width and the vocabulary of the source, and may differ in all else.
        embedding_from: Whose embedding table both stacks get: `source`, or `decoder-from`.
        encoder_layers: The layers of its parent that the encoder takes, from 0: `first:N`, a range `A:B` or `A:B:STEP`,
            a list of both as `0,3,5:12`, or their numbers; None for all.
        decoder_layers: The same of the decoder.
        vision_from: A Gemma 3 checkpoint folder, or as a str also a model of the Hub, whose vision tower a source
            without images gets.
        projector: How that tower's projector comes to the source's width: `copy` (for equal widths), `zeros`, or
            `aligned` by least squares between both embedding tables; None for `copy` where it fits, else `zeros`.
        ridge: Penalty on large maps for `aligned`, as a part of the mean square of the donor's embedding columns.
        rope_scaling: `keep`, or `linear:F`: positions in full layers (in all, where a family has one RoPE for all) are
            divided by F, and as many more are allowed.
        sliding_window: Tokens that a sliding layer sees; None for the source's.
        preset: Name of a set of settings in the map, as `t5gemma-2-270m-270m`; the other options win over it.
        keep_rows: Keep all rows of the embedding table, also where no id in use has the last ones; the image token then
            keeps its id.
        drop_heads: Leave out heads for classes, rewards or values, as the map names them; such a source is refused
            otherwise.

    Raises:
        UsageError: An option has no meaning.
    """

    mapping: str | None = None
    part: str | None = None
    dtype: str = KEEP
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    decoder_from: Origin | None = None
    embedding_from: str = "source"
    encoder_layers: LayerSpec | None = None
    decoder_layers: LayerSpec | None = None
    vision_from: Origin | None = None
    projector: str | None = None
    ridge: float = 0.0
    rope_scaling: str = KEEP
    sliding_window: int | None = None
    preset: str | None = None
    keep_rows: bool = False
    drop_heads: bool = False

    def __post_init__(self) -> None:
        if self.part is not None and self.part not in PARTS:
            raise UsageError(f"unknown part {self.part!r}", hint=f"expected {', '.join(PARTS)}")
        if self.dtype != KEEP and self.dtype not in BY_CONFIG_NAME:
            raise UsageError(f"unknown dtype {self.dtype!r}", hint=f"expected {KEEP}, {', '.join(BY_CONFIG_NAME)}")
        if self.max_shard_bytes < 1:
            raise UsageError(f"a shard of at most {self.max_shard_bytes} bytes holds nothing")
        if self.embedding_from not in TABLES:
            raise UsageError(f"unknown table {self.embedding_from!r}", hint=f"expected {', '.join(TABLES)}")
        if self.decoder_from is None and self.embedding_from != "source":
            raise UsageError("--embedding-from decoder-from is for another parent", hint="give one with --decoder-from")
        for part, spec in self._asked_layers():
            # Frozen for everybody else: what is kept are the numbers.
            object.__setattr__(self, f"{part}_layers", parse_layers(spec, f"--{part}-layers"))
        if self.projector is not None and self.projector not in PROJECTORS:
            raise UsageError(f"unknown projector {self.projector!r}", hint=f"expected {', '.join(PROJECTORS)}")
        if self.vision_from is None and self.projector is not None:
            raise UsageError("--projector is for the tower of a donor", hint="give one with --vision-from")
        if not 0 <= self.ridge < math.inf:
            raise UsageError(f"a ridge of {self.ridge} has no meaning", hint="0 or more; 1e-6 is little")
        if self.ridge and self.projector != "aligned":
            raise UsageError("--ridge is for --projector aligned")
        if self.sliding_window is not None and not SMALLEST_WINDOW <= self.sliding_window <= MAX_INTEGER:
            raise UsageError(
                f"a sliding window of {self.sliding_window} tokens is out of range",
                hint=f"expected {SMALLEST_WINDOW} to {MAX_INTEGER}",
            )
        if (factor := self._rope_factor()) is not None:
            # One spelling of a number, so that one conversion has one manifest.
            text = str(int(factor)) if factor.is_integer() else str(factor)
            object.__setattr__(self, "rope_scaling", f"linear:{text}")

    def _rope_factor(self) -> float | None:
        if self.rope_scaling == KEEP:
            return None
        kind, _, text = self.rope_scaling.partition(":")
        try:
            factor = float(text) if kind == "linear" else math.nan
        except ValueError:
            factor = math.nan
        if math.isnan(factor):
            raise UsageError(
                f"unknown RoPE scaling {self.rope_scaling!r}", hint=f"expected {KEEP}, or linear:F as linear:8"
            )
        if not 1 / MAX_INTEGER <= factor <= MAX_INTEGER:
            raise UsageError(
                f"a RoPE factor of {factor} has no meaning", hint=f"expected one from 1/{MAX_INTEGER} to {MAX_INTEGER}"
            )
        return factor

    def _asked_layers(self) -> list[tuple[str, LayerSpec]]:
        asked = {"encoder": self.encoder_layers, "decoder": self.decoder_layers}
        return [(part, spec) for part, spec in asked.items() if spec is not None]

    @property
    def drops(self) -> frozenset[str]:
        """The options that drops of a map wait for."""
        return frozenset({"drop_heads"} if self.drop_heads else ())

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """By part, the numbers of the layers that are asked for."""
        return {part: tuple(map(int, numbers)) for part, numbers in self._asked_layers()}

    def settings(self, values: Mapping[str, Any], weight_map: WeightMap, whose: str = "the source") -> dict[str, Any]:
        """The config values that the target shall have otherwise, by their names.

        Args:
            values: Those of the source, or of one stack's parent.
            weight_map: The map, which has the presets.
            whose: What has the values, for errors.

        Raises:
            MappingError: The map has no such preset, or it is for another size of model.
        """
        settings = {} if self.preset is None else _preset(self.preset, values, weight_map, whose)
        factor = self._rope_factor()
        if factor is not None:
            name = next((name for name in ROPE_FACTORS if name in values), None)
            if name is None:
                raise MappingError(f"--rope-scaling is not for mapping {weight_map.name!r}")
            longer = factor / values[name]
            positions = values["max_position_embeddings"] * longer
            # Cut before it is made an integer: a source's own factor may be so small that this is infinite.
            settings |= {name: factor, "max_position_embeddings": int(min(max(positions, 1), MAX_INTEGER))}
        if self.sliding_window is not None:
            settings["sliding_window"] = self.sliding_window
        return settings

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: the options that differ from their defaults and are no paths."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in values.items()
            if value != default and name not in UNRECORDED
        }


def _preset(name: str, values: Mapping[str, Any], weight_map: WeightMap, whose: str) -> dict[str, Any]:
    preset = weight_map.presets.get(name)
    if preset is None:
        known = ", ".join(weight_map.presets) or "none"
        raise MappingError(
            f"mapping {weight_map.name!r} has no preset {name!r}",
            hint=did_you_mean(name, weight_map.presets) or f"it has {known}",
        )
    for field, needed in preset.requires.items():
        if values[field] != needed:
            raise MappingError(
                f"preset {name} is for {field} {needed}, {whose} has {values[field]}",
                hint="give --rope-scaling and --sliding-window themselves",
            )
    return dict(preset.settings.given)


def recorded_options(record: Mapping[str, Any]) -> PlanOptions:
    """The options that a manifest tells of."""
    return PlanOptions(**record)  # type: ignore[typeddict-item, no-any-return]
