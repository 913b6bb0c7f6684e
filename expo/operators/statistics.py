"""What a merge did to a tensor, summed block by block: the norms, shares and the effective α.

With Δ = θ_aligned − θ_base, out the rounded result, r = out − exact its rounding error and start what
the change is added to: asked α = ⟨exact − start, Δ⟩/⟨Δ,Δ⟩, measured α = ⟨out − start, Δ⟩/⟨Δ,Δ⟩ = asked α +
⟨r,Δ⟩/⟨Δ,Δ⟩, noise = RMS(r)/RMS(exact − start).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.floating]

_ROW = 8192
_LANES = 16
_ROOM = 131_072  # elements whose products are made at a time


class Sums(NamedTuple):
    """Sums over elements that both sides have. Added in a fixed order, they are reproducible."""

    elements: float = 0
    base_square: float = 0.0  # ⟨base, base⟩
    delta_square: float = 0.0  # ⟨Δ, Δ⟩
    zeros: float = 0  # elements with Δ exactly 0
    error_square: float = 0.0  # ⟨r, r⟩
    error_delta: float = 0.0  # ⟨r, Δ⟩
    unmoved: float = 0  # elements that came out equal to the aligned model's
    aligned_square: float = 0.0  # ⟨aligned, aligned⟩, for the cosine; a merge leaves it 0
    asked_delta: float = 0.0  # ⟨exact − start, Δ⟩ = α⟨Δ, Δ⟩ where α is one number
    asked_square: float = 0.0  # ⟨exact − start, exact − start⟩

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(mine + more for mine, more in zip(self, other, strict=True)))

    def asked(self, alpha: float) -> "Sums":
        """With ⟨exact − start, ·⟩ where α is one number."""
        square = self.delta_square
        return self._replace(asked_delta=alpha * square, asked_square=alpha * alpha * square)


class Sample(NamedTuple):
    """One block of a tensor under the rounding that was not chosen."""

    elements: float
    delta_square: float
    error_square: float
    error_delta: float


class Summing:
    """Room for the sums of blocks of `size` elements, so that a block allocates nothing."""

    def __init__(self, size: int, dtype: np.dtype) -> None:
        self._products = np.empty(min(size, _ROOM), dtype)
        self._equal = np.empty(size, np.bool_)

    def delta(self, base: Block, delta: Block) -> tuple[float, float, int]:
        """⟨base, base⟩, ⟨Δ, Δ⟩ and the count of zeros in Δ; not finite where an input is not."""
        return self.dot(base, base), self.dot(delta, delta), self.count_equal(delta, 0)

    def rounding(
        self, rounded: Block, exact: Block, delta: Block, aligned: Block
    ) -> tuple[float, float, int]:
        """⟨r, r⟩, ⟨r, Δ⟩ and the count of elements that equal the aligned model's.

        `rounded` comes in the working precision and is overwritten by r.
        """
        unmoved = self.count_equal(rounded, aligned)
        error = np.subtract(rounded, exact, out=rounded)
        return self.dot(error, error), self.dot(error, delta), unmoved

    def dot(self, a: Block, b: Block) -> float:
        """⟨a, b⟩, in one order on every processor: that of the compiled kernels.

        Element i of a row of 8192 is added to lane i mod 16 in the inputs' own precision; the lanes of
        a row are added in order in float64, and so are the rows.
        """
        total = 0.0
        for at in range(0, len(a), _ROOM):
            room = self._products[: len(a) - at]
            total = _add_rows(total, np.multiply(a[at : at + _ROOM], b[at : at + _ROOM], out=room))
        if math.isfinite(total) or a.dtype == np.float64:
            return total
        wide = Summing(len(a), np.dtype(np.float64))  # squares above 1e38
        return wide.dot(a.astype(np.float64), b.astype(np.float64))

    def count_equal(self, a: Block, b: Block | float) -> int:
        return int(np.count_nonzero(np.equal(a, b, out=self._equal)))


def _add_rows(total: float, products: Block) -> float:
    whole = products.size - products.size % _ROW
    lanes = np.add.reduce(products[:whole].reshape(-1, _ROW // _LANES, _LANES), axis=1)
    if whole < products.size:
        rest = np.zeros((-(-(products.size - whole) // _LANES), _LANES), products.dtype)
        rest.reshape(-1)[: products.size - whole] = products[whole:]
        lanes = np.concatenate([lanes, np.add.reduce(rest, axis=0, keepdims=True)])
    rows = np.zeros(len(lanes))
    for (
        lane
    ) in lanes.T:  # numpy's own sum adds pairs of pairs, and Python's compensates from 3.12 on
        rows += lane
    for row in rows.tolist():
        total += row
    return total


def asked_alpha(sums: Sums) -> float | None:
    """α as asked for, over all that was summed; None where Δ is zero."""
    if not sums.delta_square:
        return None
    return float(f"{sums.asked_delta / sums.delta_square:.12g}")  # without the dust of the sums


def effective_alpha(alpha: float | None, error_delta: float, delta_square: float) -> float | None:
    """α as measured after rounding; None where Δ is zero."""
    return alpha + error_delta / delta_square if delta_square and alpha is not None else None


def rounding_noise(asked_square: float, error_square: float) -> float | None:
    """RMS of the rounding error over the RMS of the increment; None where that is zero."""
    return math.sqrt(error_square / asked_square) if asked_square else None


def relative_norm(delta_square: float, base_square: float) -> float | None:
    """‖Δ‖ / ‖base‖; None where the base is zero."""
    return math.sqrt(delta_square / base_square) if base_square else None


def cosine(sums: Sums) -> float | None:
    """Cosine of base and aligned, from the three norms; None where either is zero."""
    norms = math.sqrt(sums.base_square * sums.aligned_square)
    if not norms:
        return None
    return (sums.base_square + sums.aligned_square - sums.delta_square) / (2 * norms)
