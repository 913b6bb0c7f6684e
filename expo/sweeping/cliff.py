"""Where candidates stop being language models: a bound on the search, never its objective.

Per-token likelihood under the aligned model is flat until the reward peaks and falls off behind it.
"""

from collections.abc import Sequence

import numpy as np

from expo.sweeping.bench import Row

UNFINISHED = 0.1
"""More answers without an end than the baseline has, as a share of all."""

REPETITION = 0.2
"""More repeated 4-grams than the baseline has."""

LIKELIHOOD = 0.5
"""Nats a token that the answers are less likely, under the baseline, than its own."""


def beyond_cliff(rows: Sequence[Row], baseline: Sequence[Row]) -> bool:
    """Whether a candidate's answers do not end, loop, or are far from what the baseline would say."""
    return (
        mean(rows, "unfinished") > mean(baseline, "unfinished") + UNFINISHED
        or mean(rows, "repetition") > mean(baseline, "repetition") + REPETITION
        or mean(rows, "log_likelihood") < mean(baseline, "log_likelihood") - LIKELIHOOD
    )


def mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([getattr(row, name) for row in rows]))
