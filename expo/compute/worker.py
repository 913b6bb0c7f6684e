"""Compute one piece of a tensor, block by block, in buffers that stay in the processor's cache."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.compute.combining import Combining, Made
from expo.compute.cuts import EditReport
from expo.compute.inputs import Side, Sources, torch_dtype, typed_output, working_dtype
from expo.compute.preparations import Preparations
from expo.errors import CheckpointError
from expo.operators.extrapolate import extrapolate
from expo.operators.rounding import round_into, round_nearest
from expo.operators.statistics import Summing, Sums
from expo.planning.chunks import BLOCK_ELEMENTS, Piece
from expo.planning.plan import TensorJob
from expo.spec.request import Rounding


class Sample(NamedTuple):
    """One block of a tensor under the rounding that was not chosen."""

    elements: float
    delta_square: float
    error_square: float
    error_delta: float


class PieceResult(NamedTuple):
    job: TensorJob
    blocks: list[Sums]
    sample: Sample | None
    edits: tuple[EditReport, ...] = ()


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
        preparations: Preparations[Made] | None = None,
    ) -> None:
        self._sources = sources
        self._combining = Combining(
            sources, rounding, seed, block_elements, preparations or Preparations()
        )
        self._rounding: Rounding = rounding
        self._seed = seed
        self._statistics = statistics
        self._block = block_elements
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._blocks: dict[tuple[torch.dtype, int], _Block] = {}

    def run(self, piece: Piece, out: Bytes) -> PieceResult:
        """Fill `out` with the piece's bytes in the output dtype.

        Raises:
            CheckpointError: an input holds NaN or Inf, or a result overflows the output dtype.
        """
        job = piece.job
        if job.action == "copy_if_equal":
            self._copy_if_equal(piece, out)
            return PieceResult(job, [], None)
        with np.errstate(over="ignore", invalid="ignore"):  # sums that are not finite are looked at
            if job.action == "combine":
                blocks, edits = self._combining.run(piece, out)
                return PieceResult(job, blocks, None, edits)
            return self._compute(piece, out)

    def compare(self, piece: Piece) -> list[Sums]:
        """The sums of Δ over a piece, block by block; nothing is written.

        Raises:
            CheckpointError: an input holds NaN or Inf.
        """
        job = piece.job
        if job.base is None or piece.base is None:
            return []
        aligned = Side(self._sources, job.aligned, piece.aligned, piece.count, side=0)
        base = Side(self._sources, job.base, piece.base, piece.count, side=1)
        working = working_dtype(aligned, base)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._compare(piece, aligned, base, working)

    def _compare(self, piece: Piece, aligned: Side, base: Side, working: torch.dtype) -> list[Sums]:
        blocks = []
        for start in range(0, piece.count, self._block):
            block = self._block_of(working, min(self._block, piece.count - start))
            aligned.load(start, block.aligned)
            base.load(start, block.base)
            torch.sub(block.aligned, block.base, out=block.delta)
            norms = block.summing.delta(block.bases, block.deltas)
            square = block.summing.dot(block.aligneds, block.aligneds)
            sums = Sums(block.deltas.size, *norms, aligned_square=square)
            if not math.isfinite(sums.base_square + sums.delta_square):
                _check_finite(piece.job, block, block.aligned, delta=block.delta)
            blocks.append(sums)
        return blocks

    def _copy_if_equal(self, piece: Piece, out: Bytes) -> None:
        job = piece.job
        assert job.base is not None
        assert piece.base is not None
        count = piece.count
        aligned = self._sources.open(job.aligned, piece.aligned, count, side=0).take(0, count)
        base = self._sources.open(job.base, piece.base, count, side=1).take(0, count)
        out[:] = aligned.view(torch.uint8).numpy()
        if not torch.equal(aligned, base):
            raise CheckpointError(
                f"{printable(job.name)} holds {job.dtype} values that differ between SFT "
                "and aligned: integers cannot be extrapolated"
            )

    def _compute(self, piece: Piece, out: Bytes) -> PieceResult:
        job = piece.job
        dtype = torch_dtype(job.dtype)
        target = typed_output(out, dtype, piece.count)
        sides = [Side(self._sources, job.aligned, piece.aligned, piece.count, side=0)]
        if job.base is not None and piece.base is not None:
            sides.append(Side(self._sources, job.base, piece.base, piece.count, side=1))
        working = working_dtype(*sides)
        blocks: list[Sums] = []
        sample = None
        sampled_at = _sampled_element(job, self._block) if self._statistics else -1
        start = 0
        for result in target.split(self._block):
            block = self._block_of(working, result.numel())
            sides[0].load(start, block.aligned)
            if len(sides) == 1:
                self._copy_block(job, block, result)
            else:
                sides[1].load(start, block.base)
                begin = piece.aligned + start
                blocks.append(self._extrapolate_block(job, begin, block, result))
                if begin == sampled_at:
                    sample = self._sample(job, begin, block, dtype)
            start += result.numel()
        if target.data_ptr() != out.ctypes.data:
            out[:] = target.view(torch.uint8).numpy()
        return PieceResult(job, blocks, sample)

    def _extrapolate_block(self, job: TensorJob, begin: int, block: "_Block", out: Tensor) -> Sums:
        extrapolate(block.base, block.aligned, job.alpha, delta=block.delta, out=block.exact)
        round_into(out, block.exact, self._rounding, self._seed, job.name, begin)
        summing = block.summing
        if not self._statistics:
            square = summing.dot(block.deltas, block.deltas)
            sums = Sums(out.numel(), delta_square=square, **_asked(job.alpha, square))
        else:
            norms = summing.delta(block.bases, block.deltas)
            block.base.copy_(out)  # the base has served, its room is free
            error = summing.rounding(block.bases, block.exacts, block.deltas, block.aligneds)
            sums = Sums(out.numel(), *norms, *error, **_asked(job.alpha, norms[1]))
        if not math.isfinite(sums.base_square + sums.delta_square + sums.error_square):
            _check_finite(job, block, out, delta=block.delta)
        return sums

    def _copy_block(self, job: TensorJob, block: "_Block", out: Tensor) -> None:
        """Elements that only the aligned model has: their own values, rounded to nearest."""
        round_nearest(block.aligned, out.dtype, out=out)
        _check_finite(job, block, out, delta=None)

    def _sample(self, job: TensorJob, begin: int, block: "_Block", dtype: torch.dtype) -> Sample:
        other: Rounding = "stochastic" if self._rounding == "nearest" else "nearest"
        rounded = torch.empty(block.exact.numel(), dtype=dtype)
        round_into(rounded, block.exact, other, self._seed, job.name, begin)
        error = np.subtract(rounded.to(block.exact.dtype).numpy(), block.exacts)
        dot = block.summing.dot
        return Sample(
            error.size,
            dot(block.deltas, block.deltas),
            dot(error, error),
            dot(error, block.deltas),
        )

    def _block_of(self, working: torch.dtype, count: int) -> "_Block":
        if (working, count) not in self._blocks:
            if working not in self._scratch:
                self._scratch[working] = torch.empty(4, self._block, dtype=working)
            self._blocks[working, count] = _Block(self._scratch[working][:, :count])
        return self._blocks[working, count]


class _Block:
    """Room for one block in the working precision, as tensors and as arrays over the same memory."""

    __slots__ = (
        "aligned", "aligneds", "base", "bases", "delta", "deltas", "exact", "exacts", "summing",
    )  # fmt: skip

    def __init__(self, room: Tensor) -> None:
        self.aligned, self.base, self.delta, self.exact = room
        self.aligneds, self.bases, self.deltas, self.exacts = room.numpy()
        self.summing = Summing(room.shape[1], self.deltas.dtype)


def _asked(alpha: float, delta_square: float) -> dict[str, float]:
    return {"asked_delta": alpha * delta_square, "asked_square": alpha * alpha * delta_square}


def _sampled_element(job: TensorJob, block_elements: int) -> int:
    """The first element of the block in the middle of the longest extrapolated stretch."""
    begin, _, count = max((run for run in job.runs() if run[1] is not None), default=(-1, 0, 0),
                          key=lambda run: run[2])  # fmt: skip
    return begin + count // block_elements // 2 * block_elements if count else -1


def _check_finite(job: TensorJob, block: _Block, out: Tensor, *, delta: Tensor | None) -> None:
    """Say what is wrong where something is not finite."""
    name = printable(job.name)
    if not bool(block.aligned.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or Inf in the aligned model: it is damaged")
    if delta is not None and not bool(delta.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or Inf in the SFT model: it is damaged")
    if not bool(out.isfinite().all()):
        values = block.aligned if delta is None else block.exact
        raise CheckpointError(
            f"{name} overflows {job.dtype} (its largest value is {float(values.abs().max()):g}): "
            "use --dtype bfloat16 or float32"
        )
