"""ExPO: what lies beyond the aligned model (arXiv 2404.16792)."""

import torch
from torch import Tensor


def coefficient(alpha: float) -> float:
    """α − 1 in float64: what multiplies Δ when counting from the aligned model."""
    return alpha - 1.0


def extrapolate(
    base: Tensor,
    aligned: Tensor,
    alpha: float,
    *,
    delta: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """θ_aligned + (α − 1)·Δ with Δ = θ_aligned − θ_base: three IEEE operations, no FMA, no rounding.

    α = 0 and α = 1 return θ_base and θ_aligned themselves, bit for bit.

    Args:
        base, aligned: of one shape and one dtype, float32 or float64.
        delta: where to leave Δ, if wanted; always filled.
        out: where to leave the result; may be neither input.
    """
    delta = torch.sub(aligned, base, out=delta)
    if alpha == 0.0:
        return _copied(base, out)
    if alpha == 1.0:
        return _copied(aligned, out)
    # Two calls, not add(alpha=…) or lerp: those fuse, and their bytes differ between processors.
    scaled = torch.mul(delta, coefficient(alpha), out=out)
    return torch.add(aligned, scaled, out=out)


def low_rank_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """s·L·R in float32, for L of shape (rows, r) and R of shape (r, columns) (LoRA, 2106.09685)."""
    return torch.mul(left @ right, scale)


def _copied(source: Tensor, out: Tensor | None) -> Tensor:
    return source.clone() if out is None else out.copy_(source)
