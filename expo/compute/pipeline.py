"""The pipeline: workers read and compute chunks in any order, two threads an output hash and write in order.

    chunk → [worker: read, compute] × threads → ([sealer: join, SHA-256] → [writer: disk, journal]) × outputs

Every chunk owns one buffer an output from a fixed pool, from the moment a worker takes it until it is on the
disk. A worker takes the buffers first and the chunk second, so the earliest chunk always has its own.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from expo.checkpoint.headers import ALIGNMENT
from expo.checkpoint.reader import Bytes, Room, aligned_buffer
from expo.compute.blending import Target
from expo.compute.worker import PieceResult, Worker
from expo.operators.statistics import Sample, Sums
from expo.output.sink import FinishedShard, ShardFile, Sink
from expo.planning.chunks import Chunk, buffer_bytes
from expo.planning.jobs import TensorJob
from expo.planning.plan import Plan, ShardPlan
from expo.results import EditReport
from expo.threads import Crew, Flow


@dataclass(slots=True)
class Computed:
    """A chunk of one output in its buffer: the data starts `gap` bytes in, as far into its page as in the
    file."""

    chunk: Chunk
    buffer: Bytes
    results: list[PieceResult] = field(default_factory=list)

    @property
    def gap(self) -> int:
        return self.chunk.begin % ALIGNMENT

    @property
    def data(self) -> Bytes:
        return self.buffer[self.gap : self.gap + self.chunk.nbytes]


@dataclass(slots=True)
class Sealed:
    """Whole pages ready for the disk; `sha256` comes with the last of a shard."""

    computed: Computed
    offset: int
    pages: Bytes
    sha256: str | None


class Output:
    """One plan on its way into its sink: the threads that hash and write what workers hand over."""

    def __init__(
        self, plan: Plan, sink: Sink, finished: Sequence[FinishedShard], crew: Crew
    ) -> None:
        self.plan, self._sink, self.finished = plan, sink, list(finished)
        self.written_bytes = sum(shard.file_bytes for shard in finished)
        self._done_files = {shard.file for shard in finished}
        self._jobs: dict[str, TensorJob] = {job.name: job for job in plan.jobs}
        self.free: Flow[Bytes] = crew.flow()
        self.computed: Flow[tuple[int, Computed | None]] = crew.flow()
        self._sealed: Flow[Sealed | None] = crew.flow()
        self._file: ShardFile | None = None
        self._clear()

    def wants(self, shard: ShardPlan) -> bool:
        return shard.file not in self._done_files

    def target(self, job: TensorJob, out: Bytes) -> Target:
        request = self.plan.request
        return Target(self._jobs[job.name], out, request.rounding, request.seed)

    def seal(self, last: int) -> None:
        """Hash chunks 0 … last in file order, and move what follows the last whole page to the next."""
        digest, carry, fresh = hashlib.sha256(), b"", True
        for computed in self._in_order(last):
            if fresh:
                digest = hashlib.sha256(self.plan.shards[computed.chunk.shard].header)
            computed.buffer[: computed.gap] = np.frombuffer(carry, dtype=np.uint8)
            digest.update(computed.data.data)
            end = computed.gap + computed.chunk.nbytes
            whole = end - end % ALIGNMENT
            fresh = computed.chunk.is_last
            if fresh and end > whole:
                computed.buffer[end : whole + ALIGNMENT] = 0
                whole += ALIGNMENT
            carry = b"" if fresh else computed.buffer[whole:end].tobytes()
            offset = computed.chunk.begin - computed.gap
            sha256 = digest.hexdigest() if fresh else None
            self._sealed.put(Sealed(computed, offset, computed.buffer[:whole], sha256))
        self._sealed.put(None)

    def drain(self) -> None:
        """Write what is sealed, and record every shard that is whole."""
        while (sealed := self._sealed.get()) is not None:
            self._write(sealed)
            self.free.put(sealed.computed.buffer)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _in_order(self, last: int) -> Iterator[Computed]:
        waiting: dict[int, Computed | None] = {}
        for number in range(last + 1):
            while number not in waiting:
                done, computed = self.computed.get()
                waiting[done] = computed
            following = waiting.pop(number)
            if following is not None:  # None: this output has the shard already
                yield following

    def _write(self, sealed: Sealed) -> None:
        shard = self.plan.shards[sealed.computed.chunk.shard]
        if self._file is None:
            self._file = self._sink.open(shard)
            self._file.write(0, _in_pages(shard.header))
            self.written_bytes += len(shard.header)
            self._clear()
        self._file.write(sealed.offset, sealed.pages)
        self.written_bytes += sealed.computed.chunk.nbytes
        for result in sealed.computed.results:
            self._add(result)
        if sealed.sha256 is not None:
            self._file.finish()
            self._file = None
            done = FinishedShard(
                shard.file,
                shard.file_bytes,
                sealed.sha256,
                self._sums,
                self._samples,
                tuple(self._edits),
            )
            self._sink.record(done)
            self.finished.append(done)

    def _clear(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._samples: dict[str, Sample] = {}
        self._edits: list[EditReport] = []

    def _add(self, result: PieceResult) -> None:
        name = result.job.name
        for block in result.blocks:
            self._sums[name] = self._sums.get(name, Sums()).plus(block)
        if result.sample is not None:
            self._samples[name] = result.sample
        self._edits += result.edits


def run_pipeline(
    chunks: Sequence[Chunk],
    outputs: Sequence[Output],
    workers: Sequence[Worker],
    crew: Crew,
    *,
    chunk_bytes: int,
    tick: Callable[[], None],
    done: Callable[[int], None] = lambda _: None,
    room: Room = aligned_buffer,
) -> None:
    """Bring every chunk into every output that wants its shard.

    Args:
        done: called with the number of each chunk that is computed.
        room: gives the memory of the outputs' buffers.

    Raises:
        the first failure of any thread; whatever interrupts `tick` or this thread.
    """
    for output in outputs:
        for _ in range(len(workers) + 3):
            output.free.put(room(buffer_bytes(chunk_bytes) + ALIGNMENT))
    numbered, lock = enumerate(chunks), threading.Lock()

    def work(worker: Worker) -> None:
        while True:
            buffers = [output.free.get() for output in outputs]
            with lock:
                number, chunk = next(numbered, (-1, None))
            if chunk is None:
                return
            _compute(worker, chunk, number, list(zip(outputs, buffers, strict=True)))
            done(number)

    for worker in workers:
        crew.start(lambda worker=worker: work(worker))
    for output in outputs:
        crew.start(lambda output=output: output.seal(len(chunks) - 1))
        crew.start(output.drain)
    crew.wait(tick)


def _compute(
    worker: Worker, chunk: Chunk, number: int, outputs: Sequence[tuple[Output, Bytes]]
) -> None:
    wanting = []
    for output, buffer in outputs:
        if output.wants(output.plan.shards[chunk.shard]):
            wanting.append((output, Computed(chunk, buffer)))
        else:
            output.free.put(buffer)
            output.computed.put((number, None))
    at = chunk.begin % ALIGNMENT
    for piece in chunk.pieces:
        end = at + piece.nbytes
        targets = [output.target(piece.job, done.buffer[at:end]) for output, done in wanting]
        for (_, done), result in zip(wanting, worker.run(piece, targets), strict=True):
            done.results.append(result)
        at = end
    for output, done in wanting:
        output.computed.put((number, done))


def _in_pages(header: bytes) -> Bytes:
    pages = aligned_buffer(len(header))
    pages[:] = np.frombuffer(header, dtype=np.uint8)
    return pages
