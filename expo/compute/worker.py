"""Compute one piece of a tensor, block by block, for one or several plans at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.dtypes import FLOATS, ITEM_BYTES
from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.compute.arithmetic import (
    Arithmetic,
    Done,
    Draws,
    Stored,
    arithmetic_for,
    plain_arithmetic,
    working_dtype,
)
from expo.compute.inputs import Inputs, Range, read_tensor
from expo.compute.preparations import Preparations, Unit
from expo.compute.preparing import Prepared, prepare
from expo.errors import CheckpointError
from expo.operators.methods import METHODS, Array, Block
from expo.operators.statistics import Sample, Sums
from expo.planning.chunks import BLOCK_ELEMENTS, Piece
from expo.planning.jobs import Blend, Copy, MatrixJob, TensorJob
from expo.results import EditReport
from expo.spec.request import Rounding


class Target(NamedTuple):
    """What a piece becomes in one plan: the job there, and the room for its bytes."""

    job: TensorJob
    out: Bytes
    rounding: Rounding = "nearest"
    seed: int = 0


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


@dataclass(frozen=True)
class Edited:
    """The edit of one matrix: what blocks take from it, and what it did."""

    begin: int
    result: Array | None
    reports: tuple[EditReport, ...]


class BlockWorker:
    """A `Worker` of this processor, whose blocks stay in the cache of a core.

    A block goes: stored bytes → the formula in the working precision → one rounding into the target's bytes →
    sums.
    """

    def __init__(
        self,
        inputs: Inputs,
        preparations: "Preparations[Prepared | Edited] | None" = None,
        *,
        block_elements: int = BLOCK_ELEMENTS,
        arithmetic: Callable[[TensorJob], Arithmetic] = arithmetic_for,
    ) -> None:
        self._inputs, self._block = inputs, block_elements
        self._preparations = preparations or Preparations()
        self._arithmetic_for = arithmetic

    def run(self, piece: Piece, targets: Sequence[Target]) -> list[PieceResult]:
        job = piece.job
        if isinstance(job.rule, Blend) and piece.starts is not None:
            return self._blend(piece, piece.starts, targets)
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
                _refuse_nonfinite(piece.job, loaded, None)
            if not done.is_summed:
                done = plain_arithmetic().compare(
                    *(_doubled(loaded, w) for w in (rule.start, rule.terms[0].weight))
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
        out = _Out(target, piece)
        for start in range(0, piece.count, self._block):
            count = min(self._block, piece.count - start)
            loaded.turn(start, count)
            values = loaded.values(piece.job.donor)
            if not arithmetic.store(values, out.block(start, count), None):
                _refuse_nonfinite(piece.job, loaded, values)
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
    ) -> "_Blending":
        job = target.job
        edits = {
            number: self._edited(target, number)
            for number, matrix in enumerate(job.matrices)
            if _overlap(piece, matrix)
        }
        return _Blending(
            piece, target, prepared, edits, arithmetic, _sampled_element(job, self._block)
        )

    def _finished(self, piece: Piece, blend: "_Blending") -> PieceResult:
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
    ) -> "_Loaded":
        ranges = [
            self._inputs.open(weight, start, piece.count, side=side)
            for side, (weight, start) in enumerate(zip(weights, starts, strict=True))
        ]
        return _Loaded(ranges, arithmetic, working_dtype(piece.job))

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

        edited, reports = edit_matrix(job, matrix, seed, load, exact)
        return Edited(edited.begin, edited.result, reports)


_NOTHING = np.empty(0, dtype=np.uint8)


class _Loaded:
    """The inputs of a piece at one block, each taken once: as stored, and widened where that is needed."""

    def __init__(
        self, ranges: list[Range], arithmetic: Arithmetic, dtype: type[np.floating]
    ) -> None:
        self.weights = [source.weight for source in ranges]
        self._ranges = {id(source.weight): source for source in ranges}
        self._arithmetic, self._dtype = arithmetic, dtype
        self._stored: dict[int, Stored] = {}
        self._values: dict[int, Array] = {}
        self._rooms: dict[int, Array] = {}
        self.start = self.count = 0

    def turn(self, start: int, count: int) -> None:
        """Go to the `count` elements from `start` of the piece."""
        self.start, self.count = start, count
        self._stored.clear()
        self._values.clear()

    def stored(self, weight: Weight) -> Stored:
        """The block as the arithmetic takes it: as it lies in the file, or with an adapter's update."""
        key, source = id(weight), self._ranges[id(weight)]
        if not source.is_as_stored:
            return _as_stored(self.values(weight))
        if key not in self._stored:
            self._stored[key] = source.stored(self.start, self.count)
        return self._stored[key]

    def values(self, weight: Weight) -> Array:
        """The block in the working precision."""
        key = id(weight)
        if key not in self._values:
            room = self._rooms.get(key)
            if room is None or room.size < self.count:
                room = self._rooms[key] = np.empty(self.count, self._dtype)
            values = room[: self.count]
            if key in self._stored:
                self._arithmetic.widen(self._stored[key], values)
            else:
                self._ranges[key].load(self.start, values, self._arithmetic)
            self._values[key] = values
        return self._values[key]


