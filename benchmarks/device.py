"""What a device does for expo: pairs over its bus, matrices by its library, whole runs, each beside what bounds it.

    python -m benchmarks.device                      # all of it, on the first CUDA device
    python -m benchmarks.device --device cuda:1 --only matrices --runs 5
    python -m benchmarks.device --device cpu --small # torch's kernels on this processor in its place: the overhead

`pairs` takes bfloat16 pairs from page-locked memory through the worker and back, by one to four threads, and beside
them the same copies without a kernel in between. `matrices` are lent from this machine's memory one by one, and three
at a time. `runs` are whole processes, warm, outputs compared byte by byte where nothing is edited.
"""

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.low_rank import (
    RANK,
    at_rank,
    decaying,
    gram_values,
    relative,
    spiked,
    usual_threshold,
)
from benchmarks.merge import make_pair, set_cache
from expo.checkpoint.memory import state_dict_checkpoint
from expo.compute.blending import Target
from expo.compute.decompositions import Decompositions
from expo.compute.device import CHUNK_BYTES, Device
from expo.compute.devices import usable
from expo.compute.inputs import Inputs, Readers
from expo.compute.stream import Tuning, make_worker
from expo.operators.rules import parse_keep
from expo.planning.build import plan_of
from expo.planning.chunks import Piece, buffer_bytes, pieces
from expo.planning.plan import Plan
from expo.spec.request import Operand, Request, Slice
from expo.threads import PerThread, side_by_side

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("pairs", "matrices", "runs"))
    parser.add_argument("--small", action="store_true", help="an eighth of every side")
    parser.add_argument("--folder", type=Path, help="where to make the pair of `runs`")
    arguments = parser.parse_args()
    device = Device(usable(arguments.device))
    print(f"{device.backend}, {torch.get_num_threads()} threads here")
    kinds = {
        "pairs": lambda: pairs(device, arguments.runs, small=arguments.small),
        "matrices": lambda: matrices(device, arguments.runs, small=arguments.small),
        "runs": lambda: runs(arguments.device, arguments.folder, small=arguments.small),
    }
    for kind, compare in kinds.items():
        if arguments.only in (None, kind):
            compare()


def pairs(device: Device, rounds: int, *, small: bool) -> None:
    """Through the worker and back; the copies alone; the processor's worker."""
    plan = pair_in_memory(device, 1 << (26 if small else 29))
    moved = 3 * sum(job.nbytes for job in plan.jobs)
    print("\n| pairs | threads | GB/s over the bus: median (min – max) | of the copies alone |\n|---|---|---|---|")  # fmt: skip
    for threads in (1, 2, 3, 4):
        ways: dict[str, Callable[[], object]] = {
            "copies alone": lambda n=threads: copies(plan, device, n),
            "on the device": lambda n=threads: through(plan, Tuning(n, CHUNK_BYTES, device=device)),
            "on this processor": lambda n=threads: through(plan, Tuning(n, CHUNK_BYTES)),
        }
        took = interleaved(ways, rounds)
        alone = statistics.median(took["copies alone"])
        for name, seconds in took.items():
            rates = [moved / one / 1e9 for one in seconds]
            share = alone / statistics.median(seconds)
            print(f"| {name} | {threads} | {spread(rates)} | {share:.2f} |", flush=True)


def pair_in_memory(device: Device, elements: int) -> Plan:
    """Two tensors a side of bfloat16 in page-locked memory, at α 1.5."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    sides = []
    for number, label in enumerate(("SFT", "aligned")):
        tensors = {}
        for name in ("a", "b"):
            flat = torch.from_numpy(device.buffer(elements)).view(torch.bfloat16)
            flat.view(-1, 1 << 20).copy_(noise.roll(number))
            tensors[name] = flat
        sides.append(state_dict_checkpoint(tensors, label))
    slices = (Slice((Operand(sides[1].reference, {"alpha": 1.5}),)),)
    request = Request(slices, base=sides[0].reference)
    return plan_of(request, {checkpoint.reference: checkpoint for checkpoint in sides})


def cuts(plan: Plan) -> list[Piece]:
    return [piece for job in plan.jobs for piece in pieces(job, 0, chunk_bytes=CHUNK_BYTES)]


def through(plan: Plan, tuning: Tuning) -> None:
    with Readers() as readers:
        worker = PerThread(lambda: make_worker(readers, None, tuning))
        room = PerThread(lambda: tuning.room(CHUNK_BYTES))

        def one(piece: Piece) -> None:
            worker().run(piece, [Target(piece.job, room()[: piece.nbytes])])

        list(side_by_side(one, cuts(plan), tuning.threads))


def copies(plan: Plan, device: Device, threads: int) -> None:
    """What `through` moves, each piece on its thread's stream, and nothing computed."""
    room = PerThread(lambda: torch.from_numpy(device.buffer(CHUNK_BYTES)))
    there = PerThread(lambda: torch.empty(3, CHUNK_BYTES, dtype=torch.uint8, device=device.place))
    with Readers() as readers:
        inputs = PerThread(lambda: Inputs(readers, buffer_bytes(CHUNK_BYTES), device.buffer))

        def one(piece: Piece) -> None:
            with device.lane():
                for side, weight in enumerate(piece.job.inputs):
                    source = inputs().open(weight, piece.begin, piece.count, side=side)
                    data = torch.from_numpy(source.stored(0, piece.count).data)
                    there()[side, : piece.nbytes].copy_(data, non_blocking=True)
                room()[: piece.nbytes].copy_(there()[2, : piece.nbytes], non_blocking=True)

        list(side_by_side(one, cuts(plan), threads))


