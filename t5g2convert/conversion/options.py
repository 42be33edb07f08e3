"""The options of `plan`, `convert` and `extract`, shared by the command line, the Python API and the manifest."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.checkpoint.hub.open_and_fetch import Origin
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, Role
from t5g2convert.command_options import CommandOptions, Option
from t5g2convert.conversion.option_values import KEEP, parse_encoder_norm, parse_rope_scaling, parse_shard_size
from t5g2convert.conversion.plan.layer_spec import LayerSpec, parse_layers
from t5g2convert.errors import UsageError
from t5g2convert.progress import Progress

MODELS: Final = "Models and layers"
SETTINGS: Final = "Map and settings"
FILES: Final = "Files"
"""The sections of `--help`."""

Dtype = Literal["keep", "bfloat16", "float16", "float32"]
"""The values of `--dtype`."""

Judge = Callable[[Path], None]
"""Raises an error if it rejects a folder."""

TABLES: Final[Mapping[str, Role]] = {"source": SOURCE, "decoder-from": DECODER_FROM}
"""The role of the checkpoint that each value of `--embedding-from` names."""

SMALLEST_WINDOW: Final = 2
"""With a window of 1, T5Gemma 2's generate with a cache fails in transformers 5.24: keys and mask differ by one."""

DEFAULT_SHARD_BYTES: Final = 5_000_000_000
"""5GB, the shard size of the published checkpoints."""


