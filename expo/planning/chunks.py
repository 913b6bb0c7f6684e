"""Cut a plan into chunks: stretches of the output that are read, computed and written in one go."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from expo.checkpoint.dtypes import ITEM_BYTES
from expo.checkpoint.headers import ALIGNMENT
from expo.planning.jobs import TensorJob
from expo.planning.plan import ShardPlan

BLOCK_ELEMENTS = 262_144
"""Sums are taken over blocks of this many elements of a tensor, so a piece is a multiple of it:
then they do not depend on the chunk size. The stored blocks of a pair fit a core's cache."""

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` elements of one tensor: from `begin` in the donor, from `starts` in the tensors of its rule
    (None: only the donor has them, they are copied).

    `offset` is where they go, counted in bytes from the start of the output file.
    """

    job: TensorJob
    begin: int
    starts: tuple[int, ...] | None
    count: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_BYTES[self.job.dtype]


@dataclass(slots=True)
class Chunk:
    """Pieces that follow each other in the file of shard number `shard`."""

    shard: int
    begin: int
    pieces: list[Piece] = field(default_factory=list)
    is_last: bool = False

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def cut(
    shard: ShardPlan,
    number: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    block_elements: int = BLOCK_ELEMENTS,
) -> Iterator[Chunk]:
    """The chunks of one shard, in file order. None holds more than `chunk_bytes` of any side."""
    chunk, load = Chunk(number, len(shard.header)), 0
    for piece in _pieces(shard, chunk_bytes, block_elements):
        nbytes = piece.count * _widest(piece.job)
        if chunk.pieces and load + nbytes > chunk_bytes:
            yield chunk
            chunk, load = Chunk(number, piece.offset), 0
        chunk.pieces.append(piece)
        load += nbytes
    chunk.is_last = True
    yield chunk


def buffer_bytes(chunk_bytes: int) -> int:
    """The largest piece or chunk that `cut` makes: one block at least, plus the page it starts in."""
    return max(chunk_bytes, BLOCK_ELEMENTS * 8) + ALIGNMENT


def memory_bytes(
    threads: int, chunk_bytes: int = CHUNK_BYTES, *, models: int = 2, outputs: int = 1
) -> int:
    """What a run allocates, whatever the size of the model: a read buffer a model, and scratch, a worker; of
    every output a buffer a worker, and three on their way to the disk."""
    scratch = 4 * 4 * BLOCK_ELEMENTS * max(models - 1, 1)
    buffers = threads * models + outputs * (threads + 3)
    return threads * scratch + buffers * buffer_bytes(chunk_bytes)


def _pieces(shard: ShardPlan, chunk_bytes: int, block_elements: int) -> Iterator[Piece]:
    offset = len(shard.header)
    for job in shard.jobs:
        for piece in pieces(job, offset, chunk_bytes=chunk_bytes, block_elements=block_elements):
            yield piece
            offset += piece.nbytes


def pieces(
    job: TensorJob, offset: int, *, chunk_bytes: int, block_elements: int = BLOCK_ELEMENTS
) -> Iterator[Piece]:
    """One tensor from its first element to its last; `offset` is where it goes in the file."""
    limit = max(chunk_bytes // _widest(job) // block_elements, 1) * block_elements
    for stretch in job.stretches():
        for done in range(0, stretch.count, limit):
            count = min(limit, stretch.count - done)
            starts = None if stretch.starts is None else tuple(s + done for s in stretch.starts)
            yield Piece(job, stretch.begin + done, starts, count, offset)
            offset += count * ITEM_BYTES[job.dtype]


def _widest(job: TensorJob) -> int:
    stored = [weight.stored.item_bytes for weight in job.inputs]
    return max(ITEM_BYTES[job.dtype], *stored)
