"""A piece on its way into one target, block by block: the exact result, its rounding, its sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import numpy as np

from expo.checkpoint.dtypes import ITEM_BYTES
from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.checkpoint.weight import Weight
from expo.compute.arithmetic import Arithmetic, Done, Draws, Stored
from expo.compute.choice import plain_arithmetic
from expo.compute.inputs import Range
from expo.compute.preparing import Prepared
from expo.errors import CheckpointError
from expo.operators.methods import METHODS, Array, Block
from expo.operators.statistics import Sample, Sums
from expo.planning.chunks import Piece
from expo.planning.jobs import Blend, Copy, TensorJob
from expo.results import EditReport
from expo.spec.request import Rounding


class Target(NamedTuple):
    """What a piece becomes in one plan: the job there, and the room for its bytes."""

    job: TensorJob
    out: Bytes
    rounding: Rounding = "nearest"
    seed: int = 0

    @property
    def other_rounding(self) -> Rounding:
        """The one that was not chosen."""
        return "stochastic" if self.rounding == "nearest" else "nearest"


@dataclass(frozen=True)
class Edited:
    """The edit of one matrix: what blocks take from it, and what it did."""

    begin: int
    result: Array | None
    reports: tuple[EditReport, ...]


class Loaded:
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
class Blending:
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
        self.out = Out(self.target, self.piece)

    def block(self, loaded: Loaded) -> None:
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
        loaded: Loaded,
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
        loaded: Loaded,
        begin: int,
        overlays: Sequence[tuple[int, Array]],
        out: Stored,
        draws: Draws | None,
    ) -> Done:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked at
            arrays = exact, start, delta, still = self._arrays(loaded, begin, overlays)
        done = self.arithmetic.finish(exact, start, delta, still, out, draws)
        if not done.finite:
            refuse_nonfinite(self.target.job, loaded, exact)
        if done.is_summed:
            return done
        exact, start, delta, still = (array.astype(np.float64) for array in arrays)
        return plain_arithmetic().finish(exact, start, delta, still, out, draws)  # the same bytes

    def _arrays(
        self, loaded: Loaded, begin: int, overlays: Sequence[tuple[int, Array]]
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
        self, loaded: Loaded, begin: int, overlays: Sequence[tuple[int, Array]], job: TensorJob
    ) -> Sample:
        """The block under the rounding that was not chosen."""
        draws = self._draws(self.target.other_rounding, begin)
        room = Stored(np.empty(loaded.count * ITEM_BYTES[job.dtype], np.uint8), job.dtype)
        sums = self._done(loaded, begin, overlays, room, draws).sums
        return Sample(sums.elements, sums.delta_square, sums.error_square, sums.error_delta)


class Out:
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
        found=prepared.found,
        begin=begin,
        width=job.shape[-1] if job.shape else 1,
    )
    return METHODS[rule.method].formula(arithmetic, block)


def _extrapolated(base: Array, aligned: Array, alpha: float) -> Array:
    """`operators.extrapolate` for arrays: the same three operations."""
    if alpha in (0.0, 1.0):
        return (aligned if alpha else base).copy()
    return aligned + (aligned - base) * base.dtype.type(alpha - 1.0)


def _as_stored(values: Array) -> Stored:
    return Stored(values.view(np.uint8), "F64" if values.dtype == np.float64 else "F32")


def doubled(loaded: Loaded, weight: Weight) -> Stored:
    return _as_stored(loaded.values(weight).astype(np.float64))


def refuse_nonfinite(
    job: TensorJob, loaded: Loaded, exact: Array | None, *, compares: bool = False
) -> NoReturn:
    """Say which input is damaged, or that the result does not fit its dtype.

    Args:
        compares: neither of a pair is SFT or aligned.

    Raises:
        CheckpointError: always.
    """
    name = printable(job.name)
    for weight in loaded.weights:
        if not bool(np.isfinite(loaded.values(weight)).all()):
            side = weight.files.label if compares else _side(job, weight)
            raise CheckpointError(f"{name} holds NaN or Inf in {side}: it is damaged")
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
