"""What workers need of a processor, block by block. Arrays are flat and in the working precision: float32,
float64 where an input is."""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from expo.checkpoint.codes import Codes, Scales
from expo.checkpoint.reader import Bytes
from expo.operators.methods import Array, Mask, Operations, Sparsifier
from expo.operators.statistics import Sums


class Stored(NamedTuple):
    """Elements as they lie in a file: their bytes, at an address that suits the dtype, and the dtype."""

    data: Bytes
    dtype: str


class Coded(NamedTuple):
    """Elements as codes with their scales: see `Codes.values`."""

    data: Bytes
    scales: Scales
    codes: Codes


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

    def decode(self, coded: Coded, first: int, out: Array) -> None:
        """Fill `out` with elements `first` …, counted from the first matrix of the scales: code · scale in float32."""
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
