"""What a change of α costs in a live model, against reading and writing checkpoints, and what keyed noise costs.

    python -m benchmarks.sweep --params 3e8

Makes a bfloat16 Mistral-shaped pair, warms the page cache, and prints medians.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import expo
from benchmarks.merge import make_pair, set_cache

RUNS = 5


def seconds(work: Callable[[], object], runs: int = RUNS) -> str:
    """The median of some runs, with their range."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return f"{statistics.median(found):.2f} ({min(found):.2f} – {max(found):.2f})"


def switches(sft: Path, aligned: Path) -> dict[str, str]:
    from expo.planning.build import build_plan
    from expo.sampling.live import build
    from expo.spec.request import make_request
    from tests.openchat import write_tokenizer

    write_tokenizer(aligned)
    plan = build_plan(make_request(str(sft), str(aligned)))
    live = build(plan.at(1.0))
    alphas = iter(1.1 + 0.01 * n for n in range(100))

    def write() -> None:
        expo.extrapolate(sft, aligned, aligned.parent / "out", alpha=1.3, verify=False)
        shutil.rmtree(aligned.parent / "out")

    def read() -> None:
        for folder in (sft, aligned):
            for file in folder.glob("*.safetensors"):
                file.read_bytes()

    parameters = sum(w.numel() for w in live.model.parameters())
    return {
        f"switch, {parameters / 1e9:.2f} G parameters, in place: {bool(live.slots)}": seconds(
            lambda: live.set(plan.at(next(alphas)))
        ),
        "read both checkpoints": seconds(read),
        "write a checkpoint instead": seconds(write, 3),
    }


def noise() -> dict[str, str]:
    import torch

    from expo.sampling.noise import gumbel, origin

    starts = [origin(0, str(n)) for n in range(16)]
    return {
        "noise of 16 × 32,000 tokens": seconds(
            lambda: gumbel(starts, 3, 32_000, torch.device("cpu")), 20
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--params", type=float, default=3e8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expo-bench-") as name:
        pair = make_pair(Path(name), arguments.params)
        set_cache("warm", pair)
        for what, took in {**switches(*pair), **noise()}.items():
            print(f"{what}: {took} s")


if __name__ == "__main__":
    main()
