"""`expo compare`: how much better one file of answers is than another, and how sure that is."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from statistics import fmean

from expo.evaluation.comparing import Pairs, pair, read_scored
from expo.operators.paired import (
    at_matched_length,
    detectable,
    paired,
    win_rate,
    win_rate_at_matched_length,
)
from expo.results import CompareResult, Paired
from expo.spec.request import check_seed

_MATCHABLE = 4


def compare(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    rewards_a: str | PathLike[str] | None = None,
    rewards_b: str | PathLike[str] | None = None,
    seed: int = 0,
) -> CompareResult:
    """The rewards of B against those of A on the same prompts.

    Args:
        a, b: files of answers, as `evaluate` writes them in any format.
        rewards_a, rewards_b: files of rewards, one a line in the order of the answers. [default: what `evaluate`
            wrote with a reward]
        seed: of the resamples.

    Raises:
        SpecError: a file cannot be read, has no rewards, or the prompts are not the same.
    """
    check_seed(seed)
    scored = [
        read_scored(Path(file), None if rewards is None else Path(rewards))
        for file, rewards in ((a, rewards_a), (b, rewards_b))
    ]
    pairs = pair(*scored, names=(str(a), str(b)))
    difference = paired(pairs.rewards_b, pairs.rewards_a, seed=seed)
    matched = len(pairs.rewards_a) >= _MATCHABLE
    return CompareResult(
        a=str(a),
        b=str(b),
        prompts=difference.n,
        mean_a=fmean(pairs.rewards_a),
        mean_b=fmean(pairs.rewards_b),
        difference=difference,
        win_rate=win_rate(pairs.rewards_b, pairs.rewards_a),
        matched_difference=_at(at_matched_length, pairs) if matched else None,
        matched_win_rate=_at(win_rate_at_matched_length, pairs) if matched else None,
        detectable=detectable(difference.standard_error),
        length_a=fmean(pairs.lengths_a),
        length_b=fmean(pairs.lengths_b),
        length_unit=pairs.length_unit,
    )


def _at(statistic: Callable[..., Paired], pairs: Pairs) -> Paired:
    """A statistic of B − A that takes both lengths."""
    return statistic(
        pairs.rewards_b, pairs.rewards_a, lengths_a=pairs.lengths_b, lengths_b=pairs.lengths_a
    )
