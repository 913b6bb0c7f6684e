"""How far one model is from another on the same prompts, and how sure that is.

All arrays are flat, float64, one number a prompt; differences are a − b, as in scipy's `ttest_rel`. Prompts are
taken as a random sample of those that could have been asked.
"""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expo.errors import SpecError
from expo.results import Paired

Array = NDArray[np.floating]

BOOTSTRAP_BELOW = 400
"""Fewer differences than this are resampled; more are near enough to a normal mean."""

RESAMPLES = 1999

_ROUNDING = 1e-12
"""Values that differ by less than this share of themselves are equal: they were subtracted from others."""

_EQUAL_ARE_NO_CHANCE = 6
"""A fair coin gives fewer than six like signs more often than one time in twenty, on either side."""

_SMALLEST, _LARGEST = 1e-100, 1e100
"""Between these the squares of values are neither 0 nor infinite."""


def paired(a: ArrayLike, b: ArrayLike, *, seed: int = 0, level: float = 0.95) -> Paired:
    """The mean of a − b over the same prompts, with its interval.

    Args:
        a, b: one number a prompt, in the same order.
        seed: of the resamples.
        level: how often the interval covers the true mean.

    Raises:
        SpecError: fewer than two prompts, other numbers of them, or a value that is not finite.
    """
    found = mean_interval(_differences(a, b), seed=seed, level=level)
    if found.standard_error or found.n >= _EQUAL_ARE_NO_CHANCE:
        return found
    return replace(found, low=min(found.low, 0.0), high=max(found.high, 0.0))


def mean_interval(values: ArrayLike, *, seed: int = 0, level: float = 0.95) -> Paired:
    """The mean of values with Student's interval, on few values widened to the bootstrap-t's.

    The bootstrap-t (Efron and Tibshirani 1993, ch. 12) resamples t = (mean* − mean)/error*, so that it
    follows a skew, which Student's t does not; that one holds where tails are heavy. On each side
    the farther limit of the two is taken: percentiles of mean* itself cover too little. The
    order of the values has no influence.

    Raises:
        SpecError: fewer than two values, or one that is not finite.
    """
    x = np.sort(_finite(values))
    mean, error = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(x.size)
    if np.ptp(x) <= _ROUNDING * np.abs(x).max() + _SMALLEST:
        return Paired(mean, mean, mean, 0.0, x.size)
    tail = (1 - level) / 2
    t = np.array([student_quantile(tail, x.size - 1), student_quantile(1 - tail, x.size - 1)])
    if x.size < BOOTSTRAP_BELOW:
        resampled = np.quantile(_resampled_t(x, seed), [tail, 1 - tail])
        t = np.array([min(t[0], resampled[0]), max(t[1], resampled[1])])
    low, high = mean - t[::-1] * error
    return Paired(mean, float(low), float(high), error, x.size)


