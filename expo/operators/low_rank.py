"""Singular values of a matrix of signal and noise: where the noise ends, and what to keep.

For W of shape (m, n) with m ≤ n, β = m/n, and noise of independent entries of standard deviation σ, the
singular values of the noise fill [σ(√n − √m), σ(√n + √m)] (Marchenko & Pastur, 1967). All functions take
singular values in float64, in descending order, and are pure.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

_GRID = 20_001  # points of the quadrature: the median is good to 1e-8


def mp_edge(sigma: float, m: int, n: int) -> float:
    """The largest singular value that noise alone has: σ(√n + √m)."""
    return sigma * (math.sqrt(n) + math.sqrt(m))


def noise_level(values: Tensor, m: int, n: int) -> float:
    """σ̂ = median(S) / √(n·μ_β), μ_β the median of the Marchenko–Pastur law (Gavish & Donoho,
    1305.5870). Signal of low rank hardly moves a median."""
    return float(values.quantile(0.5)) / math.sqrt(n * mp_median(m / n)) if len(values) else 0.0


def gavish_donoho(sigma: float, m: int, n: int) -> float:
    """The hard threshold λ*(β)·σ√n with the smallest error at worst (1305.5870, eq. 11)."""
    beta = m / n
    root = math.sqrt(beta * beta + 14.0 * beta + 1.0)
    return math.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + root)) * sigma * math.sqrt(n)


def laser_rmt_threshold(values: Tensor, m: int, n: int) -> float:
    """laserRMT's rule, bit-compatible: IQR(S)/1.349·(1 + √β). Not a noise estimate: on pure noise it
    is 0.65 of the edge of a square matrix and far less of others."""
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype))
    return float(quartiles[1] - quartiles[0]) / 1.349 * (1.0 + math.sqrt(m / n))


def rank_above(values: Tensor, threshold: float) -> int:
    return int((values > threshold).sum())


def laser_rank(m: int, n: int, rho: float) -> int:
    """LASER's ρ: int(min(m, n)·ρ) (2312.13558)."""
    return int(min(m, n) * rho)


def energy_rank(values: Tensor, share: float) -> int:
    """The smallest rank that holds `share` of ΣS²."""
    energy = values.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if len(values) and energy[-1] > 0 else 0


def shrink_frobenius(values: Tensor, sigma: float, m: int, n: int) -> Tensor:
    """Optimal shrinkage for the Frobenius norm (Gavish & Donoho, 1405.7511); 0 in the bulk."""
    beta, y = m / n, values / (sigma * math.sqrt(n))
    inner = ((y.square() - beta - 1.0).square() - 4.0 * beta).clamp(min=0.0)
    shrunk = inner.sqrt() / y.clamp(min=torch.finfo(y.dtype).tiny)
    return torch.where(y > 1.0 + math.sqrt(beta), shrunk, 0.0) * (sigma * math.sqrt(n))


def shrink_operator(values: Tensor, sigma: float, m: int, n: int) -> Tensor:
    """Optimal shrinkage for the operator norm (1405.7511); 0 in the bulk."""
    beta, y = m / n, values / (sigma * math.sqrt(n))
    z = y.square() - beta - 1.0
    inner = (z + (z.square() - 4.0 * beta).clamp(min=0.0).sqrt()).clamp(min=0.0) / 2.0
    return torch.where(y > 1.0 + math.sqrt(beta), inner.sqrt(), 0.0) * (sigma * math.sqrt(n))


def snr_mp(values: Tensor, edge: float) -> float | None:
    """ΣS² above the edge over ΣS² below; None where nothing is below."""
    square = values.square()
    noise = float(square[values <= edge].sum())
    return float(square[values > edge].sum()) / noise if noise else None


def snr_compat(values: Tensor, m: int, n: int) -> float | None:
    """Spectrum's: ΣS above laserRMT's threshold over ΣS below, over S₀; None where it is infinite."""
    threshold = laser_rmt_threshold(values, m, n)
    noise = float(values[values <= threshold].sum())
    largest = float(values[0])
    return float(values[values > threshold].sum()) / noise / largest if noise and largest else None


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of S²/ΣS² (Roy & Vetterli, 2007)."""
    square = values.square()
    total = float(square.sum())
    share = square[square > 0] / total if total else square[:0]
    return math.exp(-float((share * share.log()).sum())) if len(share) else 0.0


def bulk_fit(values: Tensor, sigma: float, m: int, n: int) -> float | None:
    """Kolmogorov–Smirnov distance of the values below the edge to the law of pure noise."""
    bulk = values[values <= mp_edge(sigma, m, n)].sort().values
    if not len(bulk) or not sigma:
        return None
    expected = mp_cdf(bulk.square() / (n * sigma * sigma), m / n)
    steps = torch.arange(len(bulk) + 1, dtype=bulk.dtype) / len(bulk)
    return float(torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max())


def mp_cdf(x: Tensor, beta: float) -> Tensor:
    """The distribution function of the Marchenko–Pastur law of eigenvalues, σ = 1."""
    points, total = _mp_table(beta)
    place = torch.searchsorted(points, x.contiguous()).clamp(1, len(points) - 1)
    below, above = points[place - 1], points[place]
    share = ((x - below) / (above - below)).clamp(0.0, 1.0)
    return total[place - 1] + share * (total[place] - total[place - 1])


def mp_median(beta: float) -> float:
    """μ_β by quadrature: 1/√… of it turns a median singular value into σ."""
    points, total = _mp_table(beta)
    above = int(torch.searchsorted(total, 0.5))
    share = (0.5 - total[above - 1]) / (total[above] - total[above - 1])
    return float(points[above - 1] + share * (points[above] - points[above - 1]))


@lru_cache(maxsize=64)
def _mp_table(beta: float) -> tuple[Tensor, Tensor]:
    """Points of the support and the law up to each.

    With x = 1 + β − 2√β·cos φ the density √((b−x)(x−a))/(2πβx) dx is smooth in φ, also at β = 1.
    """
    phi = torch.linspace(0.0, math.pi, _GRID, dtype=torch.float64)
    x = 1.0 + beta - 2.0 * math.sqrt(beta) * phi.cos()
    density = 2.0 * phi.sin().square() / (math.pi * x.clamp(min=1e-300))
    if beta == 1.0:
        density[0] = 2.0 / math.pi  # the limit of sin²φ / (1 − cos φ) at 0
    total = torch.cumulative_trapezoid(density, phi)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), total])
    return x, total / total[-1]
