"""Compute one piece of a tensor, block by block, in buffers that stay in the processor's cache."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.dtypes import TORCH_NAMES
from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.engine.sources import Sources
from expo.errors import CheckpointError
from expo.operators.extrapolate import extrapolate, low_rank_product
from expo.operators.rounding import round_nearest, round_stochastic, uniform_draws
from expo.operators.statistics import Sums, delta_sums, dot, rounding_sums
from expo.planning.chunks import BLOCK_ELEMENTS, Piece
from expo.planning.plan import TensorJob
from expo.spec.request import Rounding


class Sample(NamedTuple):
    """One block of a tensor under the rounding that was not chosen."""

    count: int
    delta_square: float
    error_square: float
    error_delta: float


class PieceResult(NamedTuple):
    job: TensorJob
    blocks: list[Sums]
    sample: Sample | None


class Kernel:
    """One worker's scratch memory and the steps that use it.

    A block goes: stored bytes → working precision (float32, or float64 where an input is) →
    the operator → one rounding into the output buffer → sums.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        rounding: Rounding,
        seed: int,
        statistics: bool = True,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        self._sources = sources
        self._rounding: Rounding = rounding
        self._seed = seed
        self._statistics = statistics
        self._block = block_elements
        self._scratch: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def run(self, piece: Piece, out: Bytes) -> PieceResult:
        """Fill `out` with the piece's bytes in the output dtype.

        Raises:
            CheckpointError: an input holds NaN or Inf, or a result overflows the output dtype.
        """
        job = piece.job
        match job.action:
            case "copy_if_equal":
                self._copy_if_equal(piece, out)
                return PieceResult(job, [], None)
            case "copy" | "extrapolate":
                return self._compute(piece, out)

    def _copy_if_equal(self, piece: Piece, out: Bytes) -> None:
        aligned = self._sources.read(piece.job.aligned, piece.aligned, piece.count, side=0)
        out[:] = aligned
        assert piece.job.base is not None
        assert piece.base is not None
        base = self._sources.read(piece.job.base, piece.base, piece.count, side=1)
        if not np.array_equal(out, base):
            raise CheckpointError(
                f"{printable(piece.job.name)} holds {piece.job.dtype} values that differ between SFT "
                "and aligned: integers cannot be extrapolated"
            )

    def _compute(self, piece: Piece, out: Bytes) -> PieceResult:
        job = piece.job
        dtype = _torch_dtype(job.dtype)
        target = _typed(out, dtype, piece.count)
        aligned = self._values(job.aligned, piece.aligned, piece.count, side=0)
        base = None
        if job.base is not None and piece.base is not None:
            base = self._values(job.base, piece.base, piece.count, side=1)
        sides = [side.dtype for side in (aligned, base) if side is not None]
        working = torch.float64 if torch.float64 in sides else torch.float32
        if working not in self._scratch:
            self._scratch[working] = tuple(
                torch.empty(self._block, dtype=working) for _ in range(4)
            )
        blocks: list[Sums] = []
        sample = None
        sampled_at = _sampled_element(job, self._block) if self._statistics else -1
        for start in range(0, piece.count, self._block):
            stop = min(start + self._block, piece.count)
            block = _Block(job, piece.aligned + start, *self._buffers(working, stop - start))
            block.aligned.copy_(aligned[start:stop])
            self._add_low_rank(job.aligned, block.begin, block.aligned)
            if base is None or piece.base is None:
                self._copy_block(block, target[start:stop])
                continue
            block.base.copy_(base[start:stop])
            self._add_low_rank(job.base, piece.base + start, block.base)
            blocks.append(self._extrapolate_block(block, target[start:stop]))
            if block.begin == sampled_at:
                sample = self._sample(block, dtype)
        if target.data_ptr() != out.ctypes.data:
            out[:] = target.view(torch.uint8).numpy()
        return PieceResult(job, blocks, sample)

    def _extrapolate_block(self, block: "_Block", target: Tensor) -> Sums:
        delta, exact = block.delta.numpy(), block.exact.numpy()
        extrapolate(block.base, block.aligned, block.job.alpha, delta=block.delta, out=block.exact)
        self._round(block, target, self._rounding)
        if not self._statistics:
            square = dot(delta, delta)
            if not math.isfinite(square):
                _check_finite(block, target, delta=block.delta)
            return Sums(delta.size, delta_square=square)
        aligned, base = block.aligned.numpy(), block.base.numpy()
        sums = delta_sums(base, aligned, delta)
        rounded = block.base.copy_(target).numpy()  # the base has served, its room is free
        sums = rounding_sums(sums, rounded, exact, delta, aligned, scratch=rounded)
        if not math.isfinite(sums.base_square + sums.delta_square + sums.error_square):
            _check_finite(block, target, delta=block.delta)
        return sums

    def _copy_block(self, block: "_Block", target: Tensor) -> None:
        """An element that only the aligned model has: its own value, rounded to nearest."""
        round_nearest(block.aligned, target.dtype, out=target)
        _check_finite(block, target, delta=None)

    def _round(self, block: "_Block", target: Tensor, rounding: Rounding) -> None:
        if rounding == "nearest" or target.dtype == block.exact.dtype:
            round_nearest(block.exact, target.dtype, out=target)
        else:
            draws = uniform_draws(self._seed, block.job.name, block.begin, target.numel())
            round_stochastic(block.exact, target.dtype, draws, out=target)

    def _sample(self, block: "_Block", dtype: torch.dtype) -> Sample:
        other: Rounding = "stochastic" if self._rounding == "nearest" else "nearest"
        rounded = torch.empty(block.exact.numel(), dtype=dtype)
        self._round(block, rounded, other)
        error = np.subtract(rounded.to(block.exact.dtype).numpy(), block.exact.numpy())
        delta = block.delta.numpy()
        return Sample(delta.size, dot(delta, delta), dot(error, error), dot(error, delta))

    def _values(self, weight: Weight, begin: int, count: int, *, side: int) -> Tensor:
        stored = self._sources.read(weight, begin, count, side=side)
        return _typed(stored, _torch_dtype(weight.stored.dtype), count, copy=True)

    def _add_low_rank(self, weight: Weight, begin: int, values: Tensor) -> None:
        """Add s·B·A to `values`, in blocks of whole rows that the tensor's shape alone decides."""
        if weight.update is None:
            return
        left, right = self._sources.factors(weight)
        width = right.shape[1]
        rows = max(self._block // width, 1)
        end = begin + values.numel()
        for row in range(begin // width // rows * rows, -(-end // width), rows):
            product = low_rank_product(left[row : row + rows], right, weight.update.scale).view(-1)
            first = row * width
            start, stop = max(begin, first), min(end, first + product.numel())
            values[start - begin : stop - begin] += product[start - first : stop - first]

    def _buffers(self, working: torch.dtype, count: int) -> tuple[Tensor, ...]:
        return tuple(buffer[:count] for buffer in self._scratch[working])


@dataclass(slots=True)
class _Block:
    """One block in the working precision. `begin` is its first element in the aligned tensor."""

    job: TensorJob
    begin: int
    aligned: Tensor
    base: Tensor
    delta: Tensor
    exact: Tensor


def _sampled_element(job: TensorJob, block_elements: int) -> int:
    """The first element of the block in the middle of the longest extrapolated stretch."""
    begin, _, count = max((run for run in job.runs() if run[1] is not None), default=(-1, 0, 0),
                          key=lambda run: run[2])  # fmt: skip
    return begin + count // block_elements // 2 * block_elements if count else -1


def _check_finite(block: _Block, result: Tensor, *, delta: Tensor | None) -> None:
    """Say what is wrong where a sum is not finite."""
    name = printable(block.job.name)
    if not bool(block.aligned.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or Inf in the aligned model: it is damaged")
    if delta is not None and not bool(delta.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or Inf in the SFT model: it is damaged")
    if not bool(result.isfinite().all()):
        largest = float(block.exact.abs().max() if delta is not None else block.aligned.abs().max())
        raise CheckpointError(
            f"{name} overflows {block.job.dtype} (its largest value is {largest:g}): "
            "use --dtype bfloat16 or float32"
        )


def _torch_dtype(dtype: str) -> torch.dtype:
    return getattr(torch, TORCH_NAMES[dtype])


def _typed(stored: Bytes, dtype: torch.dtype, count: int, *, copy: bool = False) -> Tensor:
    """A tensor over `stored`; over aligned memory of its own where the address is odd for `dtype`."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if stored.ctypes.data % dtype.itemsize:
        stored = stored.copy() if copy else np.empty_like(stored)
    return torch.frombuffer(stored.data, dtype=dtype, count=count)
