"""The drawing of a plan: which tensors of the source go where in the target."""

from collections import Counter
from typing import TYPE_CHECKING

from t5g2convert.checkpoint.sources import DECODER_FROM, VISION_FROM, Role, role_in
from t5g2convert.cli.console import PART_STYLES, size_text

if TYPE_CHECKING:
    from rich.text import Text

    from t5g2convert.conversion.plan.types import Plan

_ROLES = {
    "t5gemma": {
        "embedding": "one matrix for each stack, and for an untied softmax",
        "encoder": "attends both ways",
        "decoder": "cross-attention starts as self-attention",
    },
    "t5gemma2": {
        "embedding": "one matrix: encoder input, decoder input and softmax",
        "encoder": "attends both ways",
        "decoder": "merged attention over [decoder states; encoder output]",
        "vision": "feeds the encoder only",
        "projector": "from image features to the encoder's width",
    },
}
"""What each part does, by the target's `model_type`."""


_OWNERS: dict[Role, str] = {DECODER_FROM: "the other parent's", VISION_FROM: "the donor's"}


def draw_plan(plan: "Plan") -> "Text":
    """Draw a line for each part of the target, joined to the source tensors that fill it."""
    from rich.text import Text

    parts_of: dict[str | None, set[str]] = {}
    for tensor in plan.tensors:
        parts_of.setdefault(tensor.origin, set()).add(tensor.part)
    sources: dict[tuple[Role, tuple[str, ...]], tuple[int, int]] = {}
    computed: Counter[tuple[str, str]] = Counter()
    counts: Counter[str] = Counter()
    for tensor in plan.tensors:
        counts[tensor.part] += 1
        if tensor.content.kind in ("copy", "cast") and tensor.content.source is not None:
            parts = tuple(sorted(parts_of[tensor.origin], key=list(PART_STYLES).index))
            span = tensor.content.source
            number, size = sources.get(key := (role_in(span.file), parts), (0, 0))
            if tensor.part == parts[0]:
                sources[key] = (number + 1, size + span.end - span.start)
        else:
            computed[tensor.part, tensor.content.kind] += 1
    roles = _ROLES.get(plan.config["model_type"], {})
    drawing = Text()
    for (role, parts), (number, size) in sources.items():
        left = f"{number} tensor{'s' if number > 1 else ''}, {size_text(size)}"
        for position, part in enumerate(parts):
            fork = "───" if len(parts) == 1 else "─┬─" if position == 0 else " └─"
            drawing.append(f"  {left if position == 0 else '':<24}")
            drawing.append(f"{fork}────▶ ", PART_STYLES[part])
            drawing.append(f"{part:<10}", f"bold {PART_STYLES[part]}")
            owner = f"{_OWNERS[role]}: " if role in _OWNERS else ""
            drawing.append(f"{counts[part]:>5} tensors   {owner}{roles.get(part, '')}\n")
    for (part, kind), number in computed.items():
        drawing.append(f"  {'computed':<24}")
        drawing.append("───────▶ ", PART_STYLES[part])
        drawing.append(f"{part:<10}", f"bold {PART_STYLES[part]}")
        drawing.append(f"{number:>5} of them    {_computed_role(part, kind, plan)}\n")
    return drawing


def _computed_role(part: str, kind: str, plan: "Plan") -> str:
    if part == "embedding":
        return "the end-of-image row, scaled"
    if kind == "aligned":
        return "the donor's, carried to the source's width by least squares"
    return "zeros, to be trained" if VISION_FROM in plan.sources else "the stub of a model without images"
