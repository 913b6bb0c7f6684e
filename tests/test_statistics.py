"""The sums of a merge against float64."""

import numpy as np
import pytest

from expo.compute.summary import statistics, total
from expo.operators.statistics import Summing, Sums, cosine, effective_alpha, rounding_noise


@pytest.mark.parametrize("size", [1, 5, 8191, 8192, 8193, 131_072, 140_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_match_float64(size: int, dtype: type) -> None:
    rng = np.random.default_rng(size)
    base = rng.standard_normal(size).astype(dtype)
    aligned = base.copy()
    moved = rng.random(size) < 0.5
    aligned[moved] += rng.standard_normal(int(moved.sum())).astype(dtype) * dtype(1e-3)
    delta = aligned - base
    exact = aligned + dtype(0.5) * delta
    rounded = exact.astype(np.float16).astype(dtype)
    summing = Summing(size, np.dtype(dtype))
    norms = summing.delta(base, delta)
    errors = summing.rounding(rounded.copy(), exact, delta, aligned)
    b, d, r = base.astype("f8"), delta.astype("f8"), rounded.astype("f8") - exact.astype("f8")
    expected = [b @ b, d @ d, np.sum(d == 0), r @ r, r @ d, np.sum(rounded == aligned)]
    scale = [b @ b, d @ d, 1, r @ r, np.sqrt((r @ r) * (d @ d)), 1]
    for got, want, size_of in zip((*norms, *errors), expected, scale, strict=True):
        assert abs(got - want) <= 2e-6 * size_of + 1e-300


def test_squares_beyond_float32_are_summed_in_float64() -> None:
    huge = np.full(10_000, 1e30, dtype=np.float32)
    with np.errstate(over="ignore"):
        square = Summing(10_000, np.dtype(np.float32)).dot(huge, huge)
    assert square == pytest.approx(1e64, rel=1e-6)


def test_effective_alpha_is_the_projection_of_the_increment() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(4096)
    delta = rng.standard_normal(4096) * 1e-3
    out = (base + 1.5 * delta).astype(np.float16).astype("f8")
    error = out - (base + 1.5 * delta)
    measured = effective_alpha(1.5, float(error @ delta), float(delta @ delta))
    assert measured == pytest.approx(float((out - base) @ delta / (delta @ delta)), rel=1e-9)
    noise = rounding_noise(2.25 * float(delta @ delta), float(error @ error))
    assert noise == pytest.approx(
        np.sqrt((error**2).mean() / ((1.5 * delta) ** 2).mean()), rel=1e-9
    )


def test_cosine_from_the_norms() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(1000), rng.standard_normal(1000)
    sums = Sums(1000, base_square=a @ a, delta_square=(b - a) @ (b - a), aligned_square=b @ b)
    assert cosine(sums) == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-12)


def test_nothing_changed_has_no_effective_alpha() -> None:
    empty = statistics(total([Sums(10, 4.0, 0.0, 10, 0.0, 0.0, 10)]))
    assert empty.effective_alpha is None
    assert empty.rounding_noise is None
    assert empty.zero_share == 1.0
    assert statistics(Sums()).zero_share is None
