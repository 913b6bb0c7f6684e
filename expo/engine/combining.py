"""The kernel for tensors of several models: load a block of each, combine, round once, sum."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.engine.combine import Combined, Prepared, combine, prepare
from expo.engine.sources import (
    Side,
    Sources,
    read_tensor,
    torch_dtype,
    typed_output,
    working_dtype,
)
from expo.errors import CheckpointError
from expo.operators.rounding import round_into
from expo.operators.statistics import Summing, Sums
from expo.planning.chunks import Piece
from expo.planning.plan import TensorJob
from expo.spec.request import Rounding


class Preparations:
    """Facts about whole tensors, made by the first worker that needs them and shared by all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, Prepared] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._left: dict[str, int] = {}

    def get(self, job: TensorJob, make: Callable[[], Prepared]) -> Prepared:
        with self._lock:
            lock = self._locks.setdefault(job.name, threading.Lock())
        with lock:
            if job.name not in self._made:
                self._made[job.name] = make()
            return self._made[job.name]

    def done(self, job: TensorJob, count: int) -> None:
        """Forget a tensor once all its elements are computed."""
        with self._lock:
            left = self._left.get(job.name, job.count) - count
            self._left[job.name] = left
            if left == 0:
                self._made.pop(job.name, None)
                self._locks.pop(job.name, None)


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


class Combining:
    """One worker's steps for jobs that combine several models."""

    def __init__(
        self,
        sources: Sources,
        rounding: Rounding,
        seed: int,
        block_elements: int,
        preparations: Preparations,
    ) -> None:
        self._sources, self._rounding, self._seed = sources, rounding, seed
        self._block, self._preparations = block_elements, preparations

    def run(self, piece: Piece, out: Bytes) -> list[Sums]:
        """Fill `out` with the piece; the sums of its blocks.

        Raises:
            CheckpointError: an input holds NaN or Inf, or a result overflows the output dtype.
        """
        job, combination = piece.job, piece.job.combination
        assert combination is not None
        target = typed_output(out, torch_dtype(job.dtype), piece.count)
        prepared = self._prepared(job)
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
            done = combine(combination, blocks.load, prepared, begin, width)
            round_into(result, done.exact, self._rounding, self._seed, job.name, begin)
            sums.append(_sums(job, result, done))
            start += result.numel()
        if target.data_ptr() != out.ctypes.data:
            out[:] = target.view(torch.uint8).numpy()
        self._preparations.done(job, piece.count)
        return sums

    def _prepared(self, job: TensorJob) -> Prepared | None:
        assert job.combination is not None
        if not job.combination.needs_whole:
            return None
        double = any(weight.stored.dtype == "F64" for weight in job.inputs)
        dtype = torch.float64 if double else torch.float32
        return self._preparations.get(
            job,
            lambda: prepare(
                job, self._seed, lambda w: read_tensor(self._sources, w, w.shape, dtype=dtype)
            ),
        )


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
