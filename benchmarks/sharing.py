"""What it costs to share a merge between processes: the same output, on the same machine, by one process or by several.

    python -m benchmarks.sharing --params 1.2e9 --shard-size 100MB

Whole processes, interleaved, medians of `--runs`, inputs in the page cache. On one machine nothing can be won by
sharing: what is more than one process's time is its price. `ray` starts a cluster on this machine for each run, whose
CPU seconds are its own processes' and not counted; it needs Ray.
"""

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, Popen

from benchmarks.merge import make_pair, set_cache

VARIANTS: dict[str, list[str]] = {
    "one process": [""],
    "one process, --join": ["--join"],
    "two processes, --join": ["--join", "--join"],
    "two processes, --worker": ["--worker 0/2", "--worker 1/2"],
    "--engine ray, two tasks at once": ["--engine ray --threads 1"],
}


def run(folder: Path, flags: list[str], shard_size: str) -> tuple[float, float]:
    """Seconds and CPU seconds of processes that start together, until the last of them ends."""
    how = f"--alpha 1.5 -q --no-verify --max-shard-size {shard_size}"
    command = f"{sys.executable} -m expo extrapolate sft aligned out {how}"
    before, started = os.times(), time.perf_counter()
    processes = [
        Popen([*shlex.split(command), *flag.split()], cwd=folder, stdout=DEVNULL) for flag in flags
    ]
    codes = [process.wait() for process in processes]
    wall, after = time.perf_counter() - started, os.times()
    if any(codes):
        raise SystemExit(f"{flags}: {codes}")
    shutil.rmtree(folder / "out")
    return wall, sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=1.2e9)
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to make the pair [a temporary one]")
    options = parser.parse_args()
    chosen = {k: v for k, v in VARIANTS.items() if not (options.without_ray and "ray" in k)}
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        pair = make_pair(folder, options.params)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
        for _ in range(options.runs):
            for name, flags in chosen.items():
                set_cache("warm", pair)
                measured[name].append(run(folder, flags, options.shard_size))
    print("| | wall, s | CPU s |\n|---|---|---|")
    for name, runs in measured.items():
        walls, cpus = zip(*runs, strict=True)
        spread = f"{min(walls):.2f} – {max(walls):.2f}"
        print(
            f"| {name} | {statistics.median(walls):.2f} ({spread}) | {statistics.median(cpus):.2f} |"
        )


if __name__ == "__main__":
    main()
