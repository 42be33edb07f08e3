"""The aligned projector: a donor's projector mapped to the embedding space of a model with another width.

A donor's projector maps to the donor's embedding space of width d; the target embeds the same vocabulary in width h.
The rows of both embedding tables are the same tokens, so the tables define a map between the two spaces: M [d, h] is
the least-squares solution of E_d M = E_t, with E_d [rows, d] and E_t [rows, h],

    M = argmin ||E_d M - E_t||² + p ||M||²   (Frobenius norms),   so   (E_d' E_d + p I) M = E_d' E_t.

`ridge` has no unit: p = ridge * trace(E_d' E_d) / d, that is, ridge times the mean energy of a column of E_d. A table
in other units, or with every row twice, gives the same map. With the default of 0, M is the least-squares solution
itself. Rows that do not determine M (fewer rows than columns, dependent columns) are refused; a ridge makes the problem
well-posed.

The scale: Gemma 3 multiplies token embeddings by the square root of their width, but not image features. So image
features f P_d are on the scale of the rows of sqrt(d) E_d, and must be mapped to the scale of the rows of sqrt(h) E_t,
about sqrt(h) E_d M: divide by sqrt(d), apply M, multiply by sqrt(h). As a matrix applied from the right,

    P = P_d M sqrt(h / d)   [vision width, h].

These are the exact roots. A model that runs in bfloat16 uses rounded roots, 25.25 for a width of 640, but the dtype at
run time is not known here.

E_d' E_d and E_d' E_t are summed in float64 over blocks of rows, so memory holds a few matrices [d, d] for any number of
rows. Products of two bfloat16 are exact in float64. The normal equations square the condition number, which is
harmless: float64 has 53 bits, the result is stored with 8, 11 or 24, and a table that would leave fewer is refused. The
columns of E_d are first scaled to equal energy, so that a few columns of large values do not make a harmless table look
ill-conditioned.

The bytes are the same on every run with the same numpy, processor and number of BLAS threads. Other machines may order
sums differently, and round an element to the other neighbour if its exact value is close to the middle.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from t5g2convert.checkpoint.header import element_bytes
from t5g2convert.conversion.write.copy import read_exactly
from t5g2convert.conversion.write.numerics import first_nonfinite, rounded, widened
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]
    import numpy as np
    from numpy.typing import NDArray


ROWS_AT_ONCE: Final = 2048
"""Rows of a block, large enough that summing products costs little compared to computing them."""


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding table in an open safetensors file.

    Attributes:
        tensor: Its name.
        dtype: Its safetensors dtype: BF16, F16 or F32.
        rows: Number of rows, one per token.
        width: Number of columns.
        file: Name of the file.
        fd: Descriptor of the file.
        start: First byte of the table in the file.
    """

    tensor: str
    dtype: str
    rows: int
    width: int
    file: str
    fd: int
    start: int

    @property
    def where(self) -> str:
        """The name of the table, for errors."""
        return f"{self.file}, tensor {self.tensor}"


def paired_blocks(
    donor: Table, target: Table, rows: int, progress: Progress
) -> Iterator[tuple["NDArray[np.float64]", "NDArray[np.float64]"]]:
    """Yield the same rows of both tables, [n, donor width] and [n, width]; the next block reuses the arrays.

    Raises:
        CheckpointError: A table cannot be read, or holds NaN or infinity.
    """
    import numpy as np

    tables = donor, target
    raw = [bytearray(ROWS_AT_ONCE * table.width * element_bytes(table.dtype)) for table in tables]
    blocks = [np.empty((ROWS_AT_ONCE, table.width)) for table in tables]
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - first)
        for table, memory, block in zip(tables, raw, blocks, strict=True):
            row_bytes = table.width * element_bytes(table.dtype)
            data = memoryview(memory)[: count * row_bytes]
            read_exactly(table.fd, data, table.start + first * row_bytes, table.file)
            found = first_nonfinite(data, table.dtype)
            if found is not None:
                row = first + found[0] // table.width
                raise CheckpointError(f"holds {found[1]} in row {row}, expected finite numbers", where=table.where)
            block[:count] = widened(data, table.dtype).reshape(count, table.width)
            progress(len(data))
        yield blocks[0][:count], blocks[1][:count]


