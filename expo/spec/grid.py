"""The values to try: `1.0:1.6:0.1`, `1,1.1,1.5`, or `auto`."""

import math

from expo.errors import SpecError

_MOST = 200


def read_values(text: str, *, what: str = "alphas") -> tuple[float, ...]:
    """A grid: `first:last:step`, the last one included, or numbers with commas between; rising.

    Raises:
        SpecError: it is none, or holds more than 200 values.
    """
    try:
        values = _range(*map(float, text.split(":"))) if ":" in text else _listed(text)
    except (ValueError, TypeError):
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise SpecError(f"{what} {text}: give first:last:step, like 1.0:1.6:0.1, or 1,1.2,1.5")
    if len(values) > _MOST:
        raise SpecError(f"{what} {text}: {len(values)} values are more than {_MOST}: a larger step")
    return tuple(sorted(set(values)))


def _range(first: float, last: float, step: float) -> list[float]:
    if step <= 0 or last < first or not math.isfinite(first + last):
        return []
    count = math.floor((last - first) / step + 1e-6) + 1
    return [float(f"{first + n * step:.10g}") for n in range(min(count, _MOST + 1))]


def _listed(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]
