"""Paired statistics: closed forms, and intervals that cover what they say."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from expo.errors import SpecError
from expo.operators.paired import (
    Paired,
    at_matched_length,
    detectable,
    mean_interval,
    paired,
    win_rate,
    win_rate_at_matched_length,
)

Generator = np.random.Generator

DRAWS: dict[str, tuple[Callable[[Generator, int], np.ndarray], float]] = {
    "normal": (lambda g, n: g.normal(1, 2, n), 1.0),
    "heavy tails": (lambda g, n: g.standard_t(3, n), 0.0),
    "skewed": (lambda g, n: g.exponential(1, n), 1.0),
    "skewed the other way": (lambda g, n: -g.lognormal(0, 0.8, n), -float(np.exp(0.32))),
    "a difference of two skewed": (
        lambda g, n: g.exponential(1, n) - g.exponential(0.5, n),
        0.5,
    ),
    "mostly ties": (lambda g, n: g.choice([-1.0, 0, 0, 0, 0, 2], n), 1 / 6),
}


FAST = {"skewed", "normal"}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DRAWS]
)
@pytest.mark.parametrize("n", [50, 200, 1000])
def test_the_interval_covers_95_percent(name: str, n: int) -> None:
    draw, true = DRAWS[name]
    generator = np.random.default_rng(n)
    hits = 0
    for _ in range(2000):
        found = mean_interval(draw(generator, n))
        hits += found.low <= true <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_many_prompts_get_students_interval() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.3, 1, (2, 500))
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.9)
    found = paired(a, b, level=0.9)
    assert found.mean == pytest.approx(np.mean(a - b))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.standard_error == pytest.approx(found.mean / expected.statistic)
    assert found.n == 500


def test_few_prompts_get_at_least_students_interval() -> None:
    x = np.random.default_rng(1).exponential(1, 60)
    t = stats.t.interval(0.95, 59, loc=x.mean(), scale=stats.sem(x))
    found = mean_interval(x)
    assert found.low <= t[0] + 1e-12
    assert found.high > t[1]  # the skew is to the right, and so is what is not known


def test_the_interval_depends_on_the_values_alone() -> None:
    x = np.random.default_rng(2).exponential(1, 80)
    one = mean_interval(x)
    assert mean_interval(x[::-1]) == one
    scaled = mean_interval(8 * x)
    assert (scaled.low, scaled.high) == pytest.approx((8 * one.low, 8 * one.high))
    flipped = paired(np.zeros(80), x)
    assert flipped.mean == pytest.approx(-one.mean)
    assert mean_interval(x, seed=1) != one


def test_equal_differences_have_no_error() -> None:
    a = np.arange(6)
    assert paired(a + 0.5, a) == Paired(0.5, 0.5, 0.5, 0.0, 6)
    rounded = paired(a / 7 + 0.1, a / 7)  # 0.1 but for the last bits
    assert (rounded.low, rounded.standard_error) == (rounded.high, 0.0)
    assert Paired(0.5, 0.5, 0.5, 0.0, 3).excludes_zero
    assert not Paired(0.1, -0.1, 0.3, 0.1, 9).excludes_zero


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("gain", [1.0, -1.0, 0.1])
def test_a_few_equal_differences_show_none(count: int, gain: float) -> None:
    """As few tosses of a fair coin fall alike too often."""
    base = np.arange(count) / 7
    found = paired(base + gain, base)
    assert found.mean == pytest.approx(gain)
    assert not found.excludes_zero


def test_numbers_that_have_no_square() -> None:
    with pytest.raises(SpecError, match="value 0 is -1e\\+200, of which no mean can be taken"):
        mean_interval([-1e200, 1e200])
    assert mean_interval([1e-320, 2e-320]).standard_error == 0


def test_any_seed_is_a_seed() -> None:
    assert paired([1.0, 2.0], [2.0, 1.0], seed=-1).mean == 0


def test_a_win_rate_is_wilsons() -> None:
    a, b = np.append(np.ones(30), np.zeros(70)), np.full(100, 0.5)
    expected = stats.binomtest(30, 100).proportion_ci(0.95, method="wilson")
    found = win_rate(a, b)
    assert found.mean == 0.3
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert win_rate([1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]).mean == 0.5
    everything = win_rate(np.ones(10), np.zeros(10))
    assert everything.high == 1.0
    assert 0.5 < everything.low < 1


def test_matched_length_is_a_regression_read_at_equal_length() -> None:
    generator = np.random.default_rng(3)
    longer = generator.normal(40, 60, 300)
    x = np.tanh(longer / longer.std(ddof=1))
    noise = generator.normal(0, 0.1, 300)
    rewards = 0.2 + 0.7 * x + noise
    found = at_matched_length(rewards, np.zeros(300), lengths_a=longer, lengths_b=np.zeros(300))
    line = stats.linregress(x, rewards)
    assert found.mean == pytest.approx(line.intercept)
    assert found.standard_error == pytest.approx(line.intercept_stderr, rel=0.2)
    assert found.low < 0.2 < found.high
    assert paired(rewards, np.zeros(300)).low > 0.3  # what the length alone had bought


def test_equal_lengths_match_already() -> None:
    x, lengths = np.random.default_rng(4).normal(0, 1, 500), np.arange(500.0)
    found = at_matched_length(x, 0 * x, lengths_a=lengths, lengths_b=lengths)
    assert found.mean == pytest.approx(x.mean())
    assert found.standard_error == pytest.approx(stats.sem(x), rel=1e-2)


@pytest.mark.parametrize("n", [50, 200])
def test_matched_length_covers_95_percent(n: int) -> None:
    generator, hits = np.random.default_rng(n), 0
    for _ in range(2000):
        longer = generator.normal(20, 50, n)
        x = np.tanh(longer / longer.std(ddof=1))
        rewards = 0.2 + 0.5 * x + (generator.exponential(1, n) - 1) * (0.5 + np.abs(x))
        found = at_matched_length(rewards, 0 * x, lengths_a=longer, lengths_b=0 * x)
        hits += found.low <= 0.2 <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_win_rate_at_matched_length() -> None:
    generator = np.random.default_rng(5)
    longer = generator.normal(60, 60, 2000)
    x = np.tanh(longer / longer.std(ddof=1))
    wins = generator.random(2000) < 1 / (1 + np.exp(-2 * x))  # no better, only longer
    zeros = np.zeros(2000)
    found = win_rate_at_matched_length(wins - 0.5, zeros, lengths_a=longer, lengths_b=zeros)
    assert found.low < 0.5 < found.high
    assert win_rate(wins - 0.5, zeros).low > 0.6
    alike = win_rate_at_matched_length(
        [1, 1, 1, -1.0], [0] * 4, lengths_a=[5] * 4, lengths_b=[5] * 4
    )
    assert alike.mean == pytest.approx(3.5 / 5)  # with half a win and half a loss
    always = win_rate_at_matched_length(
        [1.0] * 50, [0] * 50, lengths_a=range(50), lengths_b=[9] * 50
    )
    assert 0.75 < always.low < always.mean < always.high < 1


def test_what_these_prompts_could_have_shown() -> None:
    # Miller (arXiv 2411.00640): about 1,000 prompts see 3 points where differences have sd 1/3
    assert detectable(1 / 3 / np.sqrt(969)) == pytest.approx(0.03, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired([1.0], [2.0]), "an interval needs at least two prompts, not 1"),
        (lambda: paired([1.0, 2.0], [1.0, 2.0, 3.0]), "2 values against 3: pairs need"),
        (lambda: mean_interval([1.0, np.nan]), "value 1 is nan, of which no mean can be taken: leave it"),
        (
            lambda: at_matched_length([1, 2, 3], [1, 1, 1], lengths_a=[1, 2, 3], lengths_b=[1, 1, 1]),
            "matching lengths needs at least four prompts, not 3",
        ),
        (
            lambda: at_matched_length([1, 2], [1, 1], lengths_a=[1, 2, 3], lengths_b=[1, 1, 1]),
            "2 rewards and 3 lengths",
        ),
    ],
)  # fmt: skip
def test_what_has_no_interval_is_refused(call: Callable[[], Paired], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        call()
