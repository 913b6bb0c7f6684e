"""ExPO: what lies beyond the aligned model (arXiv 2404.16792)."""

import torch
from torch import Tensor


def coefficient(alpha: float) -> float:
    """α − 1 in float64: what multiplies Δ when counting from the aligned model."""
    return alpha - 1.0


def extrapolate(base: Tensor, aligned: Tensor, alpha: float) -> Tensor:
    """θ_aligned + (α − 1)·Δ with Δ = θ_aligned − θ_base: three IEEE operations, no FMA, no rounding.

    α = 0 and α = 1 return copies of θ_base and θ_aligned, bit for bit.

    Args:
        base, aligned: of one shape and one dtype, float32 or float64.
    """
    return beyond(base, aligned, aligned - base, alpha)


def beyond(base: Tensor, aligned: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """`extrapolate` where Δ is there already."""
    if alpha in (0.0, 1.0):
        return (aligned if alpha else base).clone()
    # Two operations, not add(alpha=…) or lerp: those fuse, and their bytes differ between processors.
    return aligned + delta * coefficient(alpha)


def low_rank_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """s·L·R in float32, for L of shape (rows, r) and R of shape (r, columns) (LoRA, 2106.09685)."""
    return torch.mul(left @ right, scale)
