"""What low-rank edits cost, in CPU seconds of one thread, side by side with an SVD.

python -m benchmarks.low_rank --runs 3 [--only spectra|edits|small|gate]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from expo.operators.decompose import cut, factors, singular_values
from expo.operators.keep import rounding_sigma
from expo.operators.rules import parse_keep

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336))
RANK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("spectra", "edits", "small", "gate"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"spectra": spectra, "edits": edits, "small": small}
    for kind, compare in kinds.items():
        if arguments.only in (None, kind):
            print("| shape | way | CPU s: median (min – max) | error |\n|---|---|---|---|")
            for shape in SHAPES:
                compare(shape, arguments.runs)
    if arguments.only in (None, "gate"):
        gate()


def spectra(shape: tuple[int, int], runs: int) -> None:
    """All singular values of noise; the largest error over S₀."""
    matrix = noise(shape, 0.02)
    ways = {
        "expo: singular_values": lambda: singular_values(matrix),
        "svdvals float32 (Spectrum's way)": lambda: torch.linalg.svdvals(matrix),
    }
    exact = gram_values(matrix)
    interleave(shape, runs, ways, lambda got: f"{float((got.double() - exact).abs().max() / exact[0]):.1e}")  # fmt: skip


def edits(shape: tuple[int, int], runs: int) -> None:
    """Cut at the edge and at Gavish-Donoho's threshold; error of the kept part to float64's."""
    matrix = spiked(shape)
    reference = at_rank(matrix.double(), RANK)

    def usual() -> Tensor:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        kept = s > usual_threshold(s, shape)
        return (u[:, kept] * s[kept]) @ v[kept]

    ways = {
        "expo: keep mp": lambda: cut(matrix, parse_keep("mp")).matrix,
        "expo: keep gd": lambda: cut(matrix, parse_keep("gd")).matrix,
        "torch.linalg.svd float32, cut": usual,
    }
    interleave(shape, runs, ways, lambda got: f"{relative(got, reference):.1e}")


def small(shape: tuple[int, int], runs: int) -> None:
    """The best approximation of rank 64 of a full-rank delta; the residual over the best one."""
    matrix = decaying(shape)
    best = float(gram_values(matrix)[RANK:].square().sum().sqrt())

    def usual() -> Tensor:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (u[:, :RANK] * s[:RANK]) @ v[:RANK]

    keep = parse_keep(f"rank={RANK}")

    def adapter() -> Tensor:
        found = factors(matrix, keep, iterations=2)
        return found.left @ found.right

    ways = {
        f"expo: keep rank={RANK}": lambda: cut(matrix, keep).matrix,
        "expo: factors, 2 iterations": adapter,
        "torch.linalg.svd float32, cut": usual,
    }
    interleave(shape, runs, ways, lambda got: f"+{100 * (float((matrix.double() - got.double()).norm()) / best - 1):.3f} %")  # fmt: skip


def gate() -> None:
    """σ̂ over σ_ulp, and the relative error of Δ before and after a cut, in bfloat16."""
    m = n = 1024
    print("| change | size | rounded | σ̂/σ_ulp | rank kept | error of Δ | after the cut |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for kind in ("rank 64", "full rank"):
        for size in (0.002, 0.005, 0.025):
            for rounded in ("aligned", "both"):
                exact = noise((m, n), 0.02)
                sft = exact.bfloat16().float()
                change = noise((m, n), 1.0, 5)
                if kind == "rank 64":
                    change = noise((m, RANK), 1.0, 5) @ noise((RANK, n), 1.0, 6)
                change *= size * float(exact.norm() / change.norm())
                aligned = ((sft if rounded == "aligned" else exact) + change).bfloat16()
                delta = aligned.float() - sft
                done = cut(delta, parse_keep("gd"))
                ratio = (done.noise_sigma or 0.0) / rounding_sigma(aligned.float(), torch.bfloat16)
                errors = " | ".join(f"{relative(d, change.double()):.3f}" for d in (delta, done.matrix))  # fmt: skip
                print(f"| {kind} | {size:.1%} | {rounded} | {ratio:.2f} | {done.rank} | {errors} |", flush=True)  # fmt: skip


def interleave(
    shape: tuple[int, int],
    runs: int,
    ways: dict[str, Callable[[], Tensor]],
    error: Callable[[Tensor], str],
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, str] = {}
    for _ in range(runs):
        for name, way in ways.items():
            started = time.process_time()
            got = way()
            seconds[name].append(time.process_time() - started)
            errors[name] = error(got)
    for name, spent in seconds.items():
        spread = f"{statistics.median(spent):.2f} ({min(spent):.2f} – {max(spent):.2f})"
        print(f"| {shape[0]}×{shape[1]} | {name} | {spread} | {errors[name]} |", flush=True)


def noise(shape: tuple[int, int], sigma: float, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma


def spiked(shape: tuple[int, int]) -> Tensor:
    """Noise and a signal of rank 64, 1.5 to 10 times the edge."""
    m, n = shape
    left = torch.linalg.qr(noise((m, RANK), 1.0, 1)).Q
    right = torch.linalg.qr(noise((n, RANK), 1.0, 2)).Q
    edge = 0.01 * (m**0.5 + n**0.5)
    return noise(shape, 0.01) + (left * torch.linspace(10, 1.5, RANK) * edge) @ right.T


def decaying(shape: tuple[int, int]) -> Tensor:
    """A change whose values fall off like 1/√i: no gap at any rank."""
    m, n = shape
    rank = min(shape)
    left = torch.linalg.qr(noise((m, rank), 1.0, 1)).Q
    right = torch.linalg.qr(noise((n, rank), 1.0, 2)).Q
    return (left * torch.arange(1, rank + 1).float().rsqrt()) @ right.T


def usual_threshold(values: Tensor, shape: tuple[int, int]) -> float:
    from expo.operators.low_rank import mp_edge, noise_level

    m, n = sorted(shape)
    return mp_edge(noise_level(values.double(), m, n), m, n)


def gram_values(matrix: Tensor) -> Tensor:
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    return torch.linalg.eigvalsh(short @ short.T).clamp(min=0).sqrt().flip(0)


def at_rank(matrix: Tensor, rank: int) -> Tensor:
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    basis = torch.linalg.eigh(short @ short.T).eigenvectors[:, -rank:]
    part = basis @ (basis.T @ short)
    return part if short is matrix else part.T


def relative(got: Tensor, reference: Tensor) -> float:
    return float((got.double() - reference).norm() / reference.norm())


if __name__ == "__main__":
    main()
