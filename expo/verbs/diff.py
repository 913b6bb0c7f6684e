"""Compare two checkpoints tensor by tensor: the statistics of a merge, without writing a model."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from expo.compute.inputs import OpenFiles, Sources
from expo.compute.summary import total
from expo.compute.worker import Kernel
from expo.operators.statistics import Sums, cosine, relative_norm
from expo.planning.chunks import CHUNK_BYTES, Piece, buffer_bytes, cut
from expo.planning.modules import module_of
from expo.planning.plan import Plan

REFERENCES = {"zephyr SFT→DPO": 6e-6, "pretrained→SFT": 2e-4}
"""‖Δ‖ RMS per element of two pairs that ExPO's paper discusses: one it helps, one it breaks."""


@dataclass(frozen=True)
class DeltaStatistics:
    """How far B is from A. Norms are Frobenius norms, `delta_rms` is per element."""

    elements: int
    delta_norm: float
    delta_rms: float
    relative_delta: float | None
    zero_share: float | None
    cosine: float | None


@dataclass(frozen=True)
class ModuleDelta:
    """One module of one layer; layer is None outside the layers."""

    layer: int | None
    module: str
    statistics: DeltaStatistics


@dataclass(frozen=True)
class DiffResult:
    """`missing` is only in B, `extra` only in A, `mismatched` differs in shape or kind."""

    a: str
    b: str
    total: DeltaStatistics
    tensors: dict[str, DeltaStatistics]
    modules: tuple[ModuleDelta, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]
    references: dict[str, float]
    notes: tuple[str, ...]

    @property
    def same_structure(self) -> bool:
        return not (self.missing or self.extra or self.mismatched)


def run_diff(
    plan: Plan, *, threads: int = 2, progress: Callable[[int, int], None] | None = None
) -> DiffResult:
    """Read both sides of a plan once.

    Args:
        progress: called with (bytes compared, bytes in all), counted on B's side.

    Raises:
        CheckpointError: an input cannot be read, or holds NaN or Inf.
    """
    sums: dict[str, Sums] = {}
    done_bytes, all_bytes = 0, sum(job.nbytes for job in plan.jobs)
    for piece, blocks in _compared(plan, threads):
        for block in blocks:
            sums[piece.job.name] = sums.get(piece.job.name, Sums()).plus(block)
        done_bytes += piece.nbytes
        if progress:
            progress(done_bytes, all_bytes)
    modules: dict[tuple[int | None, str], Sums] = {}
    for name, more in sums.items():
        key = module_of(name)
        modules[key] = modules.get(key, Sums()).plus(more)
    return DiffResult(
        a=plan.sources["sft"].label,
        b=plan.donor.label,
        total=_delta_statistics(total(sums.values())),
        tensors={name: _delta_statistics(value) for name, value in sums.items()},
        modules=tuple(ModuleDelta(*key, _delta_statistics(s)) for key, s in modules.items()),
        missing=plan.missing,
        extra=plan.extra,
        mismatched=plan.mismatched,
        references=REFERENCES,
        notes=plan.notes,
    )


def _delta_statistics(sums: Sums) -> DeltaStatistics:
    return DeltaStatistics(
        elements=int(sums.elements),
        delta_norm=math.sqrt(sums.delta_square),
        delta_rms=math.sqrt(sums.delta_square / sums.elements) if sums.elements else 0.0,
        relative_delta=relative_norm(sums.delta_square, sums.base_square),
        zero_share=sums.zeros / sums.elements if sums.elements else None,
        cosine=cosine(sums),
    )


def _compared(plan: Plan, threads: int) -> Iterator[tuple[Piece, list[Sums]]]:
    """Every extrapolated piece with its sums, in plan order."""
    files, local = OpenFiles(), threading.local()

    def prepare() -> None:
        torch.set_num_threads(1)
        sources = Sources(files, buffer_bytes(CHUNK_BYTES))
        local.kernel = Kernel(sources, rounding="nearest", seed=0)

    pieces = [
        piece
        for number, shard in enumerate(plan.shards)
        for chunk in cut(shard, number)
        for piece in chunk.pieces
        if piece.job.action == "extrapolate"
    ]
    pool = ThreadPoolExecutor(threads, initializer=prepare)
    try:
        results = pool.map(lambda piece: local.kernel.compare(piece), pieces)
        yield from zip(pieces, results, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
        files.close()
