"""What a merge did to a tensor, summed block by block: the norms, shares and the effective α.

With Δ = θ_aligned − θ_base, out the rounded result and r = out − exact its rounding error:
measured α = ⟨out − base, Δ⟩/⟨Δ,Δ⟩ = asked α + ⟨r,Δ⟩/⟨Δ,Δ⟩, noise = RMS(r)/RMS(exact − base).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.floating]

_ROW = 8192  # short enough for BLAS to stay on one thread, whatever the machine


class Sums(NamedTuple):
    """Sums over the elements that both sides have. Added in a fixed order, they are reproducible."""

    count: int = 0
    base_square: float = 0.0  # ⟨base, base⟩
    aligned_square: float = 0.0
    delta_square: float = 0.0
    zeros: int = 0  # elements with Δ exactly 0
    error_square: float = 0.0  # ⟨r, r⟩
    error_delta: float = 0.0  # ⟨r, Δ⟩
    unmoved: int = 0  # elements that came out equal to the aligned model's

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(mine + more for mine, more in zip(self, other, strict=True)))


def delta_sums(base: Block, aligned: Block, delta: Block) -> Sums:
    """The sums of one block; not finite where an input is not, or where a square overflows."""
    return Sums(
        delta.size, dot(base, base), dot(aligned, aligned), dot(delta, delta), _equal(delta, 0)
    )


def rounding_sums(
    sums: Sums, rounded: Block, exact: Block, delta: Block, aligned: Block, *, scratch: Block
) -> Sums:
    """`sums` with what rounding did to the block; `rounded` is back in the working precision."""
    unmoved = _equal(rounded, aligned)
    error = np.subtract(rounded, exact, out=scratch)
    return sums._replace(
        error_square=dot(error, error), error_delta=dot(error, delta), unmoved=unmoved
    )


def effective_alpha(alpha: float, error_delta: float, delta_square: float) -> float | None:
    """α as measured after rounding; None where Δ is zero."""
    return alpha + error_delta / delta_square if delta_square else None


def rounding_noise(alpha: float, error_square: float, delta_square: float) -> float | None:
    """RMS of the rounding error over the RMS of the increment αΔ; None where that is zero."""
    increment_square = alpha * alpha * delta_square
    return math.sqrt(error_square / increment_square) if increment_square else None


def relative_norm(delta_square: float, base_square: float) -> float | None:
    """‖Δ‖ / ‖base‖; None where the base is zero."""
    return math.sqrt(delta_square / base_square) if base_square else None


def cosine(sums: Sums) -> float | None:
    """Cosine of base and aligned, from the three norms; None where either is zero."""
    norms = math.sqrt(sums.base_square * sums.aligned_square)
    return (
        (sums.base_square + sums.aligned_square - sums.delta_square) / (2 * norms)
        if norms
        else None
    )


def dot(a: Block, b: Block) -> float:
    """⟨a, b⟩ of two contiguous vectors: rows of 8192 in their own precision, added in float64."""
    whole = a.size - a.size % _ROW
    rows = np.vecdot(a[:whole].reshape(-1, _ROW), b[:whole].reshape(-1, _ROW))
    rest = np.vecdot(a[whole:], b[whole:]) if whole < a.size else 0.0
    total = float(rows.sum(dtype=np.float64)) + float(rest)
    if math.isfinite(total) or a.dtype == np.float64:
        return total
    return dot(a.astype(np.float64), b.astype(np.float64))  # squares above 1e38 fit in float64


def _equal(a: Block, b: Block | float) -> int:
    return int(np.count_nonzero(np.equal(a, b)))