class PlanOptions(CommandOptions):
    """The options that, together with the source, determine the output's bytes.

    Attributes:
        mapping: Name of a shipped map or path of your own map; by default the shipped map for the source's model type.
        part: `encoder` or `decoder` to extract that part of an encoder-decoder; None to convert a whole model.
        decoder_from: A Gemma 3 checkpoint folder (as a str also a model on the Hub) that gives the decoder its layers.
            It must have the source's width and vocabulary.
        embedding_from: The checkpoint that gives both stacks their embedding table: `source` or `decoder-from`.
        encoder_layers: The layers of its parent that the encoder takes, from 0: `first:N`, a range `A:B` or `A:B:STEP`,
            a list of both like `0,3,5:12`, or the numbers themselves; None for all.
        decoder_layers: The same for the decoder.
        vision_from: A Gemma 3 checkpoint folder (as a str also a model on the Hub) that gives its vision tower to a
            source that does not read images.
        projector: How the tower's projector gets the source's width: `copy` (for equal widths), `zeros`, or
            `aligned` by least squares between both embedding tables; None for `copy` where it fits, else `zeros`.
        ridge: For `aligned`, the penalty on large maps, relative to the mean square of the donor's embedding columns.
        rope_scaling: `keep`, or `linear:F`: positions in full-attention layers (in all layers, if the family has one
            RoPE for all) are divided by F, so inputs may be F times as long.
        sliding_window: Number of tokens that a sliding layer sees; None for the source's.
        encoder_norm: `keep`, or the one factor by which the encoder's final norm multiplies instead of its parent's: a
            number, or `unit` for 1. A real parent's factors are large, and flood a decoder that was not trained.
        preset: Name of a set of settings in the map, like `t5gemma-2-270m-270m`; the other options override it.
        keep_rows: Keep all rows of the embedding table, even if no id in use needs the last ones; the image token then
            keeps its id.
        drop_heads: Leave out the heads for classes, rewards or values that the map names; without this option, a source
            with such a head is refused.
        dtype: `keep`, or the dtype that all tensors are cast to.
        max_shard_bytes: The largest size of one output file's tensors, in bytes.

    Raises:
        UsageError: A value is impossible, or two options contradict each other.
    """

    mapping: Annotated[
        str | None,
        Option("Name of a shipped mapping, or path of your own.", default="by the source's model_type", group=SETTINGS),
    ] = None
    part: Annotated[
        Literal["encoder", "decoder"] | None, Option("Plan an extraction of this part: encoder or decoder.")
    ] = None
    decoder_from: Annotated[
        Origin | None,
        Option(
            "Take the decoder's layers from this Gemma 3 folder or model, of the same width and vocabulary.",
            default="SOURCE",
            group=MODELS,
        ),
    ] = None
    embedding_from: Annotated[
        Literal["source", "decoder-from"],
        Option("The parent that provides the embedding table of both stacks.", group=MODELS),
    ] = "source"
    encoder_layers: Annotated[
        LayerSpec | None,
        Option(
            "Parent layers to use for the encoder, counted from 0: first:N, A:B, A:B:STEP (B excluded), or 0,3,5:12.",
            default="all",
            metavar="SPEC",
            group=MODELS,
        ),
    ] = None
    decoder_layers: Annotated[
        LayerSpec | None, Option("The same for the decoder.", default="all", metavar="SPEC", group=MODELS)
    ] = None
    vision_from: Annotated[
        Origin | None,
        Option("Take the vision tower for a text-only source from this Gemma 3 folder or model.", group=MODELS),
    ] = None
    projector: Annotated[
        Literal["copy", "zeros", "aligned"] | None,
        Option(
            "The projector: copy (the donor's, for equal widths), zeros (untrained), or aligned (the donor's, mapped "
            "by least squares between both embeddings).",
            default="copy for equal widths, else zeros",
            group=MODELS,
        ),
    ] = None
    ridge: Annotated[
        float,
        Option(
            "For --projector aligned: ridge penalty, for example 1e-6; needed if the embeddings determine no map.",
            group=MODELS,
        ),
    ] = 0.0
    rope_scaling: Annotated[
        str,
        Option(
            "keep, or linear:F: divide positions in full layers by F, for inputs F times longer.",
            metavar="SCALING",
            group=SETTINGS,
        ),
    ] = KEEP
    sliding_window: Annotated[
        int | None, Option("Window of sliding layers, in tokens.", default="the source's", group=SETTINGS)
    ] = None
    encoder_norm: Annotated[
        str,
        Option(
            "The encoder's final norm: keep, or the one factor that it multiplies by instead of its parent's, a number "
            "or unit for 1.",
            metavar="keep|unit|FACTOR",
            group=SETTINGS,
        ),
    ] = KEEP
    preset: Annotated[
        str | None,
        Option("Use the settings of a release, for example t5gemma-2-270m-270m.", metavar="NAME", group=SETTINGS),
    ] = None
    keep_rows: Annotated[
        bool,
        Option(
            "Keep all rows of the embedding table; the image token then keeps its id. By itself convert cuts a table "
            "of 262208 rows to 262144 where no id in use has one of the last 64.",
            group=SETTINGS,
        ),
    ] = False
    drop_heads: Annotated[
        bool, Option("Leave out a head for classes, rewards or values; it is refused otherwise.", group=SETTINGS)
    ] = False
    dtype: Annotated[
        Dtype,
        Option("Dtype of the output: keep, bfloat16, float16 or float32.", metavar="DTYPE", group=FILES),
    ] = KEEP
    max_shard_bytes: Annotated[
        int,
        Field(ge=1),
        Option(
            "Maximum size of tensors per file, for example 5G, 500MB or 4GiB; at least 1MB.",
            flag="--max-shard-size",
            metavar="SIZE",
            parse=parse_shard_size,
            default="5GB",
            group=FILES,
        ),
    ] = DEFAULT_SHARD_BYTES

    @field_validator("encoder_layers", "decoder_layers", mode="plain")
    @classmethod
    def _numbers_of_layers(cls, spec: LayerSpec | None, info: ValidationInfo) -> tuple[int, ...] | None:
        return None if spec is None else parse_layers(spec, f"--{info.field_name}".replace("_", "-"))

    @field_validator("rope_scaling")
    @classmethod
    def _one_spelling_of_a_factor(cls, scaling: str) -> str:
        # Normalize the number, so that the same conversion always has the same manifest.
        factor = parse_rope_scaling(scaling)
        return KEEP if factor is None else f"linear:{int(factor) if factor.is_integer() else factor}"

    @field_validator("encoder_norm")
    @classmethod
    def _one_spelling_of_a_norm(cls, norm: str) -> str:
        factor = parse_encoder_norm(norm)
        return KEEP if factor is None else repr(factor).removesuffix(".0")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.decoder_from is None and self.embedding_from != "source":
            raise UsageError(
                "--embedding-from decoder-from requires --decoder-from",
                hint="pass the decoder's parent with --decoder-from",
            )
        if self.vision_from is None and self.projector is not None:
            raise UsageError(
                "--projector requires --vision-from", hint="pass the donor of the tower with --vision-from"
            )
        if not 0 <= self.ridge < math.inf:
            raise UsageError(f"--ridge must be 0 or more, got {self.ridge}", hint="1e-6 is a small penalty")
        if self.ridge and self.projector != "aligned":
            raise UsageError("--ridge applies only to --projector aligned")
        if self.sliding_window is not None and not SMALLEST_WINDOW <= self.sliding_window <= MAX_INTEGER:
            raise UsageError(
                f"--sliding-window must be between {SMALLEST_WINDOW} and {MAX_INTEGER}, got {self.sliding_window}"
            )
        return self

    @property
    def drops(self) -> frozenset[str]:
        """The options that enable drops in a map."""
        return frozenset({"drop_heads"} if self.drop_heads else ())

    @property
    def encoder_factor(self) -> float | None:
        """The one factor of the encoder's final norm; None for its parent's factors."""
        return parse_encoder_norm(self.encoder_norm)

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """The numbers of the layers to take, by part; a part that takes all layers has no entry."""
        chosen = {"encoder": self.encoder_layers, "decoder": self.decoder_layers}
        return {part: tuple(map(int, numbers)) for part, numbers in chosen.items() if numbers is not None}

    def record(self) -> dict[str, Any]:
        """Return the options for the manifest: all that differ from their defaults and are not paths."""
        names = [name for name in PlanOptions.model_fields if name not in UNRECORDED]
        values = self.model_dump(include=set(names), exclude_defaults=True)
        # dtype and max_shard_bytes come first, as in older manifests.
        ordered = sorted(values, key=lambda name: name not in ("dtype", "max_shard_bytes"))
        return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in ordered}

    @classmethod
    def of_record(cls, record: Mapping[str, Any], **others: Any) -> Self:
        """Return the options that a manifest records, and `others`, which it does not.

        Raises:
            UsageError: No conversion records these options.
        """
        options = cls(**record, **others)
        if options.record() != record:
            raise UsageError(f"the options {dict(record)} are not options that a conversion records")
        return options


