"""A `Worker` that sends plain pairs through a device, and leaves everything else to the processor."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.compute.arithmetic import Done
from expo.compute.blending import Edited, Out, Target
from expo.compute.device import Device, is_full
from expo.compute.inputs import Inputs
from expo.compute.pairs import Pair, by_block, extrapolated, pair_of, rounding_sums, working
from expo.compute.plain import as_tensor
from expo.compute.preparations import Preparations
from expo.compute.preparing import Prepared
from expo.compute.worker import BlockWorker, PieceResult, sampled_element
from expo.operators.rounding import round_into
from expo.operators.statistics import Sample, Sums
from expo.planning.chunks import BLOCK_ELEMENTS, Piece
from expo.planning.jobs import Blend, TensorJob
from expo.spec.request import Rounding

T = TypeVar("T")


class DeviceWorker:
    """A `Worker` whose pieces cross the bus as they are stored, both sides once for all targets.

    Over there: widen, subtract, multiply, add, each a kernel of its own and so rounded as on the processor, and one
    rounding to the target's dtype. The bytes are those of `BlockWorker`. Sums are of the same blocks, but added in
    another order, so that their last digits differ; they are the same in every run on the device, unless its memory
    ran out: halves add in another order again.

    A piece for which there is no room goes through in halves, in quarters, …, and by the processor where not even
    a block fits. The processor also has what is more than a pair's formula, and every piece that is not finite
    or whose squares leave float32: it says which input is damaged, or sums again.
    """

    def __init__(
        self,
        inputs: Inputs,
        device: Device,
        preparations: "Preparations[Prepared | Edited] | None" = None,
        *,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        self._inputs, self._device, self._block = inputs, device, block_elements
        self._most = sys.maxsize  # elements at a time, as far as is known
        self._processor = BlockWorker(
            inputs, preparations, block_elements=block_elements, device=device
        )

    def run(self, piece: Piece, targets: Sequence[Target]) -> list[PieceResult]:
        found = self._fitting(piece, lambda most: self._blend(piece, targets, most))
        if found is None or not all(_is_summed(result.blocks) for _, result in found):
            return self._processor.run(piece, targets)
        for out, _ in found:
            out.deliver()
        return [result for _, result in found]

    def compare(self, piece: Piece) -> list[Sums]:
        blocks = self._fitting(piece, lambda most: self._compared(piece, most))
        return blocks if blocks and _is_summed(blocks) else self._processor.compare(piece)

    def _fitting(self, piece: Piece, work: Callable[[int], T]) -> T | None:
        """What `work` gives, with as many elements at a time as fit; None where not even a block does, or it is no
        work for a device."""
        while piece.starts is not None and is_for_device(piece.job):
            most = min(self._most, piece.count)
            try:
                with self._device.lane():
                    return work(most)
            except RuntimeError as error:
                if not is_full(error):
                    raise
            self._device.make_room()
            if most <= self._block:
                break
            self._most = max(most // 2 // self._block, 1) * self._block
        return None

    def _blend(
        self, piece: Piece, targets: Sequence[Target], most: int
    ) -> list[tuple[Out, PieceResult]]:
        blends = [_Blend(piece, target, self._block) for target in targets]
        for start, pair in self._pairs(piece, most):
            for blend in blends:
                blend.stretch(start, pair)
        return [(blend.out, blend.result()) for blend in blends]

    def _compared(self, piece: Piece, most: int) -> list[Sums]:
        found = [
            torch.cat([pair.norms, by_block(pair.aligned * pair.aligned, self._block)[None]])
            for _, pair in self._pairs(piece, most)
        ]
        return [
            Sums(count, b2, d2, zeros, aligned_square=a2)
            for count, (b2, d2, zeros, a2) in _columns(found, piece.count, self._block)
        ]

    def _pairs(self, piece: Piece, most: int) -> Iterator[tuple[int, Pair]]:
        """(first element in the piece, both sides on the device), so many elements at a time."""
        sides = self._sides(piece)
        for start in range(0, piece.count, most):
            count = min(most, piece.count - start)
            base, aligned = (self._there(side[start : start + count]) for side in sides)
            yield start, pair_of(base, aligned, working(piece.job), self._block)

    def _there(self, stored: Tensor) -> Tensor:
        return stored.to(self._device.place, non_blocking=True)

    def _sides(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Base and aligned of a piece as they are stored, whole, in the read buffers."""
        rule = piece.job.rule
        assert isinstance(rule, Blend)
        assert piece.starts is not None
        ranges = {
            id(weight): self._inputs.open(weight, start, piece.count, side=side)
            for side, (weight, start) in enumerate(zip(rule.weights, piece.starts, strict=True))
        }
        both = ranges[id(rule.start)], ranges[id(rule.terms[0].weight)]
        base, aligned = (as_tensor(one.stored(0, piece.count)) for one in both)
        return base, aligned


