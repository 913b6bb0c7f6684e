"""Compute one piece of a tensor, block by block, for one or several plans at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from expo.checkpoint.dtypes import FLOATS
from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.checkpoint.weight import Weight
from expo.compute.arithmetic import Arithmetic
from expo.compute.blending import (
    Blending,
    Edited,
    Loaded,
    Out,
    Target,
    doubled,
    exact_values,
    refuse_nonfinite,
)
from expo.compute.choice import arithmetic_for, plain_arithmetic, working_dtype
from expo.compute.inputs import Inputs, read_tensor
from expo.compute.preparations import Preparations, Unit
from expo.compute.preparing import Prepared, prepare
from expo.errors import CheckpointError
from expo.operators.methods import Array
from expo.operators.statistics import Sample, Sums
from expo.planning.chunks import BLOCK_ELEMENTS, Piece
from expo.planning.jobs import Blend, Copy, MatrixJob, TensorJob
from expo.results import EditReport

if TYPE_CHECKING:
    from expo.compute.device import Device


class PieceResult(NamedTuple):
    """What came out of a piece, beside its bytes."""

    job: TensorJob
    blocks: list[Sums]
    sample: Sample | None = None
    edits: tuple[EditReport, ...] = ()


class Worker(Protocol):
    """Computes pieces. One belongs to one thread at a time."""

    def run(self, piece: Piece, targets: Sequence[Target]) -> list[PieceResult]:
        """Fill every target's `out` with the piece's bytes, from one read of the inputs.

        Raises:
            CheckpointError: an input holds NaN or Inf or is cut short, a result overflows the output dtype, or
                an edit is refused.
        """
        ...

    def compare(self, piece: Piece) -> list[Sums]:
        """The sums of Δ over a piece of a pair, block by block; nothing is written. Raises as `run`."""
        ...


class BlockWorker:
    """A `Worker` of this processor, whose blocks stay in the cache of a core.

    A block goes: stored bytes → the formula in the working precision → one rounding into the target's bytes →
    sums.

    Args:
        device: where matrices that are edited are taken apart; by default here.
    """

    def __init__(
        self,
        inputs: Inputs,
        preparations: "Preparations[Prepared | Edited] | None" = None,
        *,
        block_elements: int = BLOCK_ELEMENTS,
        arithmetic: Callable[[TensorJob], Arithmetic] = arithmetic_for,
        device: "Device | None" = None,
    ) -> None:
        self._inputs, self._block, self._device = inputs, block_elements, device
        self._preparations = preparations or Preparations()
        self._arithmetic_for = arithmetic

    def run(self, piece: Piece, targets: Sequence[Target]) -> list[PieceResult]:
        job = piece.job
        if isinstance(job.rule, Blend) and piece.starts is not None:
            return self._blend(piece, piece.starts, targets)
        self._preparations.done((targets[0].job, None), piece.count, job.count)
        for target in targets:
            if job.donor.dtype in FLOATS:
                self._copy(piece, target)
            else:
                self._copy_if_equal(piece, target.out)
        return [PieceResult(target.job, []) for target in targets]

    def compare(self, piece: Piece) -> list[Sums]:
        rule = piece.job.rule
        if isinstance(rule, Copy) or piece.starts is None:
            return []
        arithmetic, blocks = self._arithmetic_for(piece.job), []
        loaded = self._open(piece, rule.weights, piece.starts, arithmetic)
        for start in range(0, piece.count, self._block):
            loaded.turn(start, min(self._block, piece.count - start))
            sides = (loaded.stored(rule.start), loaded.stored(rule.terms[0].weight))
            done = arithmetic.compare(*sides)
            if not done.finite:
                refuse_nonfinite(piece.job, loaded, None, compares=True)
            if not done.is_summed:
                done = plain_arithmetic().compare(
                    *(doubled(loaded, w) for w in (rule.start, rule.terms[0].weight))
                )
            blocks.append(done.sums)
        return blocks

    def _copy_if_equal(self, piece: Piece, out: Bytes) -> None:
        """Integers and booleans: the donor's, which all must have."""
        job, rule = piece.job, piece.job.rule
        donor = self._inputs.open(job.donor, piece.begin, piece.count).stored(0, piece.count)
        out[:] = donor.data
        assert isinstance(rule, Copy)
        for other in rule.equal:
            values = self._inputs.open(other, piece.begin, piece.count, side=1)
            if not np.array_equal(donor.data, values.stored(0, piece.count).data):
                raise CheckpointError(
                    f"{printable(job.name)} holds {job.dtype} values that differ between "
                    f"{rule.between}: integers cannot be extrapolated"
                )

    def _copy(self, piece: Piece, target: Target) -> None:
        """The donor's values, rounded to nearest where its dtype is not the output's."""
        arithmetic = self._arithmetic_for(piece.job)
        loaded = self._open(piece, (piece.job.donor,), (piece.begin,), arithmetic)
        out = Out(target, piece)
        for start in range(0, piece.count, self._block):
            count = min(self._block, piece.count - start)
            loaded.turn(start, count)
            values = loaded.values(piece.job.donor)
            if not arithmetic.store(values, out.block(start, count), None):
                refuse_nonfinite(piece.job, loaded, values)
        out.deliver()

    def _blend(
        self, piece: Piece, starts: tuple[int, ...], targets: Sequence[Target]
    ) -> list[PieceResult]:
        arithmetic = self._arithmetic_for(piece.job)
        assert isinstance(piece.job.rule, Blend)
        prepared = self._prepared(targets[0])
        blends = [self._blending(piece, target, prepared, arithmetic) for target in targets]
        loaded = self._open(piece, piece.job.rule.weights, starts, arithmetic)
        for start in range(0, piece.count, self._block):
            loaded.turn(start, min(self._block, piece.count - start))
            for blend in blends:
                blend.block(loaded)
        self._preparations.done((targets[0].job, None), piece.count, piece.job.count)
        return [self._finished(piece, blend) for blend in blends]

    def _blending(
        self, piece: Piece, target: Target, prepared: Prepared, arithmetic: Arithmetic
    ) -> Blending:
        job = target.job
        edits = {
            number: self._edited(target, number)
            for number, matrix in enumerate(job.matrices)
            if _overlap(piece, matrix)
        }
        return Blending(
            piece, target, prepared, edits, arithmetic, sampled_element(job, self._block)
        )

    def _finished(self, piece: Piece, blend: Blending) -> PieceResult:
        job, reports = blend.target.job, []
        for number, edit in blend.edits.items():
            matrix = job.matrices[number]
            self._preparations.done((job, number), _overlap(piece, matrix), matrix.count)
            if piece.begin <= matrix.begin:
                reports += edit.reports
        blend.out.deliver()
        return PieceResult(job, blend.sums, blend.sample, tuple(reports))

    def _open(
        self,
        piece: Piece,
        weights: tuple[Weight, ...],
        starts: tuple[int, ...],
        arithmetic: Arithmetic,
    ) -> Loaded:
        ranges = [
            self._inputs.open(weight, start, piece.count, side=side)
            for side, (weight, start) in enumerate(zip(weights, starts, strict=True))
        ]
        return Loaded(ranges, arithmetic, working_dtype(piece.job))

    def _prepared(self, target: Target) -> Prepared:
        """What the blend needs of whole tensors: the same for every target, whatever its α."""
        job = target.job
        if not (isinstance(job.rule, Blend) and job.rule.needs_whole):
            return Prepared()
        made = self._preparations.get((job, None), partial(self._make, target.seed))
        assert isinstance(made, Prepared)
        return made

    def _edited(self, target: Target, number: int) -> Edited:
        made = self._preparations.get((target.job, number), partial(self._make, target.seed))
        assert isinstance(made, Edited)
        return made

    def _make(self, seed: int, unit: Unit) -> Prepared | Edited:
        job, number = unit
        if number is None:
            return prepare(job, seed, self._inputs, self._arithmetic_for(job))
        from expo.compute.cuts import edit_matrix
        from expo.compute.decompositions import Decompositions

        matrix, arithmetic = job.matrices[number], self._arithmetic_for(job)
        read: dict[int, Array] = {}

        def load(weight: Weight) -> Array:
            if id(weight) not in read:
                read[id(weight)] = read_tensor(
                    self._inputs,
                    weight,
                    matrix.count,
                    arithmetic,
                    first=matrix.begin,
                    dtype=working_dtype(job),
                )
            return read[id(weight)]

        def exact(deltas: list[Array] | None) -> Array:
            prepared = self._prepared(Target(job, _NOTHING, seed=seed))
            return exact_values(job, load, prepared, matrix.begin, arithmetic, deltas)

        edited, reports = edit_matrix(job, matrix, seed, load, exact, Decompositions(self._device))
        return Edited(edited.begin, edited.result, reports)


_NOTHING = np.empty(0, dtype=np.uint8)


def _overlap(piece: Piece, matrix: MatrixJob) -> int:
    """How many elements a piece has in common with a matrix."""
    end = min(piece.begin + piece.count, matrix.begin + matrix.count)
    return max(0, end - max(piece.begin, matrix.begin))


def sampled_element(job: TensorJob, block_elements: int) -> int:
    """The first element of the block in the middle of the longest blended stretch; -1 without one."""
    shared = [stretch for stretch in job.stretches() if stretch.starts is not None]
    longest = max(shared, key=lambda stretch: stretch.count, default=None)
    if longest is None or not longest.count:
        return -1
    return longest.begin + longest.count // block_elements // 2 * block_elements
