"""The kernel for tensors of several models: load a block of each, combine, round once, sum."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.compute.combine import Combined, EditedMatrix, Prepared, combine, prepare
from expo.compute.cuts import EditReport, edit_matrix
from expo.compute.inputs import (
    Side,
    Sources,
    read_tensor,
    torch_dtype,
    typed_output,
    working_dtype,
)
from expo.compute.preparations import Preparations, Unit
from expo.errors import CheckpointError
from expo.operators.rounding import round_into
from expo.operators.statistics import Summing, Sums
from expo.planning.chunks import Piece
from expo.planning.plan import MatrixJob, TensorJob
from expo.spec.request import Rounding


@dataclass
class _Blocks:
    """The blocks of every model at one place of a piece, each loaded once."""

    sides: dict[int, Side]
    working: torch.dtype
    start: int
    count: int
    _loaded: dict[int, Tensor] = field(default_factory=dict)

    def load(self, weight: Weight) -> Tensor:
        if id(weight) not in self._loaded:
            values = torch.empty(self.count, dtype=self.working)
            self.sides[id(weight)].load(self.start, values)
            self._loaded[id(weight)] = values
        return self._loaded[id(weight)]


@dataclass(frozen=True)
class Made:
    """A preparation: of a whole tensor, or the edit of one matrix."""

    whole: Prepared | None = None
    matrix: EditedMatrix | None = None
    reports: tuple[EditReport, ...] = ()


class Combining:
    """One worker's steps for jobs that combine several models, or are edited."""

    def __init__(
        self,
        sources: Sources,
        rounding: Rounding,
        seed: int,
        block_elements: int,
        preparations: Preparations[Made],
    ) -> None:
        self._sources, self._rounding, self._seed = sources, rounding, seed
        self._block, self._preparations = block_elements, preparations

    def run(self, piece: Piece, out: Bytes) -> tuple[list[Sums], tuple[EditReport, ...]]:
        """Fill `out` with the piece; the sums of its blocks, and what edits did to the matrices that
        begin in it.

        Raises:
            CheckpointError: an input holds NaN or Inf, a result overflows the output dtype, or an edit
                is refused.
        """
        job, combination = piece.job, piece.job.combination
        assert combination is not None
        target = typed_output(out, torch_dtype(job.dtype), piece.count)
        prepared = self._prepared(job)
        edited = self._edited(piece)
        sides = {
            id(weight): Side(self._sources, weight, piece.aligned, piece.count, side=number)
            for number, weight in enumerate(combination.weights)
        }
        working = working_dtype(*sides.values())
        width = job.shape[-1] if job.shape else 1
        sums, start = [], 0
        for result in target.split(self._block):
            blocks = _Blocks(sides, working, start, result.numel())
            begin = piece.aligned + start
            matrices = [made.matrix for made in edited.values() if made.matrix is not None]
            done = combine(combination, blocks.load, prepared, begin, width, matrices)
            round_into(result, done.exact, self._rounding, self._seed, job.name, begin)
            sums.append(_sums(job, result, done))
            start += result.numel()
        if target.data_ptr() != out.ctypes.data:
            out[:] = target.view(torch.uint8).numpy()
        self._preparations.done((job, None), piece.count, job.count)
        reports: list[EditReport] = []
        for number, made in edited.items():
            matrix = job.matrices[number]
            self._preparations.done((job, number), _overlap(piece, matrix), matrix.count)
            if piece.aligned <= matrix.begin:
                reports += made.reports
        return sums, tuple(reports)

    def _prepared(self, job: TensorJob) -> Prepared | None:
        assert job.combination is not None
        if not job.combination.needs_whole:
            return None
        return self._preparations.get((job, None), self._make).whole

    def _edited(self, piece: Piece) -> dict[int, Made]:
        """The edited matrices that reach into the piece, by number."""
        return {
            number: self._preparations.get((piece.job, number), self._make)
            for number, matrix in enumerate(piece.job.matrices)
            if _overlap(piece, matrix)
        }

    def _make(self, unit: Unit) -> Made:
        job, number = unit
        double = any(weight.stored.dtype == "F64" for weight in job.inputs)
        dtype = torch.float64 if double else torch.float32
        if number is None:
            whole = prepare(
                job, self._seed, lambda w: read_tensor(self._sources, w, w.shape, dtype=dtype)
            )
            return Made(whole)
        matrix = job.matrices[number]
        shape, begin = (matrix.count,), matrix.begin
        loaded: dict[int, Tensor] = {}

        def load(weight: Weight) -> Tensor:
            if id(weight) not in loaded:
                values = read_tensor(self._sources, weight, shape, first=begin, dtype=dtype)
                loaded[id(weight)] = values
            return loaded[id(weight)]

        edited, reports = edit_matrix(job, matrix, self._seed, load, self._prepared(job))
        return Made(None, edited, reports)


def _overlap(piece: Piece, matrix: MatrixJob) -> int:
    """How many elements a piece has in common with a matrix."""
    end = min(piece.aligned + piece.count, matrix.begin + matrix.count)
    return max(0, end - max(piece.aligned, matrix.begin))


def _sums(job: TensorJob, out: Tensor, done: Combined) -> Sums:
    summing = Summing(out.numel(), done.delta.numpy().dtype)
    exact, start, delta = (t.numpy() for t in (done.exact, done.start, done.delta))
    increment = np.subtract(exact, start)
    norms = summing.delta(start, delta)
    rounded = out.to(done.exact.dtype, copy=True).numpy()
    error = summing.rounding(rounded, exact, delta, done.still.numpy())
    asked = summing.dot(increment, delta), summing.dot(increment, increment)
    sums = Sums(out.numel(), *norms, *error, 0.0, *asked)
    if not math.isfinite(sums.base_square + sums.delta_square + sums.error_square):
        _check_finite(job, out, done)
    return sums


def _check_finite(job: TensorJob, out: Tensor, done: Combined) -> None:
    """Say what is wrong where something is not finite."""
    name = printable(job.name)
    if not bool((done.start.isfinite() & done.delta.isfinite() & done.exact.isfinite()).all()):
        labels = ", ".join(dict.fromkeys(weight.files.label for weight in job.inputs))
        raise CheckpointError(f"{name} holds NaN or Inf in one of {labels}: it is damaged")
    if not bool(out.isfinite().all()):
        raise CheckpointError(
            f"{name} overflows {job.dtype} (its largest value is {float(done.exact.abs().max()):g}): "
            "use --dtype bfloat16 or float32"
        )