class _Blend:
    """A piece on its way into one target."""

    def __init__(self, piece: Piece, target: Target, block: int) -> None:
        self._piece, self._target, self._block = piece, target, block
        self.out = Out(target, piece)
        self._sampled_at = sampled_element(target.job, block) - piece.begin
        self._sums: list[Tensor] = []
        self._sample: tuple[int, Tensor] | None = None

    @property
    def _alpha(self) -> float:
        assert isinstance(self._target.job.rule, Blend)
        return self._target.job.rule.alphas[0]

    def stretch(self, start: int, pair: Pair) -> None:
        """Compute the elements from `start` of the piece."""
        rounding = self._target.rounding
        done = extrapolated(
            pair, self._alpha, lambda exact: self._rounded(exact, rounding, start), self._block
        )
        room = as_tensor(self.out.block(start, done.rounded.numel()))
        room.copy_(done.rounded, non_blocking=True)
        self._sums.append(done.sums)
        if 0 <= (at := self._sampled_at - start) < done.exact.numel():
            self._sample = self._sampled(start, at, done.exact, pair)

    def _rounded(self, exact: Tensor, rounding: Rounding, start: int) -> Tensor:
        job, begin = self._target.job, self._piece.begin + start
        out = torch.empty_like(exact, dtype=getattr(torch, TORCH_NAMES[job.dtype]))
        return round_into(out, exact, rounding, self._target.seed, job.name, begin)

    def _sampled(self, start: int, at: int, exact: Tensor, pair: Pair) -> tuple[int, Tensor]:
        """One block under the rounding that was not chosen: its elements; ⟨Δ, Δ⟩, ⟨r, r⟩ and ⟨r, Δ⟩."""
        exact, delta, aligned = (
            values[at : at + self._block] for values in (exact, pair.delta, pair.aligned)
        )
        rounded = self._rounded(exact, self._target.other_rounding, start + at)
        errors = rounding_sums(exact, rounded, delta, aligned, self._block)[:2, 0]
        return exact.numel(), torch.cat([pair.norms[1:2, at // self._block], errors])

    def result(self) -> PieceResult:
        """What came of it, when all of it is computed."""
        columns = _columns(self._sums, self._piece.count, self._block)
        sums = [Sums(count, *column).asked(self._alpha) for count, column in columns]
        sample = None
        if self._sample is not None:
            count, values = self._sample
            sample = Sample(count, *values.tolist())
        return PieceResult(self._target.job, sums, sample)


def _columns(sums: Sequence[Tensor], count: int, block: int) -> Iterator[tuple[int, list[float]]]:
    """(elements, sums) of every block of a piece."""
    for number, column in enumerate(torch.cat([*sums], dim=1).T.tolist()):
        yield min(block, count - number * block), column


def is_for_device(job: TensorJob) -> bool:
    """Whether the pair's formula over stored floats is all that there is to it."""
    rule = job.rule
    if not isinstance(rule, Blend) or not rule.is_extrapolation:
        return False
    updated = any(weight.update is not None for weight in rule.weights)
    stored = {weight.stored.dtype for weight in rule.weights}
    return stored <= FLOATS and not (updated or job.matrices)


def _is_summed(blocks: Sequence[Sums]) -> bool:
    return all(Done(sums, finite=True).is_summed for sums in blocks)
