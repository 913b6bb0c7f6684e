"""Search over several numbers at once by CMA-ES (Hansen, arXiv 1604.00772), through the library `cma`."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy as np

from expo.errors import ExpoError, SpecError
from expo.spec.request import MAX_SEED
from expo.sweeping.bench import Bench, Chunk
from expo.sweeping.candidates import Point
from expo.sweeping.cliff import beyond_cliff

_STEP = 0.25  # the first steps, as a share of each range
_DIGITS = 6  # of a candidate's numbers: they stand in a spec


def check_search(values: Mapping[str, tuple[float, ...]]) -> None:
    """Refuse before the work what could not be searched.

    Raises:
        ExpoError: cma is not installed. SpecError: fewer than two numbers, or an empty range.
    """
    if find_spec("cma") is None:
        raise ExpoError("--search cma needs cma: pip install 'expo-merge[search]'")
    if len(values) < 2:
        raise SpecError("--search cma moves several numbers: vary two or more, or leave it out")
    for name, numbers in values.items():
        if min(numbers) == max(numbers):
            raise SpecError(f"--vary {name}: {numbers[0]:g} is no range: give first:last:step")


def evolve(
    bench: Bench,
    values: Mapping[str, tuple[float, ...]],
    chunks: Sequence[Chunk],
    *,
    budget: int,
    seed: int,
) -> None:
    """Measure up to `budget` candidates inside the ranges, from the baseline on.

    All are tried on the same prompts with the same noise, so they are compared in pairs. What lies beyond
    the cliff counts as worse than all that does not. The steps are a function of the seed and of
    what was measured: a resumed search repeats them.
    """
    import cma

    low, high = (np.array([pick(v) for v in values.values()]) for pick in (min, max))
    start = np.clip((np.array(bench.baseline) - low) / (high - low), 0.0, 1.0)
    bench.measure([bench.baseline], chunks)
    options = {
        "bounds": [0, 1],
        "seed": seed % MAX_SEED + 1,
        "verbose": -9,
        "verb_disp": 0,
        "verb_log": 0,
    }
    strategy = cma.CMAEvolutionStrategy(start.tolist(), _STEP, options)
    tried = 1
    while tried < budget and not strategy.stop():
        asked = strategy.ask()[: budget - tried]
        points = [_point(low + np.asarray(x) * (high - low)) for x in asked]
        bench.measure(list(dict.fromkeys(points)), chunks)
        tried += len(points)
        if len(points) < strategy.popsize:
            break
        strategy.tell(asked, [_cost(bench, point, chunks) for point in points])


def _point(values: np.ndarray) -> Point:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)


def _cost(bench: Bench, point: Point, chunks: Sequence[Chunk]) -> float:
    rows, base = bench.rows(point, chunks), bench.rows(bench.baseline, chunks)
    reward = float(np.mean([row.reward for row in rows]))
    if not beyond_cliff(rows, base):
        return -reward
    rewards = [row.reward for row in base]
    return -reward + (max(rewards) - min(rewards)) + abs(float(np.mean(rewards))) + 1.0
