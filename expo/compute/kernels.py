"""The compiled kernels: blocks of stored elements in, rounded elements and sums out.

Each works through its block in strips that stay in the innermost cache, and leaves the GIL alone. The
same arithmetic as the torch operators, bit for bit: float32 operations in the order written, each
rounded on its own, one rounding to the output dtype.
"""

import numpy as np
from numpy import float32, uint32, uint64
from numpy.typing import NDArray

from expo.compute.arithmetic import Done
from expo.compute.bits import (
    PAIRS,
    Draws,
    Stored,
    draws,
    rounded,
    same_length,
    stored,
    strip_draws,
    unbounded,
    up,
)
from expo.compute.jit import compiled
from expo.compute.lanes import LANES, STRIP, end_row, products, whole_groups
from expo.operators.statistics import Sums

__all__ = [
    "Block", "Done", "Draws", "Stored", "compare", "draws", "extrapolate", "finish", "store", "stored",
    "widen",
]  # fmt: skip


_BIT_31 = uint32(1 << 31)
_NO_COPY, _COPY_BASE, _COPY_ALIGNED = uint32(0), uint32(1), uint32(2)

# What stands where in a strip's scratch: base or start, Δ, the rounding error or a, the increment.
_B, _D, _E, _I = 0, 1, 2, 3
_A = _E
_extrapolate_products = products((_B, _B), (_D, _D), (_E, _E), (_E, _D))
_finish_products = products((_B, _B), (_D, _D), (_E, _E), (_E, _D), (_I, _D), (_I, _I))
_compare_products = products((_B, _B), (_D, _D), (_A, _A))

Block = NDArray[np.float32]


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
    same_length(base, aligned, out)
    copy = {0.0: _COPY_BASE, 1.0: _COPY_ALIGNED}.get(alpha, _NO_COPY)
    coefficient = float32(alpha - 1.0)
    totals, zeros, unmoved, finite = _extrapolate(base, aligned, coefficient, copy, out, draws)
    b2, d2, e2, ed = totals.tolist()
    return Done(Sums(len(out), b2, d2, zeros, e2, ed, unmoved).asked(alpha), finite)


@compiled
def _extrapolate(base, aligned, coefficient, copy, out, draws):
    count = uint64(len(out))
    scratch = np.empty((3, STRIP), np.float32)
    room = np.empty(PAIRS, np.uint64)
    lanes, totals = np.zeros((4, LANES), np.float32), np.zeros(4)
    zeros, unmoved, bad = 0, 0, uint32(0)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        same, still = uint32(0), uint32(0)
        drawn = strip_draws(draws, at, room)
        for i in range(size):
            b, a = up(base[at + i]), up(aligned[at + i])
            d = a - b
            x = a + coefficient * d
            x = b if copy == _COPY_BASE else x
            x = a if copy == _COPY_ALIGNED else x
            q = rounded(x, drawn, i, out[at + i])
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


def finish(
    exact: Block, start: Block, *, delta: Block, still: Block, out: Stored, draws: Draws | None
) -> Done:
    """out = round(exact), for what was computed elsewhere; all but `out` are float32.

    Returns:
        ⟨start, start⟩, ⟨Δ, Δ⟩, the count of Δ = 0, ⟨e, e⟩, ⟨e, Δ⟩ with e = out − exact, the count of
        out = still, ⟨i, Δ⟩, ⟨i, i⟩ with i = exact − start.
    """
    same_length(exact, start, delta, still, out)
    totals, zeros, unmoved, finite = _finish(exact, start, delta, still, out, draws)
    s2, d2, e2, ed, asked_delta, asked_square = totals.tolist()
    asked = {"asked_delta": asked_delta, "asked_square": asked_square}
    return Done(Sums(len(out), s2, d2, zeros, e2, ed, unmoved, **asked), finite)


@compiled
def _finish(exact, start, delta, still, out, draws):
    count = uint64(len(out))
    scratch = np.empty((4, STRIP), np.float32)
    room = np.empty(PAIRS, np.uint64)
    lanes, totals = np.zeros((6, LANES), np.float32), np.zeros(6)
    zeros, unmoved, bad = 0, 0, uint32(0)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        same, equal = uint32(0), uint32(0)
        drawn = strip_draws(draws, at, room)
        for i in range(size):
            x, s, d = exact[at + i], start[at + i], delta[at + i]
            q = rounded(x, drawn, i, out[at + i])
            out[at + i] = q
            e = up(q) - x
            scratch[_B, i], scratch[_D, i], scratch[_E, i], scratch[_I, i] = s, d, e, x - s
            same = uint32(same + uint32(d == float32(0)))
            equal = uint32(equal + uint32(up(q) == still[at + i]))
            bad = uint32(bad | unbounded(s) | unbounded(d) | unbounded(up(q)))
        zeros, unmoved = zeros + same, unmoved + equal
        _finish_products(lanes, scratch, whole_groups(scratch, size))
        end_row(lanes, totals, at + STRIP, count)
    return totals, zeros, unmoved, bad < _BIT_31


def compare(base: Stored, aligned: Stored) -> Done:
    """⟨b, b⟩, ⟨d, d⟩, the count of d = 0 and ⟨a, a⟩, with d = a − b; nothing is written."""
    same_length(base, aligned)
    totals, zeros, finite = _compare(base, aligned)
    b2, d2, a2 = totals.tolist()
    return Done(Sums(len(base), b2, d2, zeros, aligned_square=a2), finite)


@compiled
def _compare(base, aligned):
    count = uint64(len(base))
    scratch = np.empty((3, STRIP), np.float32)
    lanes, totals = np.zeros((3, LANES), np.float32), np.zeros(3)
    zeros, bad = 0, uint32(0)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        same = uint32(0)
        for i in range(size):
            b, a = up(base[at + i]), up(aligned[at + i])
            d = a - b
            scratch[_B, i], scratch[_D, i], scratch[_A, i] = b, d, a
            same = uint32(same + uint32(d == float32(0)))
            bad = uint32(bad | unbounded(d))
        zeros += same
        _compare_products(lanes, scratch, whole_groups(scratch, size))
        end_row(lanes, totals, at + STRIP, count)
    return totals, zeros, bad < _BIT_31


def widen(stored: Stored, out: Block) -> None:
    """out = stored, as float32: exact."""
    same_length(stored, out)
    _widen(stored, out)


@compiled
def _widen(stored, out):
    for i in range(uint64(len(out))):
        out[i] = up(stored[i])


def store(exact: Block, out: Stored, *, draws: Draws | None) -> bool:
    """out = round(exact); whether all of it is finite."""
    same_length(exact, out)
    return _store(exact, out, draws)


@compiled
def _store(exact, out, draws):
    count = uint64(len(out))
    room = np.empty(PAIRS, np.uint64)
    bad = uint32(0)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        drawn = strip_draws(draws, at, room)
        for i in range(size):
            q = rounded(exact[at + i], drawn, i, out[at + i])
            out[at + i] = q
            bad = uint32(bad | unbounded(up(q)))
    return bad < _BIT_31
