"""vision_parity: both towers on the same pixels, stage by stage."""

from collections.abc import Callable

import torch
from torch import Tensor

from t5g2convert.parity.first_difference import first_departure
from t5g2convert.parity.measures import Difference
from t5g2convert.parity.reports.report import Check, Drift
from t5g2convert.reference.overflow import not_finite
from t5g2convert.reference.vision import VisionTower


@torch.inference_mode()
def judge_vision(
    source: VisionTower,
    target: VisionTower,
    pixels_BNYX: Tensor,
    *,
    projected: bool = True,
    normed: bool = True,
    tolerance: float,
    progress: Callable[[str], None],
) -> tuple[Check, Tensor]:
    """Compare two towers, and give the source's image features, [B, mm_tokens_per_image, text width].

    Of towers without a common projector the normed states of the patches, [B, patches, vision width].

    Args:
        source: The tower of the source, or of the donor.
        target: The target's.
        pixels_BNYX: What they look at.
        projected: Whether both have one projector; otherwise they are compared before it, at the normed patch states.
        normed: Whether both have one such norm; without a common projector alone.
        tolerance: Largest relative difference that passes.
        progress: Told what is being done.

    Raises:
        CheckpointError: The source's own tower does not give finite states.
        UsageError: float16 overflows.
    """
    depths = source.settings.num_hidden_layers, target.settings.num_hidden_layers
    if depths[0] != depths[1]:
        said = f"the source's tower has {depths[0]} layers, the target's {depths[1]}"
        return Check("vision_parity", False, said), source.features(pixels_BNYX, projected=projected)
    expected = found = pixels_BNYX
    drifts: list[Drift] = []
    departs: str | None = None
    difference = Difference()
    others = target.stages(projected=projected, normed=normed)
    for name, ours in source.stages(projected=projected, normed=normed):
        theirs = next(others)[1]
        progress(f"vision tower, {name}")
        before = expected, found
        expected, found = ours(expected), theirs(found)
        difference = Difference()
        difference.add(expected, found)
        if not difference.expected_finite:
            raise not_finite(f"the source's own image states behind {name}", source.weights)
        drifts.append(difference.drift(name))
        if difference.max_abs and departs is None:
            inside = first_departure(ours, [before[0]], theirs, [before[1]], None)
            departs = f"{name}, {inside}" if inside else name
        # The next stages are read before the names are bound anew.
        del ours, theirs
    passed = difference.within(tolerance)
    size = "x".join(map(str, pixels_BNYX.shape[-2:]))
    what = "image features" if projected else "tower states before the projector"
    said = f"{what} of {pixels_BNYX.shape[0]} image(s) of {size}: {difference}"
    if not passed:
        said += f"; departs at {departs}"
    return Check(
        "vision_parity", passed, said, figures=difference.figures(departs=departs, drifts=tuple(drifts))
    ), expected
