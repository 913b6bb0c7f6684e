"""Merge methods as functions of tensors: weighted means, sums of task vectors, arcs on a sphere.

All tensors are of one shape and one dtype, float32 or float64; results are new tensors. The rules,
orders and defaults are those of mergekit 0.1.5, so that its published specs give the same weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Σ wᵢθᵢ, over Σ wᵢ if normalized (model soups, arXiv 2203.05482)."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor * weight
    return total / math.fsum(weights) if normalize else total


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


def arc(a: Tensor, b: Tensor, coefficient_a: Tensor, coefficient_b: Tensor) -> Tensor:
    """c_a·a + c_b·b, with coefficients that broadcast."""
    return coefficient_a * a + coefficient_b * b


def slerp_coefficients(
    norm_a: float, norm_b: float, dot: float, t: float, *, threshold: float = 0.9995
) -> tuple[float, float]:
    """What spherical interpolation gives a and b, from their norms and ⟨a, b⟩ (Shoemake 1985).

    Linear where the two are nearly (anti)parallel. Zero vectors count as of norm 1.
    """
    lengths = [norm if norm > 1e-8 else 1.0 for norm in (norm_a, norm_b)]
    cosine = min(max(dot / (lengths[0] * lengths[1]), -1.0), 1.0)
    if abs(cosine) > threshold:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def nuslerp_coefficients(a: Tensor, b: Tensor, t: float, dim: int | None) -> tuple[Tensor, Tensor]:
    """The same for every vector along `dim` (None: the whole tensor), as mergekit's NuSLERP has it.

    Returns:
        coefficients of a and b, of their shape with `dim` reduced to 1; scalars for None.
    """
    if dim is None:
        a, b, dim = a.reshape(-1), b.reshape(-1), 0
    norm_a, norm_b = (x.norm(dim=dim, keepdim=True).clamp(min=1e-7) for x in (a, b))
    cosine = ((a * b).sum(dim=dim, keepdim=True) / norm_a / norm_b).clamp(-1, 1)
    is_line = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(is_line, torch.zeros_like(cosine), cosine))
    arc_a, arc_b = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
    return (
        torch.where(is_line, torch.full_like(cosine, 1 - t), arc_a),
        torch.where(is_line, torch.full_like(cosine, t), arc_b),
    )
