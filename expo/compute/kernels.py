"""The compiled kernels: blocks of stored elements in, rounded elements and sums out.

Each works through its block in strips that stay in the innermost cache, and leaves the GIL alone. The
same arithmetic as the torch operators, bit for bit: float32 operations in the order written, each
rounded on its own, one rounding to the output dtype.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy import float32, uint32, uint64
from numpy.typing import NDArray

from expo.compute.bits import (

    Draws,
    Stored,
    at_random,
    draws,
    fill_draws,
    nearest,
    stored,
    unbounded,
    up,
)
from expo.compute.jit import compiled
from expo.compute.lanes import LANES, STRIP, end_row, products, whole_groups
from expo.operators.statistics import Sums

__all__ = ["Done", "Draws", "draws", "extrapolate", "store", "stored", "widen"]

_BIT_31 = uint32(1 << 31)
_NO_COPY, _COPY_BASE, _COPY_ALIGNED = uint32(0), uint32(1), uint32(2)

_B, _D, _E = 0, 1, 2
_extrapolate_products = products((_B, _B), (_D, _D), (_E, _E), (_E, _D))


class Done(NamedTuple):
    """What a kernel says of a block."""

    sums: Sums
    finite: bool  # inputs, Δ, the exact result and the rounded one

    @property
    def summed(self) -> bool:
        """Whether the sums hold: squares above 1e38 leave float32 though every value is finite."""
        return math.isfinite(math.fsum(self.sums))


def extrapolate(
    base: Stored, aligned: Stored, alpha: float, *, out: Stored, draws: Draws | None
) -> Done:
    """out = round(x), x = a + (α − 1)·d with d = a − b: three float32 operations, one rounding.

    α = 0 and α = 1 round b and a themselves.

    Args:
        base, aligned, out: of one length, each as `stored` gives it, or float32.
        draws: None rounds to nearest.

    Returns:
        ⟨b, b⟩, ⟨d, d⟩, the count of d = 0, ⟨e, e⟩, ⟨e, d⟩ with e = out − x and the count of out = a.
    """
    _same_length(base, aligned, out)
    copy = {0.0: _COPY_BASE, 1.0: _COPY_ALIGNED}.get(alpha, _NO_COPY)
    coefficient = float32(alpha - 1.0)
    totals, zeros, unmoved, finite = _extrapolate(base, aligned, coefficient, copy, out, draws)
    b2, d2, e2, ed = totals.tolist()
    asked = {"asked_delta": alpha * d2, "asked_square": alpha * alpha * d2}
    return Done(Sums(len(out), b2, d2, zeros, e2, ed, unmoved, **asked), finite)


@compiled
def _extrapolate(base, aligned, coefficient, copy, out, draws):
    count = uint64(len(out))
    scratch = np.empty((3, STRIP), np.float32)
    room = np.zeros(STRIP // uint64(2) + uint64(1), np.uint64)
    lanes, totals = np.zeros((4, LANES), np.float32), np.zeros(4)
    zeros, unmoved, bad = 0, 0, uint32(0)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        same, still = uint32(0), uint32(0)
        if draws is not None:
            fill_draws(draws[0], uint64(draws[1]) + at, room)
            drawn = room.view(np.uint32)[uint64(draws[1]) % uint64(2) :]
        for i in range(size):
            b, a = up(base[at + i]), up(aligned[at + i])
            d = a - b
            x = a + coefficient * d
            x = b if copy == _COPY_BASE else x
            x = a if copy == _COPY_ALIGNED else x
            if draws is None:
                q = nearest(x, out[at + i])
            else:
                q = at_random(x, drawn[i], out[at + i])
            out[at + i] = q
            e = up(q) - x
            scratch[_B, i], scratch[_D, i], scratch[_E, i] = b, d, e
            same = uint32(same + uint32(d == float32(0)))
            still = uint32(still + uint32(up(q) == a))
            bad = uint32(bad | unbounded(d) | unbounded(up(q)))
        zeros, unmoved = zeros + same, unmoved + still
        _extrapolate_products(lanes, scratch, whole_groups(scratch, size))
        end_row(lanes, totals, at + STRIP, count)
    return totals, zeros, unmoved, bad < _BIT_31


def widen(stored: Stored, out: NDArray[np.float32]) -> None:
    """out = stored, as float32: exact."""
    _same_length(stored, out)
    _widen(stored, out)


@compiled
def _widen(stored, out):
    for i in range(uint64(len(out))):
        out[i] = up(stored[i])


def store(exact: NDArray[np.float32], out: Stored, *, draws: Draws | None) -> bool:
    """out = round(exact); whether all of it is finite."""
    _same_length(exact, out)
    return _store(exact, out, draws)


@compiled
def _store(exact, out, draws):
    count = uint64(len(out))
    room = np.zeros(STRIP // uint64(2) + uint64(1), np.uint64)
    bad = uint32(0)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        if draws is not None:
            fill_draws(draws[0], uint64(draws[1]) + at, room)
            drawn = room.view(np.uint32)[uint64(draws[1]) % uint64(2) :]
        for i in range(size):
            if draws is None:
                q = nearest(exact[at + i], out[at + i])
            else:
                q = at_random(exact[at + i], drawn[i], out[at + i])
            out[at + i] = q
            bad = uint32(bad | unbounded(up(q)))
    return bad < _BIT_31


def _same_length(*arrays: np.ndarray) -> None:
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(f"blocks of {lengths} elements: all must be of one length")
