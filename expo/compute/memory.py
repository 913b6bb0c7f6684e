"""The same arithmetic on tensors in memory, for trainer callbacks and notebooks."""

import torch
from torch import Tensor

from expo.errors import CheckpointError
from expo.operators.extrapolate import extrapolate
from expo.operators.rounding import round_nearest


def apply_tensor(name: str, sft: Tensor, aligned: Tensor, alpha: float) -> Tensor:
    """θ_sft + α(θ_aligned − θ_sft) in the aligned tensor's dtype, rounded to nearest.

    Raises:
        CheckpointError: shapes or integers differ, or something is not finite.
    """
    if sft.shape != aligned.shape:
        raise CheckpointError(
            f"{name} is {list(sft.shape)} in SFT, {list(aligned.shape)} in aligned"
        )
    if not (sft.is_floating_point() and aligned.is_floating_point()):
        if not torch.equal(sft, aligned):
            raise CheckpointError(f"{name} holds integers that differ between SFT and aligned")
        return aligned.clone()
    double = torch.float64 in (sft.dtype, aligned.dtype)
    working = torch.float64 if double else torch.float32
    exact = extrapolate(sft.detach().to(working), aligned.detach().to(working), alpha)
    result = round_nearest(exact, aligned.dtype)
    if not bool(result.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or Inf, or overflows {aligned.dtype}")
    return result
