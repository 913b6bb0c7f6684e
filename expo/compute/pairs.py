"""A stretch of a pair as torch tensors, on any one device: what `BlockWorker` does in one pass over a block, in kernels
that each go over all of it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from expo.compute.choice import working_dtype
from expo.operators.extrapolate import beyond
from expo.planning.jobs import TensorJob

_ROW = 512  # elements that are summed in the working precision, as many as a lane of the compiled kernels


class Pair(NamedTuple):
    """Both sides in the working precision, Δ, and by block ⟨base, base⟩, ⟨Δ, Δ⟩ and the count of Δ = 0."""

    base: Tensor
    aligned: Tensor
    delta: Tensor
    norms: Tensor


def working(job: TensorJob) -> torch.dtype:
    """What both sides of a job's pair are widened to."""
    return torch.float64 if working_dtype(job) is np.float64 else torch.float32


def pair_of(base: Tensor, aligned: Tensor, dtype: torch.dtype, block: int) -> Pair:
    """Of two flat tensors as they are stored, on one device."""
    base, aligned = base.to(dtype), aligned.to(dtype)
    delta = aligned - base
    norms = (base * base, delta * delta, delta == 0)
    return Pair(base, aligned, delta, torch.stack([by_block(values, block) for values in norms]))


class Extrapolated(NamedTuple):
    """The exact result and the rounded one; by block, the pair's norms and the sums of the rounding: (6, blocks)."""

    exact: Tensor
    rounded: Tensor
    sums: Tensor


def extrapolated(
    pair: Pair, alpha: float, rounded: Callable[[Tensor], Tensor], block: int
) -> Extrapolated:
    """The pair's formula, its one rounding and all sums."""
    exact = beyond(pair.base, pair.aligned, pair.delta, alpha)
    result = rounded(exact)
    errors = rounding_sums(exact, result, pair.delta, pair.aligned, block)
    return Extrapolated(exact, result, torch.cat([pair.norms, errors]))


def rounding_sums(
    exact: Tensor, rounded: Tensor, delta: Tensor, still: Tensor, block: int
) -> Tensor:
    """By block ⟨r, r⟩, ⟨r, Δ⟩ with r = rounded − exact, and the count of what equals `still`: (3, blocks)."""
    wide = rounded.to(exact.dtype)
    error = wide - exact
    sums = (error * error, error * delta, wide == still)
    return torch.stack([by_block(values, block) for values in sums])


def by_block(values: Tensor, block: int) -> Tensor:
    """The sum over each block of so many elements, the last one as long as it is: float64.

    In rows, whose totals are added in float64, and in an order that depends on the length alone.
    """
    row = math.gcd(block, _ROW)
    whole = values.numel() // row * row
    rows = values[:whole].view(-1, row).sum(1).double()
    if whole < values.numel():
        rows = torch.cat([rows, values[whole:].sum().double().view(1)])
    missing = -rows.numel() % (block // row)
    return torch.nn.functional.pad(rows, (0, missing)).view(-1, block // row).sum(1)
