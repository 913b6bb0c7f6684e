"""The one engine: plans in, their bytes into sinks, from one read of the inputs; or tensor by tensor."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.dtypes import TORCH_NAMES
from expo.checkpoint.reader import Bytes, Room, aligned_buffer
from expo.compute.blending import Edited, Target
from expo.compute.choice import needs_torch
from expo.compute.devices import PROCESSOR, device_name
from expo.compute.inputs import Inputs, Readers, fetch
from expo.compute.pipeline import Output, run_pipeline
from expo.compute.preparations import Preparations
from expo.compute.preparing import Prepared
from expo.compute.worker import BlockWorker, Worker
from expo.output.sink import FinishedShard, Sink
from expo.planning.chunks import (
    BLOCK_ELEMENTS,
    CHUNK_BYTES,
    Chunk,
    Piece,
    buffer_bytes,
    cut,
    pieces,
)
from expo.planning.jobs import TensorJob
from expo.planning.plan import Plan
from expo.planning.reads import FileRange, piece_ranges
from expo.threads import DEFAULT_THREADS, Crew, PerThread, side_by_side

if TYPE_CHECKING:
    from torch import Tensor

    from expo.compute.device import Device

Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""


@dataclass(frozen=True)
class Tuning:
    """How to run. Nothing here changes a byte of the output, but that the library of a `device` takes edited matrices
    apart in its own way."""

    threads: int = DEFAULT_THREADS
    chunk_bytes: int = CHUNK_BYTES
    block_elements: int = BLOCK_ELEMENTS
    device: "Device | None" = None

    @classmethod
    def on(cls, device: str | None, threads: int = DEFAULT_THREADS) -> "Tuning":
        """To run on a device by its name.

        Raises:
            SpecError: it is no name of a device.
            ExpoError: the device is not there, or torch cannot use it.
        """
        if device is None or device_name(device) == PROCESSOR:
            return cls(threads)
        from expo.compute.device import CHUNK_BYTES, open_device

        return cls(threads, CHUNK_BYTES, device=open_device(device))

    @property
    def backend(self) -> str:
        """What decides the last bits of edited matrices."""
        return PROCESSOR if self.device is None else self.device.backend

    @property
    def room(self) -> Room:
        """Gives the memory of read and output buffers."""
        return aligned_buffer if self.device is None else self.device.buffer


def stream(
    plans: Sequence[Plan],
    sinks: Sequence[Sink],
    *,
    finished: Sequence[Sequence[FinishedShard]] = (),
    shards: Collection[int] | None = None,
    tuning: Tuning = Tuning(),
    progress: Progress | None = None,
) -> list[list[FinishedShard]]:
    """Compute the shards of every plan into its sink. The inputs are read once, whatever the number of plans.

    Args:
        plans: of one merge at several α (`Plan.at`).
        finished: by plan, the shards that its sink has already.
        shards: the numbers of those to compute; None for all.
        progress: called a few times a second.

    Returns:
        by plan, the finished shards in the order of the files.

    Raises:
        CheckpointError: an input is damaged, or a result is not finite.
        OSError: a sink cannot be written.
    """
    before = finished or [()] * len(plans)
    total = sum(plan.write_bytes for plan in plans)
    _import_what_is_needed(plans)
    with Crew() as crew, Readers() as readers:
        outputs = [Output(*one, crew) for one in zip(plans, sinks, before, strict=True)]
        left = [number for number, shard in enumerate(plans[0].shards)
                if (shards is None or number in shards) and any(o.wants(shard) for o in outputs)]  # fmt: skip

        def tick() -> None:
            if progress:
                progress(sum(output.written_bytes for output in outputs), total)

        try:
            preparations = _preparations(plans, left, tuning)
            workers = [make_worker(readers, preparations, tuning) for _ in range(tuning.threads)]
            chunks = _chunks(plans[0], left, tuning)
            readers.expect(map(_ranges, (chunk.pieces for chunk in chunks)))
            tick()
            run_pipeline(
                chunks,
                outputs,
                workers,
                crew,
                chunk_bytes=tuning.chunk_bytes,
                tick=tick,
                done=readers.done,
                room=tuning.room,
            )
        finally:
            readers.end()
            crew.stop()
            for output in outputs:
                output.close()
    return [_in_order(output) for output in outputs]


def tensors(plan: Plan, *, tuning: Tuning = Tuning()) -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) of everything that a merge would write, in its order, with the bytes that it would have.

    For a live model, whose parameters are set in place. A tensor is the caller's.

    Raises:
        CheckpointError: as `stream`.
    """
    import torch

    fetch(plan)
    preparations = _preparations([plan], range(len(plan.shards)), tuning)
    jobs = list(plan.jobs)
    with Readers() as readers:
        worker = PerThread(lambda: make_worker(readers, preparations, tuning))
        readers.expect(_ranges(_cuts(job, tuning)) for job in jobs)

        def compute(numbered: tuple[int, TensorJob]) -> Bytes:
            number, job = numbered
            data = _computed(worker(), job, plan, tuning)
            readers.done(number)
            return data

        results = side_by_side(compute, enumerate(jobs), tuning.threads)
        for job, data in zip(jobs, results, strict=True):
            dtype = getattr(torch, TORCH_NAMES[job.dtype])
            flat = (
                torch.frombuffer(data.data, dtype=dtype)
                if data.size
                else torch.empty(0, dtype=dtype)
            )
            yield job.name, flat.view(job.shape)