UNRECORDED: Final = frozenset({"mapping", "part", "decoder_from", "vision_from"})
"""Options that the manifest records in another form: a map by its sha256, other checkpoints by their files."""


class WriteOptions(CommandOptions):
    """The options for writing a planned output; they do not change its bytes.

    Attributes:
        hashing: Compute the sha256 of all files while they are copied, and record it in the manifest.
        flush: Wait until the disk has every byte before the output appears; otherwise a power loss may corrupt it.
        overwrite: Replace an existing output of this tool, at the very end; other folders are never replaced.
        resume: Keep the shards that an earlier run into the same output finished, if their sha256 is correct; and leave
            finished shards for a later run if this one is stopped or the disk fails.
        allow_nonfinite: Copy NaN and infinity; otherwise tensors that hold them are refused.
        progress: Called with the number of bytes just written, from any thread.
        judge: Called with the finished folder before it appears under its name; if it raises, there is no output.

    Raises:
        UsageError: `resume` without `hashing`.
    """

    hashing: Annotated[
        bool,
        Option(
            "Record the sha256 of all files, and check downloads against the Hub's.",
            flag="--hash/--no-hash",
            group=FILES,
        ),
    ] = True
    flush: Annotated[bool, Option("Flush all files to disk, to survive power loss.", group=FILES)] = True
    overwrite: Annotated[
        bool,
        Option(
            "Replace an existing t5g2 output at the very end; a folder that contains anything else is refused.",
            group=FILES,
        ),
    ] = False
    resume: Annotated[
        bool, Option("Keep the shards that an earlier run finished; keep finished shards if interrupted.", group=FILES)
    ] = False
    allow_nonfinite: Annotated[bool, Option("Copy NaN and infinity instead of refusing them.", group=FILES)] = False
    progress: Progress | None = None
    judge: Judge | None = None

    @model_validator(mode="after")
    def _resumes_by_sha256(self) -> Self:
        if self.resume and not self.hashing:
            raise UsageError("--resume needs sha256 to recognise finished shards; leave out --no-hash")
        return self


class ConvertOptions(WriteOptions, PlanOptions):
    """The options of a conversion: those that determine the output's bytes, and those for writing it."""
