"""Which candidates are tried, on how many prompts."""

import math
from collections.abc import Sequence

import numpy as np

from expo.operators.paired import paired
from expo.spec.request import paper_alpha
from expo.sweeping.bench import Bench, Chunk, Row
from expo.sweeping.candidates import Point
from expo.sweeping.cliff import beyond_cliff

RACE_PROMPTS = 200
FIRST = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
"""The paper's grid, in this convention."""

WIDEN = 1.5
"""Each step upward has this times the paper's a of the one before."""

HIGHEST = 64.0
_STANDARD_ERRORS = 2.0
_SURVIVORS = 6


def widen(bench: Bench, chunks: Sequence[Chunk]) -> None:
    """Try α upward from the paper's grid until two in a row are clearly worse than the best, or the cliff
    is reached; then between the best and its neighbours.

    α = 1 is the baseline, and the first.
    """
    tried = [(alpha,) for alpha in FIRST]
    bench.measure(tried, chunks)
    while not _is_over(bench, chunks) and tried[-1][0] < HIGHEST:
        step = float(f"{WIDEN * paper_alpha(tried[-1][0]):.2g}")
        tried.append((round(1 + step, 6),))
        bench.measure(tried[-1:], chunks)
    bench.measure(_between(bench, chunks), chunks)


def survivors(bench: Bench, chunks: Sequence[Chunk]) -> list[Point]:
    """Who may still be the best: not clearly worse than the best so far, not beyond the cliff. The baseline
    is always among them."""
    within = eligible(bench, chunks)
    best = bench.rows(leader(bench, within, chunks), chunks)
    ranked = sorted(within, key=lambda p: -_mean(bench.rows(p, chunks)))
    left = [p for p in ranked if not _is_worse(bench.rows(p, chunks), best)][:_SURVIVORS]
    return sorted({*left, bench.baseline})


def eligible(bench: Bench, chunks: Sequence[Chunk]) -> list[Point]:
    """The points measured on all of the chunks that do not lie beyond the cliff."""
    base = bench.rows(bench.baseline, chunks)
    known = [p for p in bench.points() if bench.has(p, chunks)]
    return [p for p in known if not beyond_cliff(bench.rows(p, chunks), base)]


def leader(bench: Bench, points: Sequence[Point], chunks: Sequence[Chunk]) -> Point:
    """The point with the highest mean reward; of several the nearest to the baseline."""
    return max(points, key=lambda p: (_mean(bench.rows(p, chunks)), -math.dist(p, bench.baseline)))


def _is_over(bench: Bench, chunks: Sequence[Chunk]) -> bool:
    points = bench.points()
    base = bench.rows(bench.baseline, chunks)
    if beyond_cliff(bench.rows(points[-1], chunks), base):
        return True
    best = bench.rows(leader(bench, points, chunks), chunks)
    return all(_is_worse(bench.rows(p, chunks), best) for p in points[-2:])


def _between(bench: Bench, chunks: Sequence[Chunk]) -> list[Point]:
    """Halfway from the best to its neighbours, where there is room."""
    points = bench.points()
    at = points.index(leader(bench, eligible(bench, chunks), chunks))
    near = [points[i] for i in (at - 1, at + 1) if 0 <= i < len(points)]
    halves = [
        round((points[at][0] + p[0]) / 2, 3) for p in near if abs(p[0] - points[at][0]) > 0.11
    ]
    return [(half,) for half in halves]


def _is_worse(rows: Sequence[Row], best: Sequence[Row]) -> bool:
    """Clearly, by the paired difference."""
    found = paired([r.reward for r in rows], [r.reward for r in best])
    return found.mean + _STANDARD_ERRORS * found.standard_error < 0


def _mean(rows: Sequence[Row]) -> float:
    return float(np.mean([row.reward for row in rows]))