@dataclass
class _Blending:
    """A piece on its way into one target."""

    piece: Piece
    target: Target
    prepared: Prepared
    edits: dict[int, Edited]
    arithmetic: Arithmetic
    sampled_at: int
    sums: list[Sums] = field(default_factory=list)
    sample: Sample | None = None

    def __post_init__(self) -> None:
        rule = self.target.job.rule
        assert isinstance(rule, Blend)
        self.rule, self.is_plain = rule, rule.is_extrapolation
        self.out = _Out(self.target, self.piece)

    def block(self, loaded: _Loaded) -> None:
        """Compute the block that `loaded` is at."""
        begin, job = self.piece.begin + loaded.start, self.target.job
        out = self.out.block(loaded.start, loaded.count)
        draws = self._draws(self.target.rounding, begin)
        overlays = self._overlays(begin, loaded.count)
        self.sums.append(self._done(loaded, begin, overlays, out, draws).sums)
        if begin == self.sampled_at:
            self.sample = self._sampled(loaded, begin, overlays, job)

    def _done(
        self,
        loaded: _Loaded,
        begin: int,
        overlays: Sequence[tuple[int, Array]],
        out: Stored,
        draws: Draws | None,
    ) -> Done:
        """In one pass where it is the formula of a pair and nothing is out of the ordinary."""
        if self.is_plain and not overlays:
            base, aligned = self.rule.start, self.rule.terms[0].weight
            done = self.arithmetic.extrapolate(
                loaded.stored(base), loaded.stored(aligned), self.rule.alphas[0], out, draws
            )
            if done.finite and done.is_summed:
                return done
        return self._general(loaded, begin, overlays, out, draws)

    def _general(
        self,
        loaded: _Loaded,
        begin: int,
        overlays: Sequence[tuple[int, Array]],
        out: Stored,
        draws: Draws | None,
    ) -> Done:
        arrays = exact, start, delta, still = self._arrays(loaded, begin, overlays)
        done = self.arithmetic.finish(exact, start, delta, still, out, draws)
        if not done.finite:
            _refuse_nonfinite(self.target.job, loaded, exact)
        if done.is_summed:
            return done
        exact, start, delta, still = (array.astype(np.float64) for array in arrays)
        return plain_arithmetic().finish(exact, start, delta, still, out, draws)  # the same bytes

    def _arrays(
        self, loaded: _Loaded, begin: int, overlays: Sequence[tuple[int, Array]]
    ) -> tuple[Array, Array, Array, Array]:
        """The exact result, what it started from, Δ (ΣΔᵢ for ExPO, else the intended change), and the model from
        which an element "did not move"."""
        rule, job = self.rule, self.target.job
        exact = exact_values(job, loaded.values, self.prepared, begin, self.arithmetic)
        for first, values in overlays:
            exact[first : first + values.size] = values
        start = loaded.values(rule.start)
        if rule.method != "expo" or rule.base is None:
            return exact, start, exact - start, start
        base, thetas = loaded.values(rule.base), [loaded.values(t.weight) for t in rule.terms]
        delta = thetas[0] - base
        for theta in thetas[1:]:
            delta = delta + (theta - base)
        return exact, start, delta, thetas[0]

    def _overlays(self, begin: int, count: int) -> list[tuple[int, Array]]:
        """(first element of the block, values) of the edited matrices that reach into it."""
        found = []
        for edit in self.edits.values():
            if edit.result is None:
                continue
            first, end = max(begin, edit.begin), min(begin + count, edit.begin + edit.result.size)
            if first < end:
                found.append((first - begin, edit.result[first - edit.begin : end - edit.begin]))
        return found

    def _draws(self, rounding: Rounding, begin: int) -> Draws | None:
        if rounding == "nearest":
            return None
        return Draws(self.target.seed, self.target.job.name, begin)

    def _sampled(
        self, loaded: _Loaded, begin: int, overlays: Sequence[tuple[int, Array]], job: TensorJob
    ) -> Sample:
        """The block under the rounding that was not chosen."""
        other: Rounding = "stochastic" if self.target.rounding == "nearest" else "nearest"
        room = Stored(np.empty(loaded.count * ITEM_BYTES[job.dtype], np.uint8), job.dtype)
        sums = self._done(loaded, begin, overlays, room, self._draws(other, begin)).sums
        return Sample(sums.elements, sums.delta_square, sums.error_square, sums.error_delta)