LARGEST_CONDITION: Final = 1e9
"""Largest condition number of the scaled normal equations. The relative error of the map is about 1e-16 times this,
far below the 2e-3 of bfloat16."""

PROBES: Final = 16
"""Random directions for estimating the norm of the inverse: 4 times too small for less than one table in a million."""


BLAS_BYTES: Final = 4 << 20
"""Memory that BLAS keeps in addition to its arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The map from a donor's embedding space to a target's.

    Attributes:
        map: M, [donor width, width], float64.
        residual: ||E_d M - E_t|| / ||E_t||: 0 is a perfect fit, 1 is as bad as a map of zeros.
        rows: Number of rows of both tables that were used.
        ridge: Penalty on the size of the map, relative to the mean energy of a column of the donor's table.
    """

    map: "Matrix"
    residual: float
    rows: int
    ridge: float


def peak_memory(donor_width: int, width: int, element: int) -> int:
    """Return the bytes that `align` takes at its peak; `element` is the number of bytes of a stored value.

    There are three steps, and each frees the memory of the previous one: the sums over blocks of rows, the solution
    (LAPACK copies both sides), and the residual. Measured: 0.96 to 1.02 of the arrays.
    """
    square, oblong = 8 * donor_width**2, 8 * donor_width * (width + PROBES)
    rows = ROWS_AT_ONCE * ((8 + element) * (donor_width + width) + 4 * max(donor_width, width))
    return int(1.05 * max(2 * square + 2 * oblong + rows, 2 * square + 4 * oblong, square + 5 * oblong)) + BLAS_BYTES


