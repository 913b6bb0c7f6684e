"""Patterns that fit nothing: they are warned of, because what they were to do does not happen."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.headers import printable
from expo.checkpoint.reference import Reference
from expo.planning.findings import Findings
from expo.spec.request import Request
from expo.spec.resolved import resolved
from expo.spec.settings import Conditional
from expo.spec.strict import nearest

Opened = Mapping[Reference, Checkpoint]


def check_patterns(
    request: Request,
    opened: Opened,
    donor: Checkpoint,
    allowed: frozenset[str],
    found: Findings,
) -> None:
    """Warn of filters, `--include` and `--allow-missing` (which names the `allowed`) that fit nothing."""
    found.warnings += _filters(request, donor)
    found.warnings += _includes(request.include, donor)
    found.warnings += _allowing(request, opened, allowed)


def _filters(request: Request, donor: Checkpoint) -> Iterator[str]:
    """Filters of parameters that are part of no tensor's name."""
    parts = sorted({part for name in donor.weights for part in name.split(".")})
    for text in dict.fromkeys(_filters_in(resolved(request))):
        if not any(Conditional(0.0, text).fits(name) for name in donor.weights):
            yield (
                f"filter {printable(text)} fits no tensor of {donor.label}: its value has no effect"
                f"{nearest(text, parts)}"
            )


def _filters_in(value: object) -> Iterator[str]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and isinstance(value.get("filter"), str):
        yield value["filter"]
    for item in items:
        yield from _filters_in(item)


def _includes(patterns: Iterable[str], donor: Checkpoint) -> Iterator[str]:
    places = [donor.files, *([donor.adapter.files] if donor.adapter else [])]
    names = [name for files in places for name in files.sizes]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            yield f"--include {printable(pattern)} fits no file of {donor.label}: nothing is added"


def _allowing(request: Request, opened: Opened, allowed: frozenset[str]) -> Iterator[str]:
    """`--allow-missing` where no model lacks a tensor that it fits."""
    pattern = request.allow_missing
    held = [model.weights.keys() for model in opened.values()]
    uneven = set().union(*held) - set(held[0]).intersection(*held)
    if pattern is not None and not allowed & uneven:
        yield f"--allow-missing {printable(pattern)} fits no tensor that only some models have"
