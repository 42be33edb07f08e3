"""vision_parity: both vision towers compute the same values from the same pixels, stage by stage."""

from collections.abc import Callable

import torch
from torch import Tensor

from t5g2convert.parity.first_difference import first_difference
from t5g2convert.parity.measures import Difference
from t5g2convert.parity.reports.report import Check, Drift
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import not_finite


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
    """Compare two towers, and return the source's features with the check.

    Args:
        source: The tower of the source, or of the donor.
        target: The target's tower.
        pixels_BNYX: The images.
        projected: Whether both must have the same projector; otherwise they are compared before it.
        normed: Whether both must have the same norm before the projector; read only if `projected` is False.
        tolerance: Largest relative difference that passes.
        progress: Called with a few words at every stage.

    Returns:
        vision_parity, and the source's image features, [B, mm_tokens_per_image, text width]; if `projected` is False,
        the states of the patches, [B, patches, vision width].

    Raises:
        CheckpointError: The source's own states are not finite.
        UsageError: float16 overflows.
    """
    depths = source.settings.num_hidden_layers, target.settings.num_hidden_layers
    if depths[0] != depths[1]:
        detail = f"the source's tower has {depths[0]} layers, the target's has {depths[1]}"
        return Check("vision_parity", False, detail), source.features(pixels_BNYX, projected=projected)
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
            raise not_finite(f"the source's own image states after {name}", source.weights)
        drifts.append(difference.drift(name))
        if difference.max_abs and departs is None:
            inside = first_difference(ours, [before[0]], theirs, [before[1]], None)
            departs = f"{name}, {inside}" if inside else name
        # Free these before the next stages are read.
        del ours, theirs
    passed = difference.within(tolerance)
    size = "x".join(map(str, pixels_BNYX.shape[-2:]))
    what = "image features" if projected else "tower states before the projector"
    detail = f"{what} of {pixels_BNYX.shape[0]} image(s) of {size}: {difference}"
    if not passed:
        detail += f"; departs at {departs}"
    figures = difference.figures(departs=departs, drifts=tuple(drifts))
    return Check("vision_parity", passed, detail, figures=figures), expected
