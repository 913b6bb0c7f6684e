"""The verdict: chosen on one half of the prompts, reported on the other, with intervals."""

import math
from collections.abc import Sequence

import numpy as np

from expo.operators.paired import at_matched_length, detectable, mean_interval, paired
from expo.results import Paired, SweepPoint, Verdict
from expo.spec.request import paper_alpha
from expo.sweeping.bench import Bench, Chunk, Row
from expo.sweeping.candidates import Point
from expo.sweeping.cliff import beyond_cliff, mean
from expo.sweeping.search import eligible, leader
from expo.sweeping.words import in_words

Answers = tuple[Sequence[bool], Sequence[bool]]
"""Whether the baseline and the candidate were right, question by question."""


def choose(bench: Bench, chunks: Sequence[Chunk]) -> tuple[Point, Point]:
    """(the chosen, the best) of the points measured on all of `chunks`.

    The chosen is the nearest to the baseline whose paired difference to the best lies within one standard
    error: for α ≥ 1 the smallest. It may be the baseline itself.
    """
    points = eligible(bench, chunks)
    best = leader(bench, points, chunks)
    top = _rewards(bench.rows(best, chunks))
    for point in sorted(points, key=lambda p: (math.dist(p, bench.baseline), p)):
        found = paired(top, _rewards(bench.rows(point, chunks)))
        if found.mean <= found.standard_error:
            return point, best
    return best, best


def rival(bench: Bench, chosen: Point, chunks: Sequence[Chunk]) -> Point:
    """Whom to hold against the baseline: the chosen, or where that is the baseline the best of the others,
    of those beyond the cliff only if there are no others."""
    if chosen != bench.baseline:
        return chosen
    within = [p for p in eligible(bench, chunks) if p != bench.baseline]
    others = [p for p in bench.points() if p != bench.baseline and bench.has(p, chunks)]
    return leader(bench, within or others, chunks)


def judge(
    bench: Bench,
    points: Sequence[SweepPoint],
    candidate: Point,
    *,
    chosen: Point,
    best: Point,
    held_out: Sequence[Chunk],
    answers: Answers | None = None,
) -> Verdict:
    """What the half that nothing was chosen on says of the candidate against the baseline.

    Args:
        points: all that were tried, for the words.
    """
    rows, base = bench.rows(candidate, held_out), bench.rows(bench.baseline, held_out)
    difference = paired(_rewards(rows), _rewards(base))
    beats = candidate == chosen and difference.low > 0
    verdict = Verdict(
        at=bench.named(candidate if beats else bench.baseline),
        beats=beats,
        candidate=bench.named(candidate),
        best=bench.named(best),
        prompts=len(rows),
        reward=mean_interval(_rewards(rows if beats else base)),
        difference=difference,
        second_reward=_second(rows, base),
        at_matched_length=_matched(rows, base),
        length=(mean(base, "length"), mean(rows, "length")),
        unfinished=(mean(base, "unfinished"), mean(rows, "unfinished")),
        repetition=(mean(base, "repetition"), mean(rows, "repetition")),
        accuracy=None if answers is None else (_share(answers[0]), _share(answers[1])),
        accuracy_difference=None if answers is None else paired(answers[1], answers[0]),
        detectable=detectable(difference.standard_error),
        text="",
    )
    return in_words(verdict, points, was_chosen=candidate == chosen)


def summary(bench: Bench, point: Point, chunks: Sequence[Chunk]) -> SweepPoint:
    """What a point came to on those of `chunks` that it was tried on."""
    tried = [chunk for chunk in chunks if bench.has(point, [chunk])]
    rows, base = bench.rows(point, tried), bench.rows(bench.baseline, tried)
    at = bench.named(point)
    alpha = at.get("alpha")
    likelihood = mean(rows, "log_likelihood")
    seconds = [r.second_reward for r in rows if r.second_reward is not None]
    is_baseline = point == bench.baseline
    return SweepPoint(
        at=at,
        alpha=alpha,
        paper_alpha=None if alpha is None else paper_alpha(alpha),
        prompts=len(rows),
        reward=mean_interval(_rewards(rows)),
        difference=None if is_baseline else paired(_rewards(rows), _rewards(base)),
        second_reward=mean_interval(seconds) if seconds else None,
        length=mean(rows, "length"),
        unfinished=mean(rows, "unfinished"),
        repetition=mean(rows, "repetition"),
        log_likelihood=likelihood,
        perplexity=math.exp(min(-likelihood, 700.0)),
        beyond_cliff=beyond_cliff(rows, base),
    )


def _second(rows: Sequence[Row], base: Sequence[Row]) -> Paired | None:
    pairs = [
        (row.second_reward, other.second_reward)
        for row, other in zip(rows, base, strict=True)
        if row.second_reward is not None and other.second_reward is not None
    ]
    return paired([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def _matched(rows: Sequence[Row], base: Sequence[Row]) -> Paired | None:
    if len(rows) < 4:
        return None
    lengths = [r.length for r in rows], [b.length for b in base]
    return at_matched_length(
        _rewards(rows), _rewards(base), lengths_a=lengths[0], lengths_b=lengths[1]
    )


def _share(right: Sequence[bool]) -> float:
    return float(np.mean(right))


def _rewards(rows: Sequence[Row]) -> list[float]:
    return [row.reward for row in rows]
