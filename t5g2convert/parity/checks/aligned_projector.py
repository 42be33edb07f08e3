"""The aligned projector, recomputed: a donor's projector mapped into an embedding space of another width.

Legend: R rows of both embedding tables, D the donor's width, H the target's width, V the width of image features.

The expected projector follows from three tensors and a number: the donor's projector P_VD, the tables E_RD and T_RH,
and the ridge r. With p = r * mean over columns of the sum of squares of E_RD, and A_DD = E'E + p I,

    W_VH = sqrt(H / D) P A⁻¹ E'T

(P A⁻¹ E'T maps image features with the least-squares map of the donor's tokens. The factor is needed because models
scale token embeddings by the square root of their width, but not image features.) The converter solves for the map
A⁻¹ E'T and applies it to P. This module solves from the other side, by Cholesky: A Y = P', then W = sqrt(H / D) Y' E'T.

Rounding is bounded for each element. Entry kl of E'E, and of its Cholesky factor times its own transpose, has an error
of about g d_k d_l; entry kl of E'T has one of about g d_k c_l. Here d and c are the lengths of the columns of E (with
the ridge) and of T. Independent errors of these sizes move W_ij by g sqrt(H / D) u_i v_j, with
u_i² = sum over k of (Y_ki d_k)² and v_j² = c_j² + sum over k of (M_kj d_k)². A stored element is correct if it differs
from the value computed here by at most this bound plus half a unit in its last place.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

RowReader = Callable[[int, int], Tensor]
"""Rows `start` to `stop` of an embedding table, [stop - start, width], in any floating dtype."""

ROWS_AT_ONCE: Final = 1024
PANELS: Final = 8
"""Blocks of rows in which E'E is computed. Only its upper triangle is, so more blocks mean less work."""

WORST_UNCERTAINTY: Final = 2.0**-9
"""Largest relative rounding error with which a projector is still judged: the rounding of bfloat16."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedProjector:
    """The expected stored projector.

    Attributes:
        projector_VH: Its value before rounding to the stored dtype, float64; NaN if the tables do not determine it.
        uncertainty_VH: Largest difference by rounding between that value and the converter's before storing; float64.
        residual: Lower and upper bound of ||E M - T|| / ||T|| for the map M of the projector.
    """

    projector_VH: Tensor
    uncertainty_VH: Tensor
    residual: tuple[float, float]


@torch.inference_mode()
def aligned_projector(
    projector_VD: Tensor, donor: RowReader, target: RowReader, *, rows: int, ridge: float
) -> ExpectedProjector:
    """Compute from both tables the projector that a conversion with `--projector aligned` must have written.

    Args:
        projector_VD: The donor's projector, in any floating dtype.
        donor: Rows of the donor's embedding table.
        target: Rows of the target's embedding table.
        rows: Number of rows to use, from the first.
        ridge: The converter's `--ridge`.
    """
    projector_VD = projector_VD.double()
    gram_DD, cross_DH, lengths_H = _sums(donor, target, rows)
    penalty = ridge * float(gram_DD.diagonal().mean())
    gram_DD.diagonal().add_(penalty)
    lengths_D = gram_DD.diagonal().sqrt()
    factor_DD, failed = torch.linalg.cholesky_ex(gram_DD)
    if failed:
        nothing = torch.full((len(projector_VD), len(lengths_H)), math.nan, dtype=torch.float64)
        return ExpectedProjector(nothing, nothing, (math.nan, math.nan))
    del gram_DD
    map_DH = torch.cholesky_solve(cross_DH, factor_DD)
    adjoint_DV = torch.cholesky_solve(projector_VD.T, factor_DD)

    # Rounding errors of a sum add up like a random walk. 16 is ten times the largest difference measured between two
    # computations.
    unit = 16 * math.sqrt(max(rows, len(lengths_D))) * 2.0**-53
    reach_V = (adjoint_DV * lengths_D[:, None]).norm(dim=0)
    reach_H = torch.hypot(lengths_H, (map_DH * lengths_D[:, None]).norm(dim=0))
    scale = math.sqrt(len(lengths_H) / len(lengths_D))
    energy = float(lengths_H.square().sum())
    # The factor's square is the matrix with the ridge.
    left = energy - 2 * float((map_DH * cross_DH).sum())
    left += float((factor_DD.T @ map_DH).square().sum() - penalty * map_DH.square().sum())
    doubt = unit * float(reach_H.square().sum())
    return ExpectedProjector(
        scale * (adjoint_DV.T @ cross_DH),
        scale * unit * torch.outer(reach_V, reach_H),
        (math.sqrt(max(0.0, left - doubt) / energy), math.sqrt((max(0.0, left) + doubt) / energy)),
    )


def projector_faults(name: str, stored_VH: Tensor, expected: ExpectedProjector) -> Iterator[str]:
    """Yield the faults of a stored projector, one per line; every element must be the rounded expected value.

    Args:
        name: Name of the stored tensor.
        stored_VH: The tensor in its stored dtype, which is the dtype it was rounded to.
        expected: The expected projector.
    """
    exact_VH, uncertainty_VH = expected.projector_VH, expected.uncertainty_VH
    if stored_VH.shape != exact_VH.shape:
        yield f"{name} has shape {list(stored_VH.shape)}, expected {list(exact_VH.shape)}"
        return
    doubt = float(uncertainty_VH.norm() / exact_VH.norm())
    if not doubt <= WORST_UNCERTAINTY and exact_VH.any():
        yield f"{name} cannot be judged: {doubt:.0e} of it may be rounding, expected {WORST_UNCERTAINTY:.0e} at most"
        return
    allowed_VH = _spacing(exact_VH, stored_VH.dtype) / 2 + uncertainty_VH
    off_VH = (stored_VH.double() - exact_VH).abs()
    # A comparison with NaN is false, so NaN counts as wrong.
    wrong = (~(off_VH <= allowed_VH)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        yield (
            f"{name}: {len(wrong)} of {exact_VH.numel()} elements are not the donor's projector, aligned; the first, "
            f"[{row}, {column}], is {float(stored_VH[row, column]):.9g}, expected {float(exact_VH[row, column]):.9g}"
        )


def _sums(donor: RowReader, target: RowReader, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return E'E [D, D], E'T [D, H] and the lengths of the columns of T [H], summed in float64 over blocks of rows."""
    width = donor(0, 0).shape[1]
    sums_DC = torch.zeros(width, width + target(0, 0).shape[1], dtype=torch.float64)
    squares_H = torch.zeros(sums_DC.shape[1] - width, dtype=torch.float64)
    edges = torch.linspace(0, width, PANELS + 1).int().tolist()
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        # Side by side, C = D + H columns: one product gives both sums.
        both_NC = torch.cat([donor(start, stop).double(), target(start, stop).double()], 1)
        for first, last in pairwise(edges):
            sums_DC[first:last, first:].addmm_(both_NC[:, first:last].T, both_NC[:, first:])
        squares_H += both_NC[:, width:].square().sum(0)
    for first, last in pairwise(edges):
        sums_DC[last:, first:last] = sums_DC[first:last, last:width].T
    return sums_DC[:, :width].clone(), sums_DC[:, width:].clone(), squares_H.sqrt()


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of a dtype at these values; float64."""
    kind = torch.finfo(dtype)
    sizes = values.abs().clamp_min(kind.smallest_normal)
    # frexp's mantissa is in [1/2, 1): dividing by it and by 2 leaves the power of two at or below the value.
    return sizes / torch.frexp(sizes).mantissa / 2 * kind.eps
