"""The pipeline: workers read and compute chunks in any order, two threads hash and write in order.

    chunk → [worker: read, compute] × threads → [sealer: join, SHA-256] → [writer: disk, journal]

Every chunk owns one buffer from a fixed pool from the moment a worker takes it until it is on the
disk. A worker takes the buffer first and the chunk second, so the earliest chunk always has one.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from expo.checkpoint.headers import ALIGNMENT
from expo.checkpoint.reader import Bytes, aligned_buffer
from expo.compute.worker import Kernel, PieceResult
from expo.planning.chunks import Chunk, buffer_bytes

_POLL_SECONDS = 0.2

T = TypeVar("T")


class Stopped(Exception):
    """Another thread failed or the user interrupted: leave quietly."""


class Flow(Generic[T]):
    """A queue between two threads that gives up when the run stops."""

    def __init__(self, stop: threading.Event) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._stop = stop

    def put(self, item: T) -> None:
        self._queue.put(item)

    def get(self) -> T:
        while not self._stop.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
        raise Stopped


@dataclass(slots=True)
class Computed:
    """A chunk in its buffer: the data starts `gap` bytes in, as far into its page as in the file."""

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


class Pipeline:
    """Runs chunks through the threads. `write` gets every sealed chunk, in file order."""

    def __init__(
        self,
        chunks: Iterator[Chunk],
        headers: Callable[[int], bytes],
        kernels: list[Kernel],
        write: Callable[[Sealed], None],
        *,
        chunk_bytes: int,
        hashing: bool = True,
    ) -> None:
        self._chunks = enumerate(chunks)
        self._headers = headers
        self._kernels = kernels
        self._write = write
        self._hashing = hashing
        self._stop = threading.Event()
        self._done = threading.Event()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._free: Flow[Bytes] = Flow(self._stop)
        self._computed: Flow[tuple[int, Computed | None]] = Flow(self._stop)
        self._sealed: Flow[Sealed | None] = Flow(self._stop)
        for _ in range(len(kernels) + 3):
            self._free.put(aligned_buffer(buffer_bytes(chunk_bytes) + ALIGNMENT))

    def run(self, tick: Callable[[], None]) -> None:
        """Run to the end, calling `tick` now and then from this thread.

        Raises:
            the first failure of any thread; whatever interrupts `tick` or this thread.
        """
        targets = [lambda k=kernel: self._work(k) for kernel in self._kernels]
        threads = [
            threading.Thread(target=self._guarded, args=(target,), daemon=True)
            for target in (*targets, self._seal, self._drain)
        ]
        for thread in threads:
            thread.start()
        try:
            while not self._done.wait(_POLL_SECONDS / 2):
                tick()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        tick()

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that runs the pipeline
            with self._lock:
                self._failure = self._failure or error
            self._done.set()

    def _work(self, kernel: Kernel) -> None:
        torch.set_num_threads(1)  # of this thread; two contend for the same cores
        while True:
            buffer = self._free.get()
            with self._lock:
                number, chunk = next(self._chunks, (-1, None))
            if chunk is None:
                self._free.put(buffer)
                self._computed.put((number, None))
                return
            computed = Computed(chunk, buffer)
            at = computed.gap
            for piece in chunk.pieces:
                computed.results.append(kernel.run(piece, buffer[at : at + piece.nbytes]))
                at += piece.nbytes
            self._computed.put((number, computed))

    def _in_order(self) -> Iterator[Computed]:
        waiting: dict[int, Computed] = {}
        following = ended = 0
        while ended < len(self._kernels):
            number, computed = self._computed.get()
            if computed is None:
                ended += 1
                continue
            waiting[number] = computed
            while following in waiting:
                yield waiting.pop(following)
                following += 1

    def _seal(self) -> None:
        """Hash in file order, and move the bytes after the last whole page to the next chunk."""
        digest = hashlib.sha256()
        carry = b""
        fresh = True
        for computed in self._in_order():
            if fresh:
                header = self._headers(computed.chunk.shard)
                digest = hashlib.sha256(header)
            computed.buffer[: computed.gap] = np.frombuffer(carry, dtype=np.uint8)
            if self._hashing:
                digest.update(computed.data.data)
            end = computed.gap + computed.chunk.nbytes
            whole = end - end % ALIGNMENT
            fresh = computed.chunk.is_last
            if fresh and end > whole:
                computed.buffer[end : whole + ALIGNMENT] = 0
                whole += ALIGNMENT
            carry = b"" if fresh else computed.buffer[whole:end].tobytes()
            sha256 = digest.hexdigest() if fresh else None
            offset = computed.chunk.begin - computed.gap
            self._sealed.put(Sealed(computed, offset, computed.buffer[:whole], sha256))
        self._sealed.put(None)

    def _drain(self) -> None:
        while (sealed := self._sealed.get()) is not None:
            self._write(sealed)
            self._free.put(sealed.computed.buffer)
        self._done.set()
