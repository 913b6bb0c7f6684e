"""The spectrum of a matrix by way of its Gram matrix, by two libraries: LAPACK on a core of the processor, and
torch's on the device where the matrix is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from expo.operators.lapack import apply_reflectors, gram, one_thread, tridiagonal

_BLOCK = 1 << 24  # elements of a matrix that are in another precision at a time, on a device


class Spectrum(Protocol):
    """A Gram matrix taken apart."""

    values: Tensor
    """All singular values, float64, descending, in the processor's memory."""

    def vectors(self, first: int, end: int) -> Tensor:
        """The left singular vectors of values[first:end], as columns, where the matrix is."""
        ...


class Reduce(Protocol):
    """Takes the Gram matrix of a lying matrix (rows ≤ columns) apart, its products in `dtype`."""

    def __call__(self, short: Tensor, dtype: torch.dtype, *, with_vectors: bool) -> Spectrum: ...


@dataclass(frozen=True)
class Library:
    """Who takes Gram matrices apart.

    `first` is the dtype of the products that are tried first for a float32 matrix: float32 where float64 costs
    more, and float64 is then for what float32 cannot tell. `blocks` cuts a lying matrix into the blocks of columns
    that are worked on at a time: they depend on its shape alone.
    """

    reduce: Reduce
    first: torch.dtype
    blocks: Callable[[Tensor], tuple[Tensor, ...]]


class LapackSpectrum:
    """By one tridiagonal reduction, which gives all eigenvalues and the vectors that are asked for.

    Products and reduction are in `dtype`, what follows is in float64.
    """

    def __init__(self, short: Tensor, dtype: torch.dtype, *, with_vectors: bool = True) -> None:
        from scipy.linalg import eigh_tridiagonal

        # The transpose of a row-major array is what BLAS calls column-major: no copy.
        self._reduced = gram(short.to(dtype).contiguous().numpy().T)
        diagonal, beside, self._scales = tridiagonal(self._reduced)
        self._diagonal, self._beside = diagonal.astype(np.float64), beside.astype(np.float64)
        with one_thread:
            eigenvalues = eigh_tridiagonal(self._diagonal, self._beside, eigvals_only=True)
        self.values = _roots(torch.from_numpy(eigenvalues))

    def vectors(self, first: int, end: int) -> Tensor:
        from scipy.linalg import eigh_tridiagonal

        size = len(self._diagonal)
        if first == end:
            return torch.from_numpy(np.empty((size, 0), dtype=self._reduced.dtype))
        chosen = (size - end, size - 1 - first)
        with one_thread:
            _, found = eigh_tridiagonal(
                self._diagonal, self._beside, select="i", select_range=chosen, lapack_driver="stemr"
            )
        vectors = found[:, ::-1].astype(self._reduced.dtype, order="F")
        apply_reflectors(self._reduced, self._scales, vectors)
        return torch.from_numpy(vectors)


class TorchSpectrum:
    """By `torch.linalg.eigh`, on whatever device the matrix is, in float64: on a device a reduction is bound by its
    memory, not by its float64 units. The products, which are not, are in `dtype`, block by block of columns,
    and added in float64.
    """

    def __init__(self, short: Tensor, dtype: torch.dtype, *, with_vectors: bool) -> None:
        size = short.shape[0]
        total = torch.zeros(size, size, dtype=torch.float64, device=short.device)
        for block in column_blocks(short):
            part = block.to(dtype)
            total += part @ part.T
        if with_vectors:
            eigenvalues, self._vectors = torch.linalg.eigh(total)
        else:
            eigenvalues, self._vectors = torch.linalg.eigvalsh(total), total[:, :0]
        self.values = _roots(eigenvalues.cpu())

    def vectors(self, first: int, end: int) -> Tensor:
        size = len(self.values)
        return self._vectors[:, size - end : size - first].flip(1)


def column_blocks(short: Tensor) -> tuple[Tensor, ...]:
    """Whole columns, so many that a block has about 16 million elements."""
    return short.split(max(_BLOCK // max(short.shape[0], 1), 1), dim=1)


LAPACK = Library(LapackSpectrum, torch.float32, lambda short: (short,))
"""Of the processor, one thread a matrix: float32 takes half the time there."""

ON_DEVICE = Library(TorchSpectrum, torch.float32, column_blocks)
"""Of a device whose float64 products are many times slower than its float32 ones."""

ON_DEVICE_DOUBLE = Library(TorchSpectrum, torch.float64, column_blocks)
"""Of a device that is good at float64: nothing has to be done twice."""


def _roots(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.clamp_(min=0.0).sqrt_().flip(0)
