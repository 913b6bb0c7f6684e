"""How fast all singular values are, in CPU seconds of one thread, side by side.

python -m benchmarks.low_rank --runs 3
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from expo.operators.low_rank import singular_values

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "expo: singular_values": singular_values,
        "svdvals float32 (Spectrum's way)": torch.linalg.svdvals,
        "svdvals float32, short side first": lambda w: torch.linalg.svdvals(w.T if w.shape[0] < w.shape[1] else w),
    }  # fmt: skip
    print("| shape | way | CPU s: median (min – max) | largest error / S₀ |\n|---|---|---|---|")
    for shape in SHAPES:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, torch.Tensor] = {}
        for _ in range(arguments.runs):
            for name, way in ways.items():
                started = time.process_time()
                found[name] = way(matrix).double()
                seconds[name].append(time.process_time() - started)
        exact = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T if shape[0] <= shape[1]
                                      else matrix.double().T @ matrix.double()).clamp(min=0).sqrt().flip(0)  # fmt: skip
        for name, runs in seconds.items():
            error = float((found[name] - exact).abs().max() / exact[0])
            spread = f"{statistics.median(runs):.2f} ({min(runs):.2f} – {max(runs):.2f})"
            print(f"| {shape[0]}×{shape[1]} | {name} | {spread} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
