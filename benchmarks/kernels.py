"""What the compiled kernels cost: nanoseconds an element of one thread, and what starting them takes.

    python -m benchmarks.kernels
    NUMBA_CPU_NAME=x86-64-v3 NUMBA_CPU_FEATURES= python -m benchmarks.kernels

Blocks of 131,072 elements that stay in the cache; the least of some rounds. Everything is compiled
into a fresh cache first, so that a variant's CPU seconds are those of its compilation.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

COUNT = 131_072

_START = """
import sys, time
def now():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return time.process_time(), *(int(fields[key].split()[0]) / 1e3 for key in ("RssAnon", "VmHWM"))
import numpy as np
said = [now()]
import numba
said.append(now())
from expo.compute import kernels
said.append(now())
base, aligned, out = np.zeros((3, 131072), np.uint16)
kernels.extrapolate(base, aligned, 1.5, out=out, draws=None)
said.append(now())
for step, (before, after) in zip(("import numba", "import the kernels", "first call"), zip(said, said[1:])):
    print(f"| {step} | {after[0] - before[0]:.2f} | {after[1]:.0f} | {after[2]:.0f} |")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expo-bench-") as cache:
        os.environ["NUMBA_CACHE_DIR"] = cache
        for title in ("cold cache", "cached"):
            print(
                f"\n| {title} | CPU s | RssAnon MB | peak RSS MB |\n|---|---|---|---|", flush=True
            )
            subprocess.run([sys.executable, "-c", _START], check=True)
    with tempfile.TemporaryDirectory(prefix="expo-bench-") as cache:
        os.environ["NUMBA_CACHE_DIR"] = cache
        print("\n| kernel | ns an element | compiled in CPU s | variants |\n|---|---|---|---|")
        for name, call in calls():
            before, started = variants(), time.process_time()
            call()
            seconds = time.process_time() - started
            spent = f"{seconds:.1f}" if variants() > before else ""
            print(f"| {name} | {nanoseconds(call, arguments.rounds):.2f} | {spent} | {variants() - before} |")  # fmt: skip


def nanoseconds(call: Callable[[], object], rounds: int) -> float:
    repeats, least = 5, float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        least = min(least, time.perf_counter() - started)
    return least / repeats / COUNT * 1e9


def variants() -> int:
    """How many functions of kernels have been compiled, for how many dtypes each."""
    from expo.compute import decode, kernels, masks, measures, mixing

    modules = (decode, kernels, masks, measures, mixing)
    found = {id(value): value for module in modules for value in vars(module).values()}
    compiled = [value for value in found.values() if hasattr(value, "overloads")]
    own = [value for value in compiled if value.py_func.__module__.startswith("expo.compute.")]
    return sum(len(value.signatures) for value in own if value.stats.cache_path)


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    yield from _codes()
    yield from _two_models()
    yield from _preparations()
    yield from _several_models()


def _codes() -> Iterator[tuple[str, Callable[[], object]]]:
    """As in DeepSeek-V3, and a 127th of an expert of gpt-oss at a time."""
    import numpy as np

    from expo.compute import decode

    rows, columns, chance = 5760, 2880, np.random.default_rng(0)
    codes = chance.integers(0, 126, rows * columns // 2, dtype=np.uint8)
    scales = chance.random(rows * columns // 32, dtype=np.float32)
    out = np.empty(COUNT, np.float32)
    for name, block in {"blocks of 128": (128, 128), "rows": (1, 7168)}.items():
        yield (
            f"fp8, {name}",
            lambda b=block: decode.fp8(codes[:COUNT], scales, 0, 2048, 7168, b, out=out),
        )
    yield "mxfp4", lambda: decode.mxfp4(codes, scales, COUNT * 50, rows, columns, out=out)


def _two_models() -> Iterator[tuple[str, Callable[[], object]]]:
    import numpy as np

    from expo.compute import kernels

    values = (np.random.default_rng(0).standard_normal((4, COUNT)) * 0.02).astype(np.float32)
    a, b, c, d = values
    stored = {
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "F16": values.astype(np.float16).view(np.int16),
        "F32": values,
    }
    drawn = kernels.draws(0, "a.weight", 0)
    for dtype, pair in stored.items():
        out = np.empty_like(pair[0])
        for rounding, draws in (("nearest", None), ("stochastic", drawn)):
            yield (
                f"extrapolate, {dtype}, {rounding}",
                lambda p=pair, o=out, r=draws: kernels.extrapolate(p[0], p[1], 1.5, out=o, draws=r),
            )
    brain, wide, out = stored["BF16"], np.empty(COUNT, np.float32), np.empty(COUNT, np.uint16)
    yield "finish, BF16", lambda: kernels.finish(a, b, delta=c, still=d, out=out, draws=None)
    yield "compare, BF16", lambda: kernels.compare(brain[0], brain[1])
    yield "widen, BF16", lambda: kernels.widen(brain[0], wide)
    yield "store, BF16", lambda: kernels.store(a, out, draws=None)


def _preparations() -> Iterator[tuple[str, Callable[[], object]]]:
    import numpy as np

    from expo.compute import kernels, masks, measures

    delta, other = np.random.default_rng(0).standard_normal((2, COUNT)).astype(np.float32) * 1e-3
    drawn = kernels.draws(0, "a.weight", 0)
    random = masks.random_mask(drawn, 0.5)
    yield "magnitude_mask", lambda: masks.magnitude_mask(delta, 0.5)
    yield (
        "ranked_mask, rows of 4,096",
        lambda: masks.ranked_mask(delta, 4096, drawn=drawn, density=0.5, epsilon=0.1),
    )
    yield "magnitude_sums, random", lambda: masks.magnitude_sums(delta, random, begin=0)
    yield "arc_sums, F32", lambda: measures.arc_sums(delta, other)
    yield "ulp_square_sum", lambda: measures.ulp_square_sum(delta, "BF16")


def _several_models() -> Iterator[tuple[str, Callable[[], object]]]:
    import numpy as np

    from expo.compute import kernels, masks, mixing

    start, base, *others = np.random.default_rng(0).standard_normal((4, COUNT)).astype(np.float32)
    thetas, out, halves = np.array(others), np.empty(COUNT, np.float32), [0.5, 0.5]
    drawn, delta = kernels.draws(0, "a.weight", 0), others[0] - base
    kinds = {
        "no mask": masks.Mask(),
        "magnitude": masks.magnitude_mask(delta, 0.5),
        "random": masks.random_mask(drawn, 0.5),
        "ranked": masks.ranked_mask(delta, 4096, drawn=drawn, density=0.5, epsilon=0.1),
    }
    for kind, mask in kinds.items():
        both = masks.masks([mask, mask])
        for elect in (False, True):
            add = partial(
                mixing.add_terms, start, base, thetas, halves, both, begin=0, elect_sign=elect,
                normalize=True, scale=1.0, exact_out=out, delta_out=None,
            )  # fmt: skip
            yield f"add_terms of two, {kind}{', signs elected' * elect}", add


if __name__ == "__main__":
    main()
