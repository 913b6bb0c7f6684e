"""Sums over whole tensors that a merge or an edit needs first: for arcs, for σ_ulp, for energies.

All in sixteen lanes a row of 8,192 elements, so the same on every processor. Parts of a tensor may be
summed one by one: where they are multiples of 8,192, only the order of the last additions differs.
"""

import numpy as np
from numpy import float32, uint32, uint64
from numpy.typing import NDArray

from expo.compute.bits import Stored, same_length, up
from expo.compute.jit import compiled
from expo.compute.lanes import LANES, STRIP, end_row, products, whole_groups

Block = NDArray[np.float32]

_SPACING = {  # the smallest normal number and the spacing at 1
    "BF16": (float32(2.0**-126), float32(2.0**-7)),
    "F16": (float32(2.0**-14), float32(2.0**-10)),
    "F32": (float32(2.0**-126), float32(2.0**-23)),
}

_arc_products = products((0, 0), (1, 1), (0, 1))
_squares = products((0, 0))


def arc_sums(a: Stored, b: Stored) -> tuple[float, float, float]:
    """⟨a, a⟩, ⟨b, b⟩, ⟨a, b⟩ for slerp; the lanes are float32, as those of a merge's sums."""
    same_length(a, b)
    a2, b2, ab = _arc_sums(a, b).tolist()
    return a2, b2, ab


@compiled
def _arc_sums(a, b):
    count = uint64(len(a))
    scratch = np.empty((2, STRIP), np.float32)
    lanes, totals = np.zeros((3, LANES), np.float32), np.zeros(3)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        for i in range(size):
            scratch[0, i], scratch[1, i] = up(a[at + i]), up(b[at + i])
        _arc_products(lanes, scratch, whole_groups(scratch, size))
        end_row(lanes, totals, at + STRIP, count)
    return totals


def row_sums(a: Block, b: Block) -> NDArray[np.float64]:
    """The same of every row of two matrices, for NuSLERP: (3, rows), the lanes are float64."""
    same_length(a.reshape(-1), b.reshape(-1))
    return _row_sums(a, b)


@compiled
def _row_sums(a, b):
    width = uint64(a.shape[1])
    scratch = np.empty((2, STRIP), np.float64)
    lanes, sums = np.zeros((3, LANES), np.float64), np.zeros((len(a), 3))
    for row in range(uint64(len(a))):
        for at in range(uint64(0), width, STRIP):
            size = min(STRIP, width - at)
            for i in range(size):
                scratch[0, i], scratch[1, i] = a[row, at + i], b[row, at + i]
            _arc_products(lanes, scratch, whole_groups(scratch, size))
            end_row(lanes, sums[row], at + STRIP, width)
    return sums.T.copy()


def add_column_sums(a: Block, b: Block, totals: NDArray[np.float64]) -> None:
    """Add the same of every column of some rows to `totals`, (3, columns): rows in order, in float64."""
    same_length(a, b, totals)
    same_length(a.T, b.T)
    _add_column_sums(a, b, totals)


@compiled
def _add_column_sums(a, b, totals):
    for row in range(uint64(len(a))):
        for column in range(uint64(a.shape[1])):
            x, y = np.float64(a[row, column]), np.float64(b[row, column])
            totals[0, column] += x * x
            totals[1, column] += y * y
            totals[2, column] += x * y


def nuslerp_coefficients(
    sums: NDArray[np.float64], t: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What NuSLERP gives every vector of a and of b, from ⟨a, a⟩, ⟨b, b⟩, ⟨a, b⟩ of each: (3, vectors).

    `operators.merging.nuslerp_coefficients`, computed in float64.
    """
    norm_a, norm_b = (np.maximum(np.sqrt(square), 1e-7) for square in sums[:2])
    cosine = np.clip(sums[2] / norm_a / norm_b, -1.0, 1.0)
    is_line = 1 - np.square(cosine) <= 1e-16
    angle = np.arccos(np.where(is_line, 0.0, cosine))
    pair = (np.where(is_line, share, np.sin(share * angle) / np.sin(angle)) for share in (1 - t, t))
    one, two = (values.astype(np.float32) for values in pair)
    return one, two


def square_sum(values: Block) -> float:
    """Σx², in float64."""
    return float(_square_sum(values, float32(0), float32(0)))


def ulp_square_sum(values: Block, dtype: str) -> float:
    """Σ ulp(x)² in float64: ulp(x) is the distance from x to the next value of BF16, F16 or F32.

    σ_ulp, the noise of one rounding, is √(mean / 12).
    """
    return float(_square_sum(values, *_SPACING[dtype]))


@compiled
def _square_sum(values, tiny, spacing):
    """Of the values, or of their ulp where a spacing is given."""
    count = uint64(len(values))
    scratch = np.empty((1, STRIP), np.float64)
    lanes, totals = np.zeros((1, LANES), np.float64), np.zeros(1)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        for i in range(size):
            x = values[at + i]
            power = uint32(float32(x).view(np.uint32) & uint32(0x7F800000)).view(np.float32)
            scratch[0, i] = x if spacing == float32(0) else max(power, tiny) * spacing
        _squares(lanes, scratch, whole_groups(scratch, size))
        end_row(lanes, totals, at + STRIP, count)
    return totals[0]
