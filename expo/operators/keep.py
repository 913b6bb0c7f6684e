"""What the rules keep, given a matrix's singular values."""

import torch
from torch import Tensor

from expo.operators.low_rank import (
    energy_rank,
    gavish_donoho,
    laser_rank,
    laser_rmt_threshold,
    mp_edge,
    noise_level,
    rank_above,
    shrink_frobenius,
    shrink_operator,
)
from expo.operators.rules import Keep

_BLOCK = 1 << 16  # elements that stay in a core's cache
_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
_SHRINKAGE = {"frobenius": shrink_frobenius, "operator": shrink_operator}


def fixed_rank(keep: Keep, m: int, n: int) -> int | None:
    """The rank where it does not depend on the values, at most that of an (m, n) matrix."""
    if keep.rule == "rank":
        return min(int(keep.amount), m, n)
    return laser_rank(m, n, keep.amount) if keep.rule == "rho" else None


def threshold(keep: Keep, values: Tensor, m: int, n: int) -> float | None:
    """Values above it stay; None where no threshold decides."""
    sigma = noise_level(values, m, n)
    match keep.rule:
        case "gd":
            return gavish_donoho(sigma, m, n)
        case "laser_rmt":
            return laser_rmt_threshold(values, m, n)
        case "mp" | "shrink":
            return mp_edge(sigma, m, n)
    return None


def kept_values(keep: Keep, values: Tensor, m: int, n: int) -> Tensor:
    """The singular values of what is kept: as many as stay, shrunk if the rule shrinks.

    Args:
        values: all of an (m, n) matrix, m ≤ n, float64, descending.
    """
    rank = fixed_rank(keep, m, n)
    if keep.rule == "energy":
        rank = energy_rank(values, keep.amount)
    least = threshold(keep, values, m, n)
    if least is not None:
        rank = rank_above(values, least)
    top, sigma = values[:rank], noise_level(values, m, n)
    if keep.rule != "shrink" or sigma == 0.0:
        return top
    return _SHRINKAGE[keep.norm](top, sigma, m, n)


def rounding_sigma(weights: Tensor, dtype: torch.dtype) -> float:
    """σ_ulp = √(mean(ulp(W)²)/12): the noise of one rounding of `weights` to `dtype`."""
    blocks = weights.reshape(-1).split(_BLOCK)
    total = sum(float(unit_in_last_place(b, dtype).double().square().sum()) for b in blocks)
    return (total / weights.numel() / 12.0) ** 0.5


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next value of `dtype`, of float32 or float64 values, in their own dtype."""
    info = torch.finfo(dtype)
    bits, exponent = _EXPONENTS[values.dtype]
    power_of_two = (values.view(bits) & exponent).view(values.dtype)
    return power_of_two.clamp_(min=info.tiny).mul_(info.eps)
