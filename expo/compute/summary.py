"""From sums to what a person reads: effective α, noise, shares, per tensor, per module, in total."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from expo.compute.worker import Sample
from expo.operators.statistics import (
    Sums,
    asked_alpha,
    effective_alpha,
    relative_norm,
    rounding_noise,
)
from expo.planning.modules import module_of
from expo.spec.request import Rounding


@dataclass(frozen=True)
class Statistics:
    """What a merge did, over some tensors. Shares are of the elements that both sides have.

    `alpha` is what was asked for over these tensors, `effective_alpha` what came out after rounding,
    `rounding_noise` the RMS of the rounding error over the RMS of the increment; None where Δ is
    zero. Of methods other than ExPO, Δ is the intended change and the asked α is 1.
    """

    elements: int
    alpha: float | None
    effective_alpha: float | None
    rounding_noise: float | None
    zero_share: float | None
    unmoved_share: float | None
    delta_norm: float
    delta_rms: float
    relative_delta: float | None
    nonfinite: int = 0  # a run that meets one is refused


@dataclass(frozen=True)
class Alternative:
    """What the other rounding would give, estimated from one block of every tensor."""

    rounding: Rounding
    effective_alpha: float | None
    rounding_noise: float | None


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
