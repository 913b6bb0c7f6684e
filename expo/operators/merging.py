"""Sums of task vectors, with signs elected: the torch reference of what is compiled.

All tensors are of one shape and one dtype, float32 or float64; results are new tensors. The rules,
orders and defaults are those of mergekit 0.1.5, so that its published specs give the same weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def add_task_vectors(
    start: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    elect_sign: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """start + λ·Σ wᵢΔᵢ, in the order of the models (task arithmetic, arXiv 2212.04089).

    `elect_sign` keeps of every element only the terms whose sign is that of Σ wᵢΔᵢ, and `normalize`
    divides by the weights that took part (TIES, arXiv 2306.01708).
    """
    terms = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    divisor: float | Tensor = math.fsum(weights)
    if elect_sign:
        terms, divisor = _elected(terms, weights, normalize=normalize)
    elif abs(divisor) < 1e-8:
        divisor = 1.0
    mixed = terms[0]
    for term in terms[1:]:
        mixed = mixed + term
    if normalize:
        mixed = mixed / divisor
    if scale != 1.0:
        mixed = mixed * scale
    return start + mixed


def _elected(
    terms: list[Tensor], weights: Sequence[float], *, normalize: bool
) -> tuple[list[Tensor], Tensor]:
    """The terms whose sign is that of their sum, 0 elsewhere, and the sum of their weights.

    Zeros have no sign. Where no term is left the weights count as 1.
    """
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    positive = total >= 0
    # Products with booleans: torch.where takes five times as long.
    agrees = [((term > 0) == positive) & (term != 0) for term in terms]
    kept = [term * mask for mask, term in zip(agrees, terms, strict=True)]
    divisor = torch.ones((), dtype=total.dtype)
    if normalize:
        divisor = torch.zeros_like(total)
        for mask, weight in zip(agrees, weights, strict=True):
            divisor += mask * weight
        divisor += divisor == 0
    return kept, divisor