def win_rate(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Paired:
    """The share of prompts on which a is above b, ties counting half, with Wilson's interval (1927).

    Raises:
        SpecError: as `paired`.
    """
    scores = _scores(_differences(a, b))
    p, n = float(scores.mean()), scores.size
    z = _normal_quantile((1 + level) / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    error = math.sqrt(p * (1 - p) / n)
    return Paired(p, max(middle - half, 0.0), min(middle + half, 1.0), error, n)


def at_matched_length(
    a: ArrayLike,
    b: ArrayLike,
    *,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    level: float = 0.95,
) -> Paired:
    """The mean of a − b, were the two answers equally long.

    The difference is regressed on x = tanh((length_a − length_b)/sd), the term by which AlpacaEval controls
    for length (arXiv 2404.04475), and read at x = 0. Its error is HC3's, which holds where the spread of
    the differences depends on the length too.

    Raises:
        SpecError: as `paired`, or fewer than four prompts.
    """
    d, x = _differences(a, b), _length_term(lengths_a, lengths_b)
    design = _design(d, x)
    inverse = np.linalg.pinv(design.T @ design)
    intercept = inverse @ design.T @ d
    leverage = np.einsum("ni,ij,nj->n", design, inverse, design)
    residual = (d - design @ intercept) / np.maximum(1 - leverage, 1e-9)
    error = math.sqrt(float(np.sum((design @ inverse[:, 0] * residual) ** 2)))
    t = student_quantile((1 + level) / 2, d.size - design.shape[1])
    mean = float(intercept[0])
    return Paired(mean, mean - t * error, mean + t * error, error, d.size)


def win_rate_at_matched_length(
    a: ArrayLike,
    b: ArrayLike,
    *,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    level: float = 0.95,
) -> Paired:
    """The share of prompts on which a is above b, were the two answers equally long.

    A logistic regression on the same term of length, read at x = 0: AlpacaEval's without the difficulty of
    each instruction, so not its figure. Half a win and half a loss are added, which keeps it
    finite where one side always wins.

    Raises:
        SpecError: as `at_matched_length`.
    """
    d = _differences(a, b)
    design = _design(d, _length_term(lengths_a, lengths_b))
    extra = np.zeros((2, design.shape[1]))
    extra[:, 0] = 1
    rows, wins = np.vstack([design, extra]), np.append(_scores(d), [1.0, 0.0])
    weights = np.append(np.ones(d.size), [0.5, 0.5])
    beta, covariance = _logistic(rows, wins, weights)
    z, error = _normal_quantile((1 + level) / 2), math.sqrt(covariance[0, 0])
    rate, low, high = (
        float(1 / (1 + np.exp(-at))) for at in (beta[0], beta[0] - z * error, beta[0] + z * error)
    )
    return Paired(rate, low, high, error * rate * (1 - rate), d.size)


def detectable(standard_error: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided test sees with this power: (z_level + z_power)·error."""
    return standard_error * (_normal_quantile((1 + level) / 2) + _normal_quantile(power))


def student_quantile(p: float, freedom: int) -> float:
    """The t below which Student's distribution has probability `p`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, p))


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def _resampled_t(x: Array, seed: int) -> Array:
    """t of every resample that has any spread; resamples of one value say nothing."""
    z = (x - x.mean()) / x.std()
    counts = _counts(x.size, seed)
    mean, square = counts @ z / x.size, counts @ (z * z) / x.size
    variance = square - mean * mean
    spread = variance > 1e-12
    return mean[spread] / np.sqrt(variance[spread] / (x.size - 1))


@lru_cache(maxsize=4)
def _counts(n: int, seed: int) -> Array:
    """How often each of n prompts is in each resample, (resamples, n)."""
    generator = np.random.Generator(np.random.PCG64([seed % 2**64, n]))
    return generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def _logistic(rows: Array, wins: Array, weights: Array) -> tuple[Array, Array]:
    """Coefficients and their covariance by Newton's method, the slope held by a ridge of 1e-3."""
    beta = np.zeros(rows.shape[1])
    ridge = np.diag([0.0, *[1e-3] * (rows.shape[1] - 1)])
    hessian = ridge
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(rows @ beta, -30, 30)))
        gradient = rows.T @ (weights * (wins - p)) - ridge @ beta
        hessian = (rows * (weights * p * (1 - p))[:, None]).T @ rows + ridge
        step = np.linalg.solve(hessian, gradient)
        beta = beta + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    covariance = np.linalg.inv(hessian)
    return beta, covariance


def _design(d: Array, x: Array) -> Array:
    """The columns 1 and x, without x where all lengths differ by the same."""
    if d.size != x.size:
        raise SpecError(f"{d.size} rewards and {x.size} lengths: give one of each a prompt")
    if d.size < 4:
        raise SpecError(f"matching lengths needs at least four prompts, not {d.size}")
    columns = [np.ones_like(x)] if np.ptp(x) == 0 else [np.ones_like(x), x]
    return np.stack(columns, axis=1)


def _length_term(lengths_a: ArrayLike, lengths_b: ArrayLike) -> Array:
    longer = _differences(lengths_a, lengths_b)
    spread = float(longer.std(ddof=1))
    return np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)


def _scores(d: Array) -> Array:
    """1 for a win, ½ for a tie, 0 for a loss."""
    return (np.sign(d) + 1) / 2


def _differences(a: ArrayLike, b: ArrayLike) -> Array:
    left, right = _finite(a), _finite(b)
    if left.size != right.size:
        raise SpecError(
            f"{left.size} values against {right.size}: pairs need the same prompts on both sides"
        )
    return left - right


def _finite(values: ArrayLike) -> Array:
    x = np.asarray(values, dtype=np.float64).ravel()
    if x.size < 2:
        raise SpecError(f"an interval needs at least two prompts, not {x.size}")
    if not (is_fit := np.abs(x) < _LARGEST).all():
        place = int(np.argmin(is_fit))
        raise SpecError(
            f"value {place} is {x[place]:g}, of which no mean can be taken: leave it out"
        )
    return x
