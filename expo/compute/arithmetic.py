"""What workers need of a processor, block by block, and which implementation serves a tensor.

Two give the same bits: `compiled` (one pass over a block, no torch) for float32, bfloat16 and float16, and
`plain` (torch's operators) for float64, and where numba does not load. Arrays are flat and in the working
precision: float32, float64 where an input is.
"""

import math
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol

import numpy as np

from expo.checkpoint.reader import Bytes
from expo.operators.methods import Array, Mask, Operations, Sparsifier
from expo.operators.statistics import Sums
from expo.planning.jobs import Blend, TensorJob

_COMPILED_DTYPES = frozenset({"BF16", "F16", "F32"})


class Stored(NamedTuple):
    """Elements as they lie in a file: their bytes, at an address that suits the dtype, and the dtype."""

    data: Bytes
    dtype: str


class Draws(NamedTuple):
    """Whose random draws round a block: a function of seed, tensor and element alone."""

    seed: int
    name: str
    begin: int


class Done(NamedTuple):
    """What became of a block: its sums, and whether inputs, result and rounded result are all finite."""

    sums: Sums
    finite: bool

    @property
    def is_summed(self) -> bool:
        """Whether the sums hold: squares above 1e38 leave float32 though every value is finite."""
        return math.isfinite(math.fsum(self.sums))


class Arithmetic(Operations, Protocol):
    """Everything that is done to a block. Rounding is to nearest where `draws` is None."""

    def widen(self, stored: Stored, out: Array) -> None:
        """Fill `out` with the elements, exactly."""
        ...

    def extrapolate(
        self, base: Stored, aligned: Stored, alpha: float, out: Stored, draws: Draws | None
    ) -> Done:
        """out = round(a + (α − 1)·(a − b)): see `operators.extrapolate`."""
        ...

    def finish(
        self,
        exact: Array,
        start: Array,
        delta: Array,
        still: Array,
        out: Stored,
        draws: Draws | None,
    ) -> Done:
        """out = round(exact), with the sums over start, Δ, the change, and what equals `still`."""
        ...

    def store(self, exact: Array, out: Stored, draws: Draws | None) -> bool:
        """out = round(exact); whether all of it is finite."""
        ...

    def compare(self, base: Stored, aligned: Stored) -> Done:
        """The sums of Δ and of both sides."""
        ...

    def square_sum(self, values: Array) -> float:
        """Σx², in float64."""
        ...

    def ulp_square_sum(self, values: Array, dtype: str) -> float:
        """Σ ulp(x)², ulp(x) being the distance from x to the next value of `dtype`."""
        ...

    def mask(
        self,
        sparsifier: Sparsifier,
        delta: Array,
        shape: tuple[int, ...],
        values: Mapping[str, float],
        draws: Draws,
        *,
        rescale: bool,
    ) -> Mask:
        """Which elements of a whole Δ stay: see `operators.sparsify`. `delta` may be overwritten."""
        ...


def arithmetic_for(job: TensorJob) -> Arithmetic:
    """The implementation that serves a tensor."""
    dtypes = {job.dtype, *(weight.stored.dtype for weight in job.inputs)}
    # DELLA ranks stacks of matrices along their second axis, as mergekit does.
    odd = isinstance(job.rule, Blend) and job.rule.sparsifier == "ranked" and len(job.shape) > 2
    compiled = _compiled() if dtypes <= _COMPILED_DTYPES and not odd else None
    return compiled or plain_arithmetic()


def needs_torch(job: TensorJob) -> bool:
    """Whether computing the tensor takes torch: for its arithmetic, an adapter's products or its edits."""
    adapted = any(weight.update is not None for weight in job.inputs)
    return adapted or bool(job.matrices) or arithmetic_for(job) is not _compiled()


def working_dtype(job: TensorJob) -> type[np.floating]:
    double = any(weight.stored.dtype == "F64" for weight in job.inputs)
    return np.float64 if double else np.float32


def arithmetic_of(*arrays: Array) -> Arithmetic:
    """The implementation that serves arrays in the working precision."""
    is_single = all(array.dtype == np.float32 for array in arrays)
    return (_compiled() if is_single else None) or plain_arithmetic()


@cache
def _compiled() -> Arithmetic | None:
    """None where numba cannot be loaded: a platform without it, or a version that does not know NumPy's."""
    try:
        return import_module("expo.compute.compiled").Compiled()
    except ImportError:
        return None


@cache
def plain_arithmetic() -> Arithmetic:
    """torch's operators."""
    return import_module("expo.compute.plain").Plain()
