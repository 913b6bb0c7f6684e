"""`expo diff`: compare two checkpoints tensor by tensor, with the statistics of a merge."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from os import PathLike

from expo.checkpoint.reference import parse_reference
from expo.compute.inputs import Readers, fetch
from expo.compute.stream import Tuning, make_worker
from expo.compute.summary import total
from expo.operators.statistics import Sums, cosine, relative_norm
from expo.planning.build import build_plan
from expo.planning.chunks import Piece, cut
from expo.planning.jobs import Blend
from expo.planning.modules import module_of
from expo.planning.plan import Plan
from expo.planning.reads import piece_ranges
from expo.results import DeltaStatistics, DiffResult, ModuleDelta
from expo.spec.request import expo_request
from expo.threads import PerThread, side_by_side

REFERENCES = {"zephyr SFT→DPO": 6e-6, "pretrained→SFT": 2e-4}
"""‖Δ‖ RMS per element of two pairs that ExPO's paper discusses: one it helps, one it breaks."""


def diff(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    threads: int = 2,
    stream_inputs: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> DiffResult:
    """How far checkpoint `b` is from `a`: per tensor, per module, in total.

    Args:
        stream_inputs: read weights on the Hub by range, without a download.
        device: "cpu", "cuda" or "cuda:1".
        progress: called with (bytes compared, bytes in all), counted on B's side.

    Raises:
        SpecError, CheckpointError, HubError: an input cannot be used at all, or holds NaN or Inf.
        ExpoError: the device is not there.
    """
    tuning = Tuning.on(device, threads)
    pair = parse_reference(str(a), role="A"), parse_reference(str(b), role="B")
    request = expo_request(*pair, None)
    plan = build_plan(replace(request, compares=True, stream_inputs=stream_inputs))
    fetch(plan)
    sums: dict[str, Sums] = {}
    done_bytes, all_bytes = 0, sum(job.nbytes for job in plan.jobs)
    for piece, blocks in _compared(plan, tuning):
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
        references=REFERENCES if plan.donor.is_of_transformers else {},
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


def _compared(plan: Plan, tuning: Tuning) -> Iterator[tuple[Piece, list[Sums]]]:
    """Every piece that both have, with its sums, in plan order."""
    shards = enumerate(plan.shards)
    chunks = (c for n, shard in shards for c in cut(shard, n, chunk_bytes=tuning.chunk_bytes))
    pieces = [p for chunk in chunks for p in chunk.pieces if isinstance(p.job.rule, Blend)]
    with Readers() as readers:
        worker = PerThread(lambda: make_worker(readers, None, tuning))
        readers.expect(() if p.starts is None else piece_ranges(p) for p in pieces)

        def compare(numbered: tuple[int, Piece]) -> list[Sums]:
            number, piece = numbered
            sums = worker().compare(piece)
            readers.done(number)
            return sums

        results = side_by_side(compare, enumerate(pieces), tuning.threads)
        yield from zip(pieces, results, strict=True)
