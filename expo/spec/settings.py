"""Numbers that depend on the tensor: scalars, gradients over the layers, filters by name.

The rules are mergekit's. A gradient [a, b, …] is interpolated at t = index / (n − 1) over the layers
of a slice (t = 0 for what belongs to no layer). Of several filters the first that is a part of the
tensor's name decides; one without a filter, or `*`, fits all. What fits none falls through to the
next setting: source before slice before the whole spec.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from expo.errors import SpecError

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


def parse_setting(value: object) -> Setting:
    """A setting in the forms that mergekit knows.

    Raises:
        SpecError: it is none.
    """
    match value:
        case bool() | int() | float():
            return _finite(value)
        case [*points] if points and all(is_number(point) for point in points):
            return tuple(_finite(point) for point in points)
        case {"value": _}:
            return (_conditional(value),)
        case [*entries] if entries and all(isinstance(entry, dict) for entry in entries):
            return tuple(map(_conditional, entries))
        case _:
            raise SpecError(
                f"a number, a list of numbers over the layers, or filters with values, not {value!r}"
            )


def _conditional(entry: object) -> Conditional:
    match entry:
        case {"value": value, **more} if more.keys() <= {"filter"}:
            inner = parse_setting(value)
            name = more.get("filter")
            filters = isinstance(inner, tuple) and any(isinstance(i, Conditional) for i in inner)
            if filters or not (name is None or isinstance(name, str)):
                raise SpecError(f"a filter is a part of a name and has one value, not {entry!r}")
            return Conditional(inner, name)  # pyright: ignore[reportArgumentType]
        case _:
            raise SpecError(f"a filter has the keys filter and value, not {entry!r}")


def _finite(value: object) -> bool | float:
    assert isinstance(value, bool | int | float)
    if not math.isfinite(value):
        raise SpecError(f"input should be a finite number, not {value!r}")
    return value


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mapped(setting: Setting, convert: Callable[[float], float]) -> Setting:
    """A setting with every number converted."""
    if not isinstance(setting, tuple):
        return convert(float(setting))
    return tuple(  # pyright: ignore[reportReturnType] - of one kind, as the setting was
        Conditional(mapped(item.value, convert), item.filter)  # pyright: ignore[reportArgumentType]
        if isinstance(item, Conditional)
        else convert(item)
        for item in setting
    )