def align(
    donor: Table,
    target: Table,
    *,
    rows: int,
    ridge: float = 0.0,
    progress: Progress = silent,
) -> Alignment:
    """Return the least-squares map from a donor's embedding table to a target's.

    Both tables are read once, or twice if the fit is so good that only differences of rows show the residual.

    Args:
        donor: The donor's table.
        target: The target's table; its rows are the same tokens.
        rows: Number of rows to use, from the first.
        ridge: Penalty on the size of the map; 0 is plain least squares.
        progress: Called with the number of bytes of every block that was read.

    Raises:
        CheckpointError: A table has too few rows, cannot be read, or holds NaN or infinity; or the rows do not
            determine the map.
        UsageError: The ridge is not 0 or more.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise UsageError(f"the ridge must be 0 or more, got {ridge}")
    for table in (donor, target):
        if not 0 < rows <= table.rows:
            raise CheckpointError(f"has {table.rows} rows, expected {rows}", where=table.where)
    equations = _summed(donor, target, rows, progress)
    if not equations.energy:
        raise CheckpointError(f"holds only zeros in its first {rows} rows", where=target.where)
    penalty = ridge * float(equations.gram.trace()) / donor.width
    sizes, scaled_map, condition = _solved(equations, penalty)
    if not condition <= LARGEST_CONDITION:
        advice = f"try a larger --ridge, for example {100 * ridge:g}" if ridge else "try --ridge 1e-6"
        raise CheckpointError(
            f"{rows} rows do not determine the map: condition number {condition:.0e}, "
            f"expected at most {LARGEST_CONDITION:.0e}",
            where=donor.where,
            hint=advice,
        )
    square = _squared_residual(equations, sizes, scaled_map, penalty)
    # Freed before the second reading: a large donor takes a few hundred megabytes.
    energy, map_ = equations.energy, scaled_map * sizes[:, None]
    del equations
    if square is None:
        square = _measured_residual(donor, target, rows, map_, progress)
    return Alignment(map_, math.sqrt(square / energy), rows, ridge)


def carry(name: str, projector: bytes, dtype: str, alignment: Alignment, target: str) -> bytes:
    """Return the donor's projector in the target's embedding space, [vision width, width], rounded once.

    Args:
        name: The target tensor, for errors.
        projector: Bytes of the donor's `mm_input_projection_weight`, [vision width, donor width].
        dtype: Its safetensors dtype.
        alignment: The map from the donor to the target.
        target: The safetensors dtype of the result.

    Raises:
        CheckpointError: The donor's projector holds NaN or infinity, or a value is too large for the target dtype.
    """
    donor_width, width = alignment.map.shape
    found = first_nonfinite(memoryview(projector), dtype)
    if found is not None:
        raise CheckpointError(
            f"the donor's projector holds {found[1]} in row {found[0] // donor_width}", where=f"tensor {name}"
        )
    features = widened(memoryview(projector), dtype).reshape(-1, donor_width)
    return rounded(name, features @ alignment.map * math.sqrt(width / donor_width), target)


@dataclass(slots=True, eq=False)
class _Equations:
    """Sums over rows: E_d' E_d [d, d], E_d' E_t [d, h], and ||E_t||²."""

    gram: "Matrix"
    cross: "Matrix"
    energy: float


def _summed(donor: Table, target: Table, rows: int, progress: Progress) -> _Equations:
    import numpy as np

    sums = _Equations(np.zeros((donor.width, donor.width)), np.zeros((donor.width, target.width)), 0.0)
    gram, cross = np.empty_like(sums.gram), np.empty_like(sums.cross)
    for from_, to in paired_blocks(donor, target, rows, progress):
        # numpy calls dsyrk for a matrix times its own transpose, which takes half the time.
        sums.gram += np.matmul(from_.T, from_, out=gram)
        sums.cross += np.matmul(from_.T, to, out=cross)
        sums.energy += float(np.vdot(to, to))
    return sums


def _solved(equations: _Equations, penalty: float) -> tuple["Matrix", "Matrix", float]:
    """Scale and solve the equations, in place.

    Returns:
        The scale of the columns of E_d, [d]; the map of the scaled columns, [d, h]; and the condition number of the
        scaled equations in the Frobenius norm, infinite if they are singular.
    """
    import numpy as np

    gram, cross = equations.gram, equations.cross
    energies = gram.diagonal() + penalty
    sizes = 1 / np.sqrt(np.where(energies > 0, energies, 1.0))
    gram *= sizes
    gram *= sizes[:, None]
    cross *= sizes[:, None]
    np.fill_diagonal(gram, energies > 0)
    # For random signs s, the mean of |A⁻¹ s|² is the square of the Frobenius norm of A⁻¹.
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (len(gram), PROBES))
    right = np.hstack([cross, signs])
    try:
        with np.errstate(all="ignore"):
            solution = np.linalg.solve(gram, right)
            inverse = float(np.linalg.norm(solution[:, cross.shape[1] :])) / math.sqrt(PROBES)
    except np.linalg.LinAlgError:
        solution, inverse = right, math.inf
    return sizes, solution[:, : cross.shape[1]], float(np.linalg.norm(gram)) * inverse


def _squared_residual(equations: _Equations, sizes: "Matrix", scaled_map: "Matrix", penalty: float) -> float | None:
    """Return ||E_d M - E_t||² as ||E_t||² - 2 <M, E_d' E_t> + <M, E_d' E_d M>; None if it is lost in rounding.

    A perfect fit leaves about 1e-8 of ||E_t||, and more if large values of the map cancel each other.
    """
    import numpy as np

    gram, cross, energy = equations.gram, equations.cross, equations.energy
    shrunk = penalty * float(np.square(scaled_map * sizes[:, None]).sum())
    square = energy - 2 * float(np.vdot(scaled_map, cross)) + float(np.vdot(scaled_map, gram @ scaled_map)) - shrunk
    magnitudes = np.abs(scaled_map)
    size = energy + shrunk + float(np.vdot(magnitudes, 2 * np.abs(cross) + np.abs(gram, out=gram) @ magnitudes))
    # Sums of 262,144 products have an error of about 6e-14 of the summands; six digits of the residual must be right.
    return square if square > 3e-8 * size else None


def _measured_residual(donor: Table, target: Table, rows: int, map_: "Matrix", progress: Progress) -> float:
    """Return ||E_d M - E_t||², computed row by row."""
    import numpy as np

    square = 0.0
    for from_, to in paired_blocks(donor, target, rows, progress):
        to -= from_ @ map_
        square += float(np.vdot(to, to))
    return square
