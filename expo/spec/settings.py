"""Numbers that depend on the tensor: scalars, gradients over the layers, filters by name.

The rules are mergekit's. A gradient [a, b, …] is interpolated at t = index / (n − 1) over the layers
of a slice (t = 0 for what belongs to no layer). Of several filters the first that is a part of the
tensor's name decides; one without a filter, or `*`, fits all. What fits none falls through to the
next setting: source before slice before the whole spec.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from expo.checkpoint.parsing import shown
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


def parse_setting(value: object, *, flag: bool = False) -> Setting:
    """A setting in the forms that mergekit knows, numbers also as text; `flag` allows words as `yes`.

    Other keys than `value` and `filter` are left out.

    Raises:
        SpecError: it is none.
    """
    match value:
        case bool() | int() | float() | str():
            return _scalar(value, flag=flag)
        case {"value": _}:
            return (_conditional(value, flag=flag),)
        case [*entries] if entries and all(isinstance(entry, dict) for entry in entries):
            return tuple(_conditional(entry, flag=flag) for entry in entries)
        case [*points] if points and not any(isinstance(p, bool | list | dict) for p in points):
            return tuple(float(_scalar(point, flag=False)) for point in points)
        case _:
            raise _no_setting(value)


def _conditional(entry: object, *, flag: bool) -> Conditional:
    match entry:
        case {"value": value, **more}:
            name = more.get("filter")
            if isinstance(value, dict) or not (name is None or isinstance(name, str)):
                raise SpecError(
                    f"a filter is a part of a name and has one value, not {shown(entry)}"
                )
            inner = parse_setting(value, flag=flag)
            if isinstance(inner, tuple) and any(isinstance(i, Conditional) for i in inner):
                raise SpecError(
                    f"a filter is a part of a name and has one value, not {shown(entry)}"
                )
            return Conditional(inner, name)  # pyright: ignore[reportArgumentType]
        case _:
            raise SpecError(f"a filter has the keys filter and value, not {shown(entry)}")


_FLAGS = {
    **dict.fromkeys(("true", "yes", "on", "y", "t"), True),
    **dict.fromkeys(("false", "no", "off", "n", "f"), False),
}


def _scalar(value: object, *, flag: bool) -> Scalar:
    if flag and isinstance(value, str) and value.lower() in _FLAGS:
        return _FLAGS[value.lower()]
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, bool | int | float):
        raise _no_setting(value)
    return finite(number)


def _no_setting(value: object) -> SpecError:
    return SpecError(
        f"a number, a list of numbers over the layers, or filters with values, not {shown(value)}"
    )


def finite(value: Scalar) -> Scalar:
    """The value.

    Raises:
        SpecError: no float holds it.
    """
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        is_finite = False
    if not is_finite:
        raise SpecError(f"should be a finite number, not {shown(value)}")
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
