"""The arithmetic of blocks by torch's operators: the reference, and the path for float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.dtypes import TORCH_NAMES
from expo.compute.arithmetic import Coded, Done, Draws, Stored
from expo.operators.extrapolate import beyond
from expo.operators.keep import rounding_sigma
from expo.operators.merging import add_task_vectors
from expo.operators.methods import Array, Block, Sparsifier
from expo.operators.methods import Mask as AnyMask
from expo.operators.rounding import round_into, round_nearest, uniform_draws
from expo.operators.sparsify import (
    magnitude_mask,
    norm_ratio,
    outlier_mask,
    random_mask,
    ranked_mask,
)
from expo.operators.statistics import Summing, Sums
from expo.planning.chunks import BLOCK_ELEMENTS

_DRAW_STEPS = 2.0**24


@dataclass(frozen=True)
class Mask:
    """One bit an element, and what those that stay are multiplied by."""

    bits: np.ndarray
    ratio: float


class Plain:
    """`Arithmetic` in several passes over a block."""

    def widen(self, stored: Stored, out: Array) -> None:
        torch.from_numpy(out).copy_(as_tensor(stored))

    def decode(self, coded: Coded, first: int, out: Array) -> None:
        values = coded.codes.values(coded.data, coded.scales, first, out.size)
        torch.from_numpy(out).copy_(values)

    def extrapolate(
        self, base: Stored, aligned: Stored, alpha: float, out: Stored, draws: Draws | None
    ) -> Done:
        dtype = torch.float64 if "F64" in (base.dtype, aligned.dtype) else torch.float32
        b, a = (as_tensor(side).to(dtype) for side in (base, aligned))
        delta = a - b
        exact = beyond(b, a, delta, alpha)
        arrays = [t.numpy() for t in (exact, b, delta, a)]
        done = self.finish(arrays[0], arrays[1], arrays[2], arrays[3], out, draws)
        return done._replace(sums=done.sums.asked(alpha))

    def finish(
        self,
        exact: Array,
        start: Array,
        delta: Array,
        still: Array,
        out: Stored,
        draws: Draws | None,
    ) -> Done:
        finite = self.store(exact, out, draws)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked at
            summing = Summing(exact.size, exact.dtype)
            increment = np.subtract(exact, start)
            asked = summing.dot(increment, delta), summing.dot(increment, increment)
            norms = summing.delta(start, delta)
            rounded = as_tensor(out).to(torch.from_numpy(exact).dtype, copy=True).numpy()
            error = summing.rounding(rounded, exact, delta, still)
        finite = finite and all(bool(np.isfinite(x).all()) for x in (exact, start, delta))
        return Done(Sums(exact.size, *norms, *error, 0.0, *asked), finite)

    def store(self, exact: Array, out: Stored, draws: Draws | None) -> bool:
        values, target = torch.from_numpy(exact), as_tensor(out)
        if draws is None:
            round_nearest(values, target.dtype, out=target)
        else:
            round_into(target, values, "stochastic", *draws)
        return bool(target.isfinite().all())

    def compare(self, base: Stored, aligned: Stored) -> Done:
        dtype = torch.float64 if "F64" in (base.dtype, aligned.dtype) else torch.float32
        b, a = (as_tensor(side).to(dtype).numpy() for side in (base, aligned))
        with np.errstate(over="ignore", invalid="ignore"):
            delta = a - b
            summing = Summing(a.size, a.dtype)
            sums = Sums(a.size, *summing.delta(b, delta), aligned_square=summing.dot(a, a))
        return Done(sums, bool(np.isfinite(delta).all()))

    def dots(self, a: Array, b: Array) -> tuple[float, float, float]:
        dot = Summing(a.size, a.dtype).dot
        return dot(a, a), dot(b, b), dot(a, b)

    def add_terms(self, block: Block, weights: Sequence[float]) -> Array:
        thetas = [torch.from_numpy(theta) for theta in block.thetas]
        base = None if block.base is None else torch.from_numpy(block.base)
        deltas = thetas if base is None else [theta - base for theta in thetas]
        kept = deltas
        if block.masks:
            pairs = zip(deltas, block.masks, strict=True)
            kept = [d if mask is None else _applied(mask, d, block.begin) for d, mask in pairs]
        return add_task_vectors(
            torch.from_numpy(block.start),
            kept,
            weights,
            elect_sign=block.elects_sign,
            normalize=bool(block.shared.get("normalize")),
            scale=block.shared.get("lambda", 1.0),
        ).numpy()

    def ulp_square_sum(self, values: Array, dtype: str) -> float:
        sigma = rounding_sigma(torch.from_numpy(values), getattr(torch, TORCH_NAMES[dtype]))
        return 12.0 * values.size * sigma * sigma

    def mask(
        self,
        sparsifier: Sparsifier,
        delta: Array,
        shape: tuple[int, ...],
        values: Mapping[str, float],
        draws: Draws,
        *,
        rescale: bool,
    ) -> AnyMask:
        whole = torch.from_numpy(delta).view(shape)
        density = values["density"]
        match sparsifier:
            case "magnitude":
                mask = magnitude_mask(whole, density)
            case "outliers":
                mask = outlier_mask(whole, density, values["gamma"])
            case "random":
                mask = _drawn_mask(whole, density, None, draws)
            case "ranked":
                mask = _drawn_mask(whole, density, values["epsilon"], draws)
        ratio = norm_ratio(whole, mask) if rescale else 1.0
        return Mask(np.packbits(mask.reshape(-1).numpy()), ratio)


def _applied(mask: AnyMask, delta: Tensor, begin: int) -> Tensor:
    """Of the elements from `begin`, those that stay."""
    assert isinstance(mask, Mask)
    first, count = begin // 8, begin % 8 + delta.numel()
    kept = np.unpackbits(mask.bits[first : first - (-count // 8)], count=count)[begin % 8 :]
    masked = delta * torch.from_numpy(kept).view(torch.bool)
    return masked if mask.ratio == 1.0 else masked * mask.ratio


def _drawn_mask(delta: Tensor, density: float, epsilon: float | None, draws: Draws) -> Tensor:
    """Row by row, which are independent, so that the draws need room for some rows only."""
    mask = torch.empty(delta.shape, dtype=torch.bool)
    begin = 0
    for part, kept in zip(_rows(delta), _rows(mask), strict=True):
        integers = uniform_draws(draws.seed, draws.name, begin, part.numel())
        uniform = (integers.float() / _DRAW_STEPS).view(part.shape)  # exact: 24 bits
        if epsilon is None:
            kept.copy_(random_mask(uniform, density))
        else:
            kept.copy_(ranked_mask(part, uniform, density, epsilon))
        begin += part.numel()
    return mask


def _rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """Some whole rows at a time; a vector is one row."""
    if tensor.ndim < 2:
        return (tensor,)
    return tensor.split(max(1, BLOCK_ELEMENTS // max(tensor[0].numel(), 1)))


def as_tensor(stored: Stored) -> Tensor:
    """The elements over the same memory."""
    dtype = getattr(torch, TORCH_NAMES[stored.dtype])
    if not stored.data.size:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(stored.data.data, dtype=dtype)