def _computed(worker: Worker, job: TensorJob, plan: Plan, tuning: Tuning) -> Bytes:
    """The bytes of one tensor."""
    out = np.empty(job.nbytes, np.uint8)
    for piece in _cuts(job, tuning):
        room = out[piece.offset : piece.offset + piece.nbytes]
        worker.run(piece, [Target(job, room, plan.request.rounding, plan.request.seed)])
    return out


def _cuts(job: TensorJob, tuning: Tuning) -> Iterator[Piece]:
    return pieces(job, 0, chunk_bytes=tuning.chunk_bytes, block_elements=tuning.block_elements)


def _ranges(cuts: Iterable[Piece]) -> Iterator[FileRange]:
    return (one for piece in cuts for one in piece_ranges(piece))


def _import_what_is_needed(plans: Sequence[Plan]) -> None:
    """torch before threads start, where a tensor takes it: they set it to one thread each."""
    if any(needs_torch(job) for job in plans[0].jobs):
        import_module("torch")


def make_worker(
    readers: Readers, preparations: "Preparations[Prepared | Edited] | None", tuning: Tuning
) -> Worker:
    """Of the device that is to be used."""
    inputs = Inputs(readers, buffer_bytes(tuning.chunk_bytes), tuning.room)
    if tuning.device is None:
        return BlockWorker(inputs, preparations, block_elements=tuning.block_elements)
    from expo.compute.device_worker import DeviceWorker

    return DeviceWorker(inputs, tuning.device, preparations, block_elements=tuning.block_elements)


def _preparations(
    plans: Sequence[Plan], shards: Iterable[int], tuning: Tuning
) -> "Preparations[Prepared | Edited]":
    jobs = (job for n in shards for plan in plans for job in plan.shards[n].jobs)
    return Preparations(jobs, ahead=tuning.threads - 1)


def _chunks(plan: Plan, shards: Iterable[int], tuning: Tuning) -> list[Chunk]:
    sizes = {"chunk_bytes": tuning.chunk_bytes, "block_elements": tuning.block_elements}
    return [chunk for number in shards for chunk in cut(plan.shards[number], number, **sizes)]


def _in_order(output: Output) -> list[FinishedShard]:
    by_file = {shard.file: shard for shard in output.finished}
    return [by_file[shard.file] for shard in output.plan.shards if shard.file in by_file]
