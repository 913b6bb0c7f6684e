"""From sums to what a person reads: effective α, noise, shares, per tensor, per module, in total."""

import math
from collections.abc import Iterable

from expo.operators.statistics import (
    Sample,
    Sums,
    asked_alpha,
    effective_alpha,
    relative_norm,
    rounding_noise,
)
from expo.planning.modules import module_of
from expo.results import Alternative, Statistics
from expo.spec.request import Rounding


def statistics(sums: Sums) -> Statistics:
    count = int(sums.elements)
    alpha = asked_alpha(sums)
    return Statistics(
        elements=count,
        alpha=alpha,
        effective_alpha=effective_alpha(alpha, sums.error_delta, sums.delta_square),
        rounding_noise=rounding_noise(sums.asked_square, sums.error_square),
        zero_share=sums.zeros / count if count else None,
        unmoved_share=sums.unmoved / count if count else None,
        delta_norm=math.sqrt(sums.delta_square),
        delta_rms=math.sqrt(sums.delta_square / count) if count else 0.0,
        relative_delta=relative_norm(sums.delta_square, sums.base_square),
    )


def total(sums: Iterable[Sums]) -> Sums:
    result = Sums()
    for more in sums:
        result = result.plus(more)
    return result


def by_module(sums: dict[str, Sums]) -> dict[str, Sums]:
    """Sums per module type, over all layers, in the order of first appearance."""
    modules: dict[str, Sums] = {}
    for name, more in sums.items():
        _, module = module_of(name)
        modules[module] = modules.get(module, Sums()).plus(more)
    return modules


def alternative(
    sums: dict[str, Sums], samples: dict[str, Sample], rounding: Rounding
) -> Alternative:
    """Weigh each tensor's sampled block by what the tensor contributes to the total."""
    sampled = total(sums[name] for name in samples)
    error_square = error_delta = 0.0
    for name, sample in samples.items():
        whole = sums[name]
        error_square += sample.error_square * whole.elements / sample.elements
        if sample.delta_square:
            error_delta += sample.error_delta * whole.delta_square / sample.delta_square
    other: Rounding = "stochastic" if rounding == "nearest" else "nearest"
    return Alternative(
        other,
        effective_alpha(asked_alpha(sampled), error_delta, sampled.delta_square),
        rounding_noise(sampled.asked_square, error_square),
    )
