"""The section `merged` of a manifest: the adapter that was merged into a model."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from t5g2convert.checkpoint.families.config_section import Number
from t5g2convert.checkpoint.manifest_section import Digest, Section


class MergedTargets(Section):
    """Tensors to which the same multiple of a product was added: W + scale * B A.

    Attributes:
        names: Their names, with `{layer}` where the tensors of all layers are among them.
        rank: The rank of the product.
        scale: The factor of the product.
    """

    names: Annotated[list[str], Field(min_length=1)]
    rank: PositiveInt
    scale: Number


class MergeRecord(Section):
    """The adapter that was merged into the source; every tensor that is not a target is the source's.

    Attributes:
        method: The kind of the adapter.
        adapter: The sha256 of its files, by name.
        targets: The changed tensors, by rank and scale.
        tensors: Number of changed tensors.
        before: The adapter that was merged into the source before, after its last training.
    """

    method: Literal["lora"]
    adapter: Annotated[dict[str, Digest], Field(min_length=1)]
    targets: Annotated[list[MergedTargets], Field(min_length=1)]
    tensors: NonNegativeInt
    before: "MergeRecord | None" = None
