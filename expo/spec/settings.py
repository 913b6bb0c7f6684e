"""Numbers that depend on the tensor: scalars, gradients over the layers, filters by name.

The rules are mergekit's. A gradient [a, b, …] is interpolated at t = index / (n − 1) over the layers
of a slice (t = 0 for what belongs to no layer). Of several filters the first that is a part of the
tensor's name decides; one without a filter, or `*`, fits all. What fits none falls through to the
next setting: source before slice before the whole spec.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Scalar = bool | float
Gradient = tuple[float, ...]


@dataclass(frozen=True)
class Conditional:
    """A value for the tensors whose name holds `filter`."""

    value: "Scalar | Gradient"
    filter: str | None = None

    def fits(self, name: str) -> bool:
        return self.filter in (None, "*") or (self.filter or "") in name


Setting = Scalar | Gradient | tuple[Conditional, ...]
Settings = Mapping[str, Setting]


def evaluate(setting: Setting, name: str, t: float) -> Scalar | None:
    """The value of one setting for a tensor at depth t in [0, 1]; None where no filter fits."""
    if isinstance(setting, bool | int | float):
        return setting
    if setting and isinstance(setting[0], Conditional):
        fitting = (c for c in setting if isinstance(c, Conditional) and c.fits(name))
        found = next(fitting, None)
        return None if found is None else evaluate(found.value, name, t)
    return _interpolated([point for point in setting if not isinstance(point, Conditional)], t)


def first_value(settings: Iterable[Settings], key: str, name: str, t: float) -> Scalar | None:
    """The value of `key` from the first of `settings` that has one for this tensor."""
    for scope in settings:
        if key in scope:
            value = evaluate(scope[key], name, t)
            if value is not None:
                return value
    return None


def _interpolated(points: list[float], t: float) -> float:
    at = t * (len(points) - 1)
    below = int(at)
    above = min(below + 1, len(points) - 1)
    share = at - below
    return (1 - share) * points[below] + share * points[above]
