"""How much of the difference of two quantized models is noise of their codes.

A weight is stored as the nearest point of a grid of steps u. Where both models have the same grid, a change d is stored
with mean d and variance f(1 − f)u², f = frac(|d|/u): errors cancel where a weight stays at its point. Averaged over
d ~ N(0, σ²) that is u²·g(σ/u), so E[Δ²] of what is stored is σ² + E[u²·g(σ/u)], which has one root σ.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SMALL = 0.25  # where both forms of g agree to four digits
_HALVINGS = 40
_NEAR, _MORE = (
    1 / 16,
    1.25,
)  # bfloat16 rounds numbers of E4M3 by 1/32 of a step; a sample is not exact


class Grid(NamedTuple):
    """Of every code: `square`, twelve times the mean square of what rounds to it, and `width`: a change of d ≪ width
    leaves an error of |d|·square/width in the mean square. Both are the square of the step and the step where all steps
    are alike; NaN where the code is."""

    square: Array
    width: Array


def grid(numbers: NDArray[np.float32], beyond: float = 0.0) -> Grid:
    """The grid whose points are the numbers that codes stand for.

    What lies between gaps a and b rounds to a point from a/2 below to b/2 above: the mean square of its error is
    (a³ + b³)/(a + b)/12, and a change d crosses one of its ends at a rate of |d|·(a² + b²)/(a + b).

    Args:
        beyond: how far beyond the largest number there is what was cut down to it.
    """
    points = np.unique(numbers[np.isfinite(numbers)].astype(np.float64))
    gaps = np.diff(points)
    a, b = (np.concatenate(ends) for ends in (([2 * beyond], gaps), (gaps, [2 * beyond])))
    jumps = np.where(a == 2 * beyond, 0, a**2) + np.where(b == 2 * beyond, 0, b**2)
    square = (a**3 + b**3) / (a + b)
    place = np.searchsorted(points, np.nan_to_num(numbers.astype(np.float64)))
    each = np.array([square, square * (a + b) / jumps])[:, place]
    return Grid(*np.where(np.isfinite(numbers), each, np.nan))


def crossings(s: Array) -> Array:
    """g(s) = E[f(1 − f)], f = frac(|D|), of D ~ N(0, s²): √(2/π)·s − s² for small s, 1/6 for large.

    The Fourier series of f(1 − f) is 1/6 − Σ cos(2πkD)/(πk)², and E[cos(2πkD)] = exp(−2π²k²s²).
    """
    small = np.minimum(s, _SMALL)
    waves = sum(np.exp(-2 * (math.pi * k * s) ** 2) / (math.pi * k) ** 2 for k in (1, 2, 3))
    return np.where(s < _SMALL, math.sqrt(2 / math.pi) * small - small**2, 1 / 6 - waves)


def coding_noise(observed: float, grids: Grid, apart: Array) -> tuple[float, float]:
    """(σ², noise²) an element of a change of which `observed` is the stored mean square; σ² is the change's own.

    Args:
        grids: of both sides, element by element: the means of squares and of widths.
        apart: how far the two grids lie apart where the weight does; inf where they have nothing in common, so that no
            error cancels.
    """
    shift = np.square(apart) * (
        math.pi / 2
    )  # which crosses as often as a Gaussian of that variance

    def noise(square: float) -> float:
        return float(np.mean(grids.square * crossings(np.sqrt(square + shift) / grids.width)))

    low, high = 0.0, observed
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if middle + noise(middle) < observed else (low, middle)
    return low, noise(low)


def was_not_rounded(delta: Array, steps: Array) -> bool:
    """Whether the difference to numbers without codes shows that no error is in it: they were trained from the numbers
    that the codes stand for.

    The error of a rounding is spread evenly over a step. Whatever is added to it, no more than 2t of all differences lie
    within t steps of 0.
    """
    return float(np.mean(np.abs(delta) < _NEAR * steps)) > _MORE * 2 * _NEAR
