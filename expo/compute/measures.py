"""Sums over whole tensors that a merge or an edit needs first: for arcs, for σ_ulp.

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


def ulp_square_sum(values: Block, dtype: str) -> float:
    """Σ ulp(x)² in float64: ulp(x) is the distance from x to the next value of BF16, F16 or F32.

    σ_ulp, the noise of one rounding, is √(mean / 12).
    """
    return float(_ulp_square_sum(values, *_SPACING[dtype]))


@compiled
def _ulp_square_sum(values, tiny, spacing):
    count = uint64(len(values))
    scratch = np.empty((1, STRIP), np.float64)
    lanes, totals = np.zeros((1, LANES), np.float64), np.zeros(1)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        for i in range(size):
            x = values[at + i]
            power = uint32(float32(x).view(np.uint32) & uint32(0x7F800000)).view(np.float32)
            scratch[0, i] = max(power, tiny) * spacing
        _squares(lanes, scratch, whole_groups(scratch, size))
        end_row(lanes, totals, at + STRIP, count)
    return totals[0]