class _Out:
    """A piece's bytes in a target, or beside it where the address does not suit the dtype."""

    def __init__(self, target: Target, piece: Piece) -> None:
        self._item, self._dtype, self._out = (
            ITEM_BYTES[piece.job.dtype],
            piece.job.dtype,
            target.out,
        )
        is_suited = target.out.size == 0 or target.out.ctypes.data % self._item == 0
        self._room = target.out if is_suited else np.empty_like(target.out)

    def block(self, start: int, count: int) -> Stored:
        return Stored(self._room[start * self._item : (start + count) * self._item], self._dtype)

    def deliver(self) -> None:
        if self._room is not self._out:
            self._out[:] = self._room


def exact_values(
    job: TensorJob,
    load: Callable[[Weight], Array],
    prepared: Prepared,
    begin: int,
    arithmetic: Arithmetic,
    deltas: list[Array] | None = None,
) -> Array:
    """The blend in the working precision, before it is rounded.

    Args:
        load: gives elements of a weight from `begin`, counted in the donor's tensor.
        deltas: take these for Δ.
    """
    rule = job.rule
    assert isinstance(rule, Blend)
    start = load(rule.start)
    if rule.is_extrapolation and deltas is None:
        return _extrapolated(start, load(rule.terms[0].weight), rule.alphas[0])
    block = Block(
        thetas=[load(term.weight) for term in rule.terms] if deltas is None else deltas,
        base=load(rule.base) if rule.base is not None and deltas is None else None,
        start=start,
        values=[term.parameters for term in rule.terms],
        shared=rule.shared,
        elects_sign=rule.elects_sign,
        masks=prepared.masks,
        arc=prepared.arc,
        begin=begin,
        width=job.shape[-1] if job.shape else 1,
    )
    return METHODS[rule.method].formula(arithmetic, block)


def _extrapolated(base: Array, aligned: Array, alpha: float) -> Array:
    """`operators.extrapolate` for arrays: the same three operations."""
    if alpha in (0.0, 1.0):
        return (aligned if alpha else base).copy()
    with np.errstate(over="ignore", invalid="ignore"):
        return aligned + (aligned - base) * base.dtype.type(alpha - 1.0)


def _as_stored(values: Array) -> Stored:
    return Stored(values.view(np.uint8), "F64" if values.dtype == np.float64 else "F32")


def _doubled(loaded: _Loaded, weight: Weight) -> Stored:
    return _as_stored(loaded.values(weight).astype(np.float64))


def _overlap(piece: Piece, matrix: MatrixJob) -> int:
    """How many elements a piece has in common with a matrix."""
    end = min(piece.begin + piece.count, matrix.begin + matrix.count)
    return max(0, end - max(piece.begin, matrix.begin))


def _sampled_element(job: TensorJob, block_elements: int) -> int:
    """The first element of the block in the middle of the longest blended stretch; -1 without one."""
    shared = [stretch for stretch in job.stretches() if stretch.starts is not None]
    longest = max(shared, key=lambda stretch: stretch.count, default=None)
    if longest is None or not longest.count:
        return -1
    return longest.begin + longest.count // block_elements // 2 * block_elements


def _refuse_nonfinite(job: TensorJob, loaded: _Loaded, exact: Array | None) -> None:
    """Say which input is damaged, or that the result does not fit its dtype.

    Raises:
        CheckpointError: always.
    """
    name = printable(job.name)
    for weight in loaded.weights:
        if not bool(np.isfinite(loaded.values(weight)).all()):
            raise CheckpointError(f"{name} holds NaN or Inf in {_side(job, weight)}: it is damaged")
    largest = float("inf") if exact is None else float(np.abs(exact).max())
    raise CheckpointError(
        f"{name} overflows {job.dtype} (its largest value is {largest:g}): "
        "use --dtype bfloat16 or float32"
    )


def _side(job: TensorJob, weight: Weight) -> str:
    """How a message speaks of the model that a tensor is from."""
    rule, label = job.rule, weight.files.label
    if isinstance(rule, Copy):
        return label
    if rule.method == "expo" and len(rule.terms) == 1:
        sides = {id(rule.base): "the SFT model", id(rule.terms[0].weight): "the aligned model"}
        return sides.get(id(weight), label)
    return f"one of the models, {label}"
