"""The kernels of low-rank edits: all singular values of a matrix, and the part of it that a rule keeps.

Everything goes through the Gram matrix over the short side and its eigenvalues: several times cheaper than an
SVD. Where products in float32 are too coarse for what is asked, all of it is done again in float64. A matrix is
worked on where it is: by LAPACK on the processor, one thread a matrix, matrices side by side; by torch's library
on a device (`spectra`). Rules see singular values in float64, on the processor.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from expo.operators.keep import fixed_rank, kept_values, threshold
from expo.operators.low_rank import bulk_fit, mp_edge, noise_level
from expo.operators.rules import Keep
from expo.operators.spectra import LAPACK, Library, Spectrum

_GRAM_ERROR = 7e-6
"""Of an eigenvalue in the bulk, relative to ‖Gram‖_F / m, in float32: about 100 roundings of it, the
most that was seen. The kept part turns by that over the gap to the next eigenvalue."""

_VECTOR_ERROR = 9e-5
"""What the kept part may be off by through that, relative to itself."""

_SMALL_RANK = 16
"""Ranks up to 1/16 of the short side go the randomized way."""

_ITERATIONS = 3  # the residual is less than 0.1 % above the best one without any gap at the rank

_SQUARE_BLOCK = 1 << 16  # elements whose squares in float64 stay in a core's cache
_SQUARE_BLOCK_ON_DEVICE = 1 << 24


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


def singular_values(matrix: Tensor, library: Library = LAPACK) -> Tensor:
    """All singular values of a float matrix (rows, columns): float64, descending, in the processor's memory.

    Values below 2e-4·S₀ are not resolved in float32; where the noise lies that low, all is done in
    float64, which resolves down to 1e-7·S₀.

    Args:
        library: one that works where the matrix is.
    """
    short = _lying(matrix)
    values = library.reduce(short, library.first, with_vectors=False).values
    if library.first == torch.float64 or not _is_too_fine(values, *short.shape):
        return values
    return library.reduce(short, torch.float64, with_vectors=False).values


def cut(
    matrix: Tensor, keep: Keep, *, seed: int = 0, name: str = "", library: Library = LAPACK
) -> Cut:
    """The part of a float32 or float64 matrix that `keep` keeps, in its shape and dtype, where it is.

    Args:
        seed, name: of the random start where the rank is small.
        library: one that works where the matrix is.
    """
    short = _lying(matrix)
    m, n = short.shape
    rank = fixed_rank(keep, m, n)
    if rank is not None and rank >= m:
        return Cut(matrix, m, 0.0)
    if (small := small_rank(keep, m, n)) is not None:
        return _cut_small(matrix, small, seed, name)
    spectrum, kept = _spectrum(short, keep, library)
    values = spectrum.values
    total = float(values.square().sum())
    sigma = noise_level(values, m, n)
    if len(kept) == m and keep.rule != "shrink":
        part = matrix  # nothing goes: not even the last bits of a product
    else:
        part = _part(short, spectrum, kept, library)
        part = part if short is matrix else part.T.contiguous()
    return Cut(
        part,
        len(kept),
        1.0 - float(kept.square().sum()) / total if total else 0.0,
        sigma,
        bulk_fit(values, sigma, m, n),
    )


def factors(
    matrix: Tensor,
    keep: Keep,
    *,
    seed: int = 0,
    name: str = "",
    iterations: int = _ITERATIONS,
    library: Library = LAPACK,
) -> Factors:
    """The kept part as a product, for rules that do not shrink."""
    short = _lying(matrix)
    small = small_rank(keep, *short.shape)
    if small is not None:
        return _randomized(matrix, small, seed, name, iterations)[0]
    spectrum, kept = _spectrum(short, keep, library)
    basis = spectrum.vectors(0, len(kept)).to(matrix.dtype)
    if short is matrix:
        return Factors(basis, basis.T @ matrix)
    return Factors(matrix @ basis, basis.T.contiguous())


def small_rank(keep: Keep, m: int, n: int) -> int | None:
    """The rank that an (m, n) matrix, m ≤ n, is brought to the randomized way; None where its spectrum is needed."""
    rank = fixed_rank(keep, m, n)
    return rank if rank is not None and rank <= m // _SMALL_RANK else None


def square_sum(matrix: Tensor) -> float:
    """Σ of the squares, in float64."""
    size = _SQUARE_BLOCK if matrix.device.type == "cpu" else _SQUARE_BLOCK_ON_DEVICE
    squares = [block.double().square().sum() for block in matrix.reshape(-1).split(size)]
    return sum(torch.stack(squares).tolist()) if squares else 0.0


def _lying(matrix: Tensor) -> Tensor:
    """The matrix with its short side first: itself or its transpose."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _is_too_fine(values: Tensor, m: int, n: int) -> bool:
    """Whether the noise lies below what products in float32 resolve."""
    edge = mp_edge(noise_level(values, m, n), m, n)
    return bool(values[0] > 300.0 * edge)


def _spectrum(short: Tensor, keep: Keep, library: Library) -> tuple[Spectrum, Tensor]:
    """The spectrum of a lying matrix, fine enough for the rule, and the values that it keeps."""
    m, n = short.shape
    dtype = torch.promote_types(short.dtype, library.first)
    spectrum = library.reduce(short, dtype, with_vectors=True)
    kept = kept_values(keep, spectrum.values, m, n)
    if dtype == torch.float32 and _is_ambiguous(spectrum.values, len(kept), keep, m, n):
        spectrum = library.reduce(short, torch.float64, with_vectors=True)
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


def _part(short: Tensor, spectrum: Spectrum, kept: Tensor, library: Library) -> Tensor:
    """Q Qᵀ A, or A less the part that goes where that is the smaller one."""
    size, rank = len(spectrum.values), len(kept)
    top = spectrum.values[:rank]
    shrinks = not torch.equal(kept, top)
    removes = rank > size // 2 and not shrinks
    chosen = (rank, size) if removes else (0, rank)
    basis = spectrum.vectors(*chosen).to(short.dtype)
    gain = (kept / top).to(short)[:, None] if shrinks else None
    blocks = library.blocks(short)
    if len(blocks) == 1:
        return _projected(short, basis, gain, removes=removes)
    part = torch.empty_like(short)
    for room, block in zip(library.blocks(part), blocks, strict=True):
        room.copy_(_projected(block, basis, gain, removes=removes))
    return part


def _projected(block: Tensor, basis: Tensor, gain: Tensor | None, *, removes: bool) -> Tensor:
    """Columns of Q·diag(gain)·Qᵀ A, or of A − Q Qᵀ A."""
    inner = basis.T @ block
    if gain is not None:
        inner *= gain
    return block - basis @ inner if removes else basis @ inner


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

    The start is drawn by the processor, so that it is the same for every device.

    Returns the factors and the energy that the last iteration added.
    """
    rows, columns = matrix.shape
    width = min(rank + max(16, rank // 2), rows, columns)
    generator = torch.Generator().manual_seed(_start(seed, name))
    start = torch.randn(columns, width, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
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
