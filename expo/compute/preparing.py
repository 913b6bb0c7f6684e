"""What a blend has to know of whole tensors before its first block: masks, angles, weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from expo.checkpoint.weight import Weight
from expo.compute.arithmetic import Arithmetic, Draws
from expo.compute.choice import working_dtype
from expo.compute.inputs import Inputs, Range
from expo.operators.methods import METHODS, Arc, Array, Mask, Track, Whole
from expo.planning.chunks import BLOCK_ELEMENTS
from expo.planning.jobs import Blend, Stretch, TensorJob


@dataclass(frozen=True)
class Prepared:
    """Of a whole tensor; nothing where the method needs nothing."""

    masks: tuple[Mask | None, ...] = ()
    found: Arc | Track | None = None


def prepare(job: TensorJob, seed: int, inputs: Inputs, arithmetic: Arithmetic) -> Prepared:
    """Read whole tensors and draw what is needed; no more than one of them is held at a time."""
    assert isinstance(job.rule, Blend)
    rule = job.rule
    tensors = WholeTensors(job, inputs, arithmetic)
    make = METHODS[rule.method].prepare
    if make is not None:
        values = [term.parameters for term in rule.terms]
        whole = Whole(job.shape, tensors.blocks)
        with np.errstate(over="ignore", invalid="ignore"):  # blocks look at what is not finite
            return Prepared(found=make(arithmetic, whole, values, rule.shared))
    return Prepared(tuple(_mask(job, number, seed, tensors) for number in range(len(rule.terms))))


def _mask(job: TensorJob, number: int, seed: int, tensors: "WholeTensors") -> Mask | None:
    assert isinstance(job.rule, Blend)
    rule, term = job.rule, job.rule.terms[number]
    if rule.sparsifier is None or term.parameters.get("density", 1.0) >= 1:
        return None
    return tensors.arithmetic.mask(
        rule.sparsifier,
        tensors.delta(number),
        job.shape,
        term.parameters,
        Draws(seed, f"{job.name}#{number}", 0),
        rescale=bool(rule.shared.get("rescale")),
    )


class WholeTensors:
    """The tensors of a blend in the donor's rows, block by block. Rows that a model lacks count as the
    donor's: there Δ is 0."""

    def __init__(self, job: TensorJob, inputs: Inputs, arithmetic: Arithmetic) -> None:
        assert isinstance(job.rule, Blend)
        self._job, self._rule, self._inputs, self.arithmetic = job, job.rule, inputs, arithmetic
        self._dtype = working_dtype(job)
        self._places = {id(weight): n for n, weight in enumerate(self._rule.weights)}

    def delta(self, number: int) -> Array:
        """θ − base of one model, whole and flat: the one copy of a tensor that is held."""
        assert self._rule.base is not None
        delta = np.empty(self._job.count, self._dtype)
        pair = [self._rule.terms[number].weight, self._rule.base]
        with np.errstate(over="ignore", invalid="ignore"):  # blocks look at what is not finite
            for begin, (theta, base) in self._read(pair):
                np.subtract(theta, base, out=delta[begin : begin + theta.size])
        return delta

    def blocks(self) -> Iterator[tuple[int, Sequence[Array], Array | None]]:
        """(first element, thetas, base), blocks of whole rows."""
        weights = [term.weight for term in self._rule.terms]
        if self._rule.base is None:
            yield from ((begin, values, None) for begin, values in self._read(weights))
            return
        for begin, (*values, base) in self._read([*weights, self._rule.base]):
            yield begin, values, base

    def _read(self, weights: Sequence[Weight]) -> Iterator[tuple[int, list[Array]]]:
        """(first element, values of each weight); the values are valid until the next are taken."""
        width = self._job.shape[-1] if len(self._job.shape) > 1 else 1
        step = max(BLOCK_ELEMENTS // max(width, 1), 1) * width
        chunk = max(self._inputs.buffer_bytes // 8 // step, 1) * step
        rooms = [np.empty(min(step, self._job.count), self._dtype) for _ in weights]
        for stretch in self._job.stretches():
            for first in range(0, stretch.count, chunk):
                count = min(chunk, stretch.count - first)
                ranges = self._open(weights, stretch, first, count)
                for start in range(0, count, step):
                    values = [room[: min(step, count - start)] for room in rooms]
                    for source, value in zip(ranges, values, strict=True):
                        source.load(start, value, self.arithmetic)
                    yield stretch.begin + first + start, values

    def _open(
        self, weights: Sequence[Weight], stretch: Stretch, first: int, count: int
    ) -> list[Range]:
        ranges = []
        for side, weight in enumerate(weights):
            source, start = self._job.donor, stretch.begin
            if stretch.starts is not None:
                source, start = weight, stretch.starts[self._places[id(weight)]]
            ranges.append(self._inputs.open(source, start + first, count, side=side))
        return ranges
