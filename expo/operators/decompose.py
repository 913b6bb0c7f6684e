"""The kernels of low-rank edits: all singular values of a matrix, and the part of it that a rule keeps.

Everything goes through the Gram matrix over the short side, brought to tridiagonal form in float32,
and its eigenvalues in float64: several times cheaper than an SVD. Where that is too coarse for what is
asked, all of it is done again in float64. One thread a matrix; matrices run side by side.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expo.operators.keep import fixed_rank, kept_values, threshold
from expo.operators.lapack import apply_reflectors, gram, tridiagonal
from expo.operators.low_rank import bulk_fit, mp_edge, noise_level
from expo.operators.rules import Keep

_GRAM_ERROR = 7e-6
"""Of an eigenvalue in the bulk, relative to ‖Gram‖_F / m, in float32: about 100 roundings of it, the
most that was seen. The kept part turns by that over the gap to the next eigenvalue."""

_VECTOR_ERROR = 9e-5
"""What the kept part may be off by through that, relative to itself."""

_SMALL_RANK = 16
"""Ranks up to 1/16 of the short side go the randomized way."""

_ITERATIONS = 3  # the residual is less than 0.1 % above the best one without any gap at the rank

_SQUARE_BLOCK = 1 << 16  # elements whose squares in float64 stay in a core's cache


@dataclass(frozen=True)
class Cut:
    """What a rule left of a matrix.

    `removed_energy` is the share of ΣS² that went. Noise level and fit of the bulk (see
    `low_rank.bulk_fit`) are known where the whole spectrum was; `gain` where it was not: by how much
    the last iteration still lowered the residual ‖A − kept‖², relative to it.
    """

    matrix: Tensor
    rank: int
    removed_energy: float
    noise_sigma: float | None = None
    bulk_fit: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Factors:
    """left (rows, k) @ right (k, columns), the best approximation of rank k."""

    left: Tensor
    right: Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a float matrix (rows, columns): float64, descending.

    Values below 2e-4·S₀ are not resolved in float32; where the noise lies that low, all is done in
    float64, which resolves down to 1e-7·S₀.
    """
    short = _lying(matrix)
    values = _Spectrum(short.float()).values
    return _Spectrum(short.double()).values if _is_too_fine(values, *short.shape) else values


def cut(matrix: Tensor, keep: Keep, *, seed: int = 0, name: str = "") -> Cut:
    """The part of a float32 or float64 matrix that `keep` keeps, in its shape and dtype.

    Args:
        seed, name: of the random start where the rank is small.
    """
    short = _lying(matrix)
    m, n = short.shape
    rank = fixed_rank(keep, m, n)
    if rank is not None and rank >= m:
        return Cut(matrix, m, 0.0)
    if rank is not None and rank <= m // _SMALL_RANK:
        return _cut_small(matrix, rank, seed, name)
    spectrum, kept = _spectrum(short, keep)
    values = spectrum.values
    total = float(values.square().sum())
    sigma = noise_level(values, m, n)
    if len(kept) == m and keep.rule != "shrink":
        part = matrix  # nothing goes: not even the last bits of a product
    else:
        part = _part(short, spectrum, kept)
        part = part if short is matrix else part.T.contiguous()
    return Cut(
        part,
        len(kept),
        1.0 - float(kept.square().sum()) / total if total else 0.0,
        sigma,
        bulk_fit(values, sigma, m, n),
    )


def factors(
    matrix: Tensor, keep: Keep, *, seed: int = 0, name: str = "", iterations: int = _ITERATIONS
) -> Factors:
    """The kept part as a product, for rules that do not shrink."""
    short = _lying(matrix)
    rank = fixed_rank(keep, *short.shape)
    if rank is not None and rank <= short.shape[0] // _SMALL_RANK:
        return _randomized(matrix, rank, seed, name, iterations)[0]
    spectrum, kept = _spectrum(short, keep)
    basis = spectrum.vectors(0, len(kept)).to(matrix.dtype)
    if short is matrix:
        return Factors(basis, basis.T @ matrix)
    return Factors(matrix @ basis, basis.T.contiguous())


def square_sum(matrix: Tensor) -> float:
    """Σ of the squares, in float64."""
    blocks = matrix.reshape(-1).split(_SQUARE_BLOCK)
    return sum(float(block.double().square().sum()) for block in blocks)


