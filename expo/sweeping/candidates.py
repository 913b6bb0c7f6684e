"""What is swept: α, or any numbers of a spec, and the plan that each value makes."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from os import PathLike
from pathlib import Path

from expo.checkpoint.checkpoint import open_checkpoint
from expo.errors import CheckpointError, SpecError
from expo.planning.build import build_plan, plan_of
from expo.planning.plan import Plan
from expo.spec.read import Spec, read_request, request_of
from expo.spec.recipes import spec_path
from expo.spec.request import Request, make_request
from expo.spec.strict import Document

Point = tuple[float, ...]
"""A candidate: a value for every number that is swept; (α,) where that is α."""

Pair = tuple[str | PathLike[str], str | PathLike[str]]

_PLANS = 16  # kept at a time


@dataclass(frozen=True)
class Candidates:
    """The names of the numbers that are swept, the point that all are held against, the request and the
    plan of a point."""

    names: tuple[str, ...]
    baseline: Point
    request_of: Callable[[Point], Request]
    plan_of: Callable[[Point], Plan]


def alphas_of(spec: Spec | Pair) -> Candidates:
    """α of an ExPO spec (whatever it says itself) or of a pair, against the aligned model.

    Raises:
        SpecError, CheckpointError: it is no ExPO, or would be refused.
    """
    if isinstance(spec, tuple):
        sft, aligned = map(str, spec)
        request = make_request(sft, aligned)
    else:
        request = read_request(spec)
    if request.method != "expo":
        cure = "vary its numbers: --vary PATH=VALUES"
        raise SpecError(f"{request.method} has no alpha to sweep: {cure}")
    plan = _runnable(build_plan(request.at(1.0)))
    return Candidates(
        ("alpha",),
        (1.0,),
        lambda point: request.at(point[0]),
        lru_cache(_PLANS)(lambda point: plan.at(point[0])),
    )


def numbers_of(spec: Spec | Pair, names: tuple[str, ...]) -> Candidates:
    """Numbers of a spec, named by their place in it (`models.0.parameters.weight`), against the spec as it is.

    Raises:
        SpecError: the spec is no file or mapping, or has no number there. CheckpointError: it is refused.
    """
    if isinstance(spec, Request | tuple):
        raise SpecError(
            "only a spec has numbers to vary: write one, expo extrapolate --print-spec does"
        )
    beside = None
    if isinstance(spec, Mapping):
        value: object = dict(spec)
    else:
        path = spec_path(Path(spec))
        value, beside = Document.read(path).value, path.parent
    baseline = tuple(_number(value, name) for name in names)

    def request(point: Point) -> Request:
        changed = copy.deepcopy(value)
        for name, number in zip(names, point, strict=True):
            _set(changed, name, number)
        return request_of(Document(changed, "spec"), beside=beside)

    first = request(baseline)
    if first.foreign is not None:
        raise SpecError(f"what runs through mergekit cannot be swept: {first.foreign.reasons[0]}")
    opened = {reference: open_checkpoint(reference) for reference in first.references()}
    plan = lru_cache(_PLANS)(lambda point: _runnable(plan_of(request(point), opened)))
    return Candidates(names, baseline, request, plan)


def grid(values: Mapping[str, tuple[float, ...]]) -> tuple[Point, ...]:
    """Every combination."""
    return tuple(product(*values.values()))


def _runnable(plan: Plan) -> Plan:
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    return plan


def _number(spec: object, name: str) -> float:
    try:
        found = _holder(spec, name)[_last(name)]  # pyright: ignore
    except (LookupError, TypeError, ValueError):
        found = None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise SpecError(f"--vary {name}: the spec has no number there: name its place, keys and places in lists "
                        "with dots between, like models.0.parameters.weight")  # fmt: skip
    return float(found)


def _set(spec: object, name: str, value: float) -> None:
    """Whole where the spec has a whole number: it may be one of layers."""
    holder, last = _holder(spec, name), _last(name)
    is_whole = isinstance(holder[last], int) and value.is_integer()  # pyright: ignore
    holder[last] = int(value) if is_whole else value  # pyright: ignore


def _holder(spec: object, name: str) -> object:
    """The mapping or list that holds the number."""
    for key in name.split(".")[:-1]:
        spec = spec[int(key) if isinstance(spec, list) else key]  # pyright: ignore
    return spec


def _last(name: str) -> str | int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else last