def matrices(device: Device, rounds: int, *, small: bool) -> None:
    """Seconds a matrix, there and back; the processor on one core; torch's SVD on the device with the same cut."""
    print(
        "\n| shape | what | way | s: median (min – max) | this over it | error |\n|---|---|---|---|---|---|"
    )
    torch.set_num_threads(1)
    for shape in SHAPES:
        rows, columns = (side // 8 for side in shape) if small else shape
        for what, matrix in (("spectrum", spiked((rows, columns))), ("mp", spiked((rows, columns))),
                             (f"rank={RANK}", decaying((rows, columns)))):  # fmt: skip
            ways, error = matrix_ways(what, matrix, device), error_of(what, matrix)
            got: dict[str, Tensor] = {}
            took = interleaved(ways, rounds, got)
            first = statistics.median(took["on the device"])
            for name, seconds in took.items():
                ratio = statistics.median(seconds) / first
                wrong = error(got[name]) if name in got else ""
                print(f"| {rows}×{columns} | {what} | {name} | {spread(seconds, 4)} | {ratio:.1f} | {wrong} |", flush=True)  # fmt: skip


def matrix_ways(what: str, matrix: Tensor, device: Device) -> dict[str, Callable[[], object]]:
    def lent(by: Decompositions) -> Tensor:
        if what == "spectrum":
            return by.singular_values(matrix)[0]
        return by.cut(matrix, parse_keep(what))[0].matrix

    def usual() -> Tensor:
        there = matrix.to(device.place)
        if what == "spectrum":
            return torch.linalg.svdvals(there).cpu()
        u, s, v = torch.linalg.svd(there, full_matrices=False)
        least = usual_threshold(s.cpu(), (matrix.shape[0], matrix.shape[1]))
        rank = int((s > least).sum()) if what == "mp" else RANK
        return ((u[:, :rank] * s[:rank]) @ v[:rank]).cpu()

    def three() -> None:
        list(side_by_side(lambda _: lent(Decompositions(device)), range(3), 3))

    return {
        "on the device": lambda: lent(Decompositions(device)),
        "three at a time, all three": three,
        "on this processor": lambda: lent(Decompositions()),
        "torch.linalg.svd on the device": usual,
    }


def error_of(what: str, matrix: Tensor) -> Callable[[Tensor], str]:
    """Of values over the first one; of a part to float64's; of a small rank the residual over the best."""
    if what == "mp":
        part = at_rank(matrix.double(), RANK)
        return lambda got: f"{relative(got, part):.1e}"
    exact = gram_values(matrix)
    if what == "spectrum":
        return lambda got: f"{float((got.double() - exact).abs().max() / exact[0]):.1e}"
    best = float(exact[RANK:].square().sum().sqrt())
    return lambda got: f"+{100 * (float((matrix.double() - got.double()).norm()) / best - 1):.3f} %"


def runs(device: str, folder: Path | None, *, small: bool) -> None:
    """Whole processes, one each."""
    root = Path(tempfile.mkdtemp(prefix="expo-bench-", dir=folder))
    try:
        sft, aligned = make_pair(root, 3e8 if small else 2e9)
        set_cache("warm", (sft, aligned))
        python = [sys.executable, "-m", "expo"]
        out = root / "out"
        jobs = {
            "extrapolate": [*python, "extrapolate", sft, aligned, out, "--alpha", "1.5", "-q", "--no-verify"],
            "laser, rank=64": [*python, "laser", aligned, out, "--keep", "rank=64", "--target", "layers.0", "-q", "--no-verify"],
            "spectrum": [*python, "spectrum", aligned, "--minus", sft, "--target", "layers.0", "-q"],
            "extract-lora": [*python, "extract-lora", aligned, out, "--minus", sft, "--rank", "64", "-q"],
        }  # fmt: skip
        print("\n| run | device | s | bytes of the output |\n|---|---|---|---|")
        for name, command in jobs.items():
            for where in ("cpu", device):
                started = time.perf_counter()
                subprocess.run([*map(str, command), "--device", where], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
                seconds = time.perf_counter() - started
                print(f"| {name} | {where} | {seconds:.1f} | {digest(out)} |", flush=True)
                shutil.rmtree(out, ignore_errors=True)
    finally:
        shutil.rmtree(root)


def digest(out: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12] if out.exists() else ""


def interleaved(
    ways: dict[str, Callable[[], object]], rounds: int, got: dict[str, Tensor] | None = None
) -> dict[str, list[float]]:
    """Seconds of every way, after one round that is not counted."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            result = way()
            seconds = time.perf_counter() - started
            if number:
                took[name].append(seconds)
            if got is not None and isinstance(result, Tensor):
                got[name] = result
    return took


def spread(values: Sequence[float], digits: int = 2) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