def _lying(matrix: Tensor) -> Tensor:
    """The matrix with its short side first: itself or its transpose."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _roots(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.clamp_(min=0.0).sqrt_().flip(0)


def _is_too_fine(values: Tensor, m: int, n: int) -> bool:
    """Whether the noise lies below what products in float32 resolve."""
    edge = mp_edge(noise_level(values, m, n), m, n)
    return bool(values[0] > 300.0 * edge)


class _Spectrum:
    """A Gram matrix brought to tridiagonal form once: all its eigenvalues, and the vectors asked for.

    Products and reduction are in the dtype of the matrix, what follows is in float64.
    """

    def __init__(self, short: Tensor) -> None:
        from scipy.linalg import eigh_tridiagonal

        # The transpose of a row-major array is what BLAS calls column-major: no copy.
        self._reduced = gram(short.contiguous().numpy().T)
        diagonal, beside, self._scales = tridiagonal(self._reduced)
        self._diagonal, self._beside = diagonal.astype(np.float64), beside.astype(np.float64)
        eigenvalues = eigh_tridiagonal(self._diagonal, self._beside, eigvals_only=True)
        self.values = _roots(torch.from_numpy(eigenvalues))

    def vectors(self, first: int, end: int) -> Tensor:
        """Those of values[first:end], as columns."""
        from scipy.linalg import eigh_tridiagonal

        size = len(self._diagonal)
        if first == end:
            return torch.from_numpy(np.empty((size, 0), dtype=self._reduced.dtype))
        chosen = (size - end, size - 1 - first)
        _, found = eigh_tridiagonal(
            self._diagonal, self._beside, select="i", select_range=chosen, lapack_driver="stemr"
        )
        vectors = found[:, ::-1].astype(self._reduced.dtype, order="F")
        apply_reflectors(self._reduced, self._scales, vectors)
        return torch.from_numpy(vectors)


def _spectrum(short: Tensor, keep: Keep) -> tuple[_Spectrum, Tensor]:
    """The spectrum of a lying matrix, fine enough for the rule, and the values that it keeps."""
    m, n = short.shape
    spectrum = _Spectrum(short)
    kept = kept_values(keep, spectrum.values, m, n)
    if short.dtype == torch.float32 and _is_ambiguous(spectrum.values, len(kept), keep, m, n):
        spectrum = _Spectrum(short.double())
        kept = kept_values(keep, spectrum.values, m, n)
    return spectrum, kept


def _is_ambiguous(values: Tensor, rank: int, keep: Keep, m: int, n: int) -> bool:
    """Whether errors of a Gram matrix in float32 could change the rank, or turn the kept part."""
    squares = values.square()
    error = _GRAM_ERROR * float(squares.norm()) / m
    if keep.is_automatic and _is_too_fine(values, m, n):
        return True
    least = threshold(keep, values, m, n)
    if least is not None:
        nearest = (squares - least * least).abs().min()
        if float(nearest) < error:
            return True
    if not 0 < rank < len(values):
        return False
    gap, norm = float(squares[rank - 1] - squares[rank]), float(values[:rank].norm())
    return error * float(values[rank - 1]) > _VECTOR_ERROR * norm * gap


def _part(short: Tensor, spectrum: _Spectrum, kept: Tensor) -> Tensor:
    """Q Qᵀ A, or A less the part that goes where that is the smaller one."""
    size, rank = len(spectrum.values), len(kept)
    top = spectrum.values[:rank]
    shrinks = not torch.equal(kept, top)
    if rank > size // 2 and not shrinks:
        basis = spectrum.vectors(rank, size).to(short.dtype)
        return short - basis @ (basis.T @ short)
    basis = spectrum.vectors(0, rank).to(short.dtype)
    inner = basis.T @ short
    if shrinks:
        inner *= (kept / top).to(short.dtype)[:, None]
    return basis @ inner


def _cut_small(matrix: Tensor, rank: int, seed: int, name: str) -> Cut:
    found, gained = _randomized(matrix, rank, seed, name, _ITERATIONS)
    part = found.left @ found.right
    total, kept = square_sum(matrix), square_sum(found.right)
    residual = max(total - kept, 0.0)
    return Cut(
        part,
        rank,
        residual / total if total else 0.0,
        gain=gained / residual if residual else 0.0,
    )


def _randomized(
    matrix: Tensor, rank: int, seed: int, name: str, iterations: int
) -> tuple[Factors, float]:
    """A randomized SVD (Halko, Martinsson & Tropp, 0909.4061): `left` has orthonormal columns.

    Returns the factors and the energy that the last iteration added.
    """
    rows, columns = matrix.shape
    width = min(rank + max(16, rank // 2), rows, columns)
    generator = torch.Generator().manual_seed(_start(seed, name))
    start = torch.randn(columns, width, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start).Q
    before = after = 0.0
    for _ in range(iterations):
        across = matrix.T @ basis
        before, after = after, square_sum(across)
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(across).Q).Q
    inner = basis.T @ matrix
    before, after = after, square_sum(inner)
    wide = inner.double()
    turn = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank].to(matrix.dtype)
    return Factors(basis @ turn, turn.T @ inner), max(after - before, 0.0)


def _start(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
