"""The one read of every shard: SHA-256, the values' range, and the aligned model's beside them."""

import hashlib
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.dtypes import FLOATS
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.checkpoint.names import is_embedding
from expo.checkpoint.reader import Bytes, FileReader, read_buffer
from expo.checkpoint.weight import Weight
from expo.errors import CheckpointError
from expo.threads import Crew, Flow, side_by_side
from expo.verification.beside import PIECE, Beside, as_floats
from expo.verification.check import Check, Info
from expo.verification.subject import Subject, Sums, TensorFacts, Values

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 16 << 20
_SHARDS = 2  # at a time, each with two threads: one reads and looks, one hashes

Progress = Callable[[int, int], None]


@dataclass
class _Seen:
    """What is known of one tensor so far; `both` and `apart` where another lies beside it."""

    is_zero: bool = True
    nonfinite: int = 0
    largest: float = 0.0
    square: float = 0.0
    live_rows: "np.ndarray | None" = None
    both: float = 0.0
    apart: float = 0.0

    def values(self, other: "_Seen | None" = None) -> Values:
        dead = () if self.live_rows is None else np.flatnonzero(~self.live_rows).tolist()
        sums = other and Sums(self.square, other.square, self.both, self.apart)
        return Values(self.largest, math.sqrt(self.square), tuple(dead), sums)


@dataclass
class _Scan:
    """What is known of one shard so far, of its tensors and of the aligned model's beside them."""

    shard: Shard
    beside: Beside
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    failure: str | None = None
    mine: dict[str, _Seen] = field(default_factory=dict)
    theirs: dict[str, _Seen] = field(default_factory=dict)

    @cached_property
    def begins(self) -> list[int]:
        return [tensor.begin for tensor in self.shard.tensors]

    def within(self, begin: int, end: int) -> Iterator[TensorInfo]:
        """The tensors that have bytes between two places of the file."""
        for tensor in self.shard.tensors[max(0, bisect_right(self.begins, begin) - 1) :]:
            if tensor.begin >= end:
                return
            if tensor.begin + tensor.nbytes > begin:
                yield tensor

    def facts(self) -> TensorFacts:
        whole = self.failure is None
        file = self.shard.file
        return TensorFacts(
            {file: self.digest.hexdigest()} if whole else {},
            () if self.failure is None else (self.failure,),
            {name: seen.nonfinite for name, seen in self.mine.items() if seen.nonfinite},
            frozenset(name for name, seen in self.mine.items() if whole and seen.is_zero),
            {n: seen.values(self.theirs.get(n)) for n, seen in self.mine.items() if whole},
            TensorFacts({}, values={name: seen.values() for name, seen in self.theirs.items()}),
        )


def read_tensors(subject: Subject, progress: Progress | None = None) -> TensorFacts:
    """Read every weight file once, whole, and the same ranges of the aligned model's tensors."""
    shards = list(subject.shards.values())
    total = sum(shard.file_bytes for shard in shards)
    done, lock = 0, threading.Lock()

    def tick(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress:
                progress(done, total)

    scans = side_by_side(lambda shard: _scan(subject, shard, tick), shards, _SHARDS)
    return _together([scan.facts() for scan in scans])


def _together(parts: list[TensorFacts]) -> TensorFacts:
    return TensorFacts(
        {file: digest for part in parts for file, digest in part.sha256.items()},
        tuple(failure for part in parts for failure in part.failures),
        {name: count for part in parts for name, count in part.nonfinite.items()},
        frozenset().union(*(part.zero for part in parts)),
        {name: values for part in parts for name, values in part.values.items()},
        _together([part.aligned for part in parts if part.aligned]) if parts else None,
    )


def _scan(subject: Subject, shard: Shard, tick: Callable[[int], None]) -> _Scan:
    with Beside(subject.aligned) as beside:
        scan = _Scan(shard, beside)
        try:
            reader = FileReader(subject.out.local_path(shard.file), shard.file)
            try:
                _scan_chunks(reader, scan, tick)
            finally:
                reader.close()
        except CheckpointError as error:
            scan.failure = str(error)
        return scan


def _scan_chunks(reader: FileReader, scan: _Scan, tick: Callable[[int], None]) -> None:
    """This thread reads and looks, another one hashes the chunk before."""
    with Crew() as crew:
        free: Flow[Bytes] = crew.flow()
        filled: Flow[tuple[Bytes, Bytes] | None] = crew.flow()
        for _ in range(2):
            free.put(read_buffer(_CHUNK_BYTES))

        def digest() -> None:
            while (pair := filled.get()) is not None:
                scan.digest.update(pair[0].data)
                free.put(pair[1])

        crew.start(digest)
        for begin, nbytes in _cuts(scan):
            buffer = free.get()
            chunk = reader.open_range(begin, nbytes, buffer)
            if chunk is None:
                chunk = buffer[:nbytes]
                reader.copy(begin, chunk)
            filled.put((chunk, buffer))
            _look(begin, chunk, scan)
            tick(nbytes)
        filled.put(None)
        crew.wait(lambda: None)


def _cuts(scan: _Scan) -> Iterator[tuple[int, int]]:
    """(begin, bytes) of chunks that split no element."""
    begin = 0
    while begin < scan.shard.file_bytes:
        end = min(begin + _CHUNK_BYTES, scan.shard.file_bytes)
        for tensor in scan.within(end - 1, end):
            if tensor.begin < end < tensor.begin + tensor.nbytes:
                end -= (end - tensor.begin) % tensor.item_bytes
        yield begin, end - begin
        begin = end


def _look(begin: int, chunk: Bytes, scan: _Scan) -> None:
    """Note what the parts of tensors in this chunk hold."""
    for tensor in scan.within(begin, begin + chunk.size):
        start = max(tensor.begin, begin)
        stop = min(tensor.begin + tensor.nbytes, begin + chunk.size)
        part = chunk[start - begin : stop - begin]
        if tensor.dtype in FLOATS:
            first = (start - tensor.begin) // tensor.item_bytes
            _look_at_floats(scan, tensor, first, as_floats(part, tensor.dtype))
        else:
            scan.mine.setdefault(tensor.name, _Seen()).is_zero &= not part.any()


def _look_at_floats(scan: _Scan, tensor: TensorInfo, first: int, values: "torch.Tensor") -> None:
    """Note elements first … of a tensor, and the aligned model's same ones, piece by piece."""
    seen = scan.mine.setdefault(tensor.name, _Seen())
    for at in range(0, len(values), PIECE):
        part = values[at : at + PIECE]
        w = _note(seen, tensor, first + at, part)
        beside = scan.beside.piece(tensor, first + at, len(part))
        if beside is not None:
            a = _note(scan.theirs.setdefault(tensor.name, _Seen()), tensor, first + at, beside)
            seen.both += w.dot(a).item()
            d = w - a
            seen.apart += d.dot(d).item()


def _note(seen: _Seen, tensor: TensorInfo, first: int, part: "torch.Tensor") -> "torch.Tensor":
    """Note a part of a tensor, and return it as float32."""
    lowest, highest = (bound.item() for bound in part.aminmax())
    values = part.float()
    if math.isfinite(lowest) and math.isfinite(highest):  # a NaN shows in both
        seen.is_zero &= lowest == highest == 0
        seen.largest = max(seen.largest, -lowest, highest)
        seen.square += values.dot(values).item()
    else:
        seen.is_zero = False
        seen.nonfinite += int((~part.isfinite()).sum())
    if is_embedding(tensor.name) and len(tensor.shape) == 2:
        if seen.live_rows is None:
            seen.live_rows = np.zeros(tensor.shape[0], dtype=np.bool_)
        _note_rows(seen.live_rows, tensor.shape[1], first, part)
    return values


def _note_rows(live: np.ndarray, width: int, first: int, values: "torch.Tensor") -> None:
    """Mark the rows that hold anything but zero; a part may begin and end inside of a row."""
    head = min(-first % width, len(values))
    rows = (len(values) - head) // width
    tail = head + rows * width
    row = -(-first // width)
    if head and values[:head].any():
        live[row - 1] = True
    live[row : row + rows] |= (values[head:tail].view(-1, width) != 0).any(1).numpy()
    if tail < len(values) and values[tail:].any():
        live[row + rows] = True


def readable(s: Subject) -> Iterator[str]:
    yield from s.scanned.failures
    if not s.scanned.failures:
        s.require_all_read()


def finite(s: Subject) -> Iterator[str]:
    for name, count in s.scanned.nonfinite.items():
        yield f"{printable(name)} holds {count} values that are NaN or infinite"
    if not s.scanned.nonfinite:
        s.require_numbers()


def all_zero(s: Subject) -> Iterator[str]:
    if not s.scanned.zero:
        s.require_numbers()
    for name in sorted(s.scanned.zero):
        fault = f"{printable(name)} is all zero"
        is_matrix = len(s.tensors[name].shape) > 1 and not name.endswith("bias")
        if s.aligned is None:
            if is_matrix:  # a bias or a norm may well be zero
                yield fault
        elif name in s.aligned.weights:
            if not _is_zero(s.aligned.weights[name]):
                yield fault
            elif is_matrix:
                yield Info(f"{fault} (as in the aligned model)")


def _is_zero(weight: Weight) -> bool:
    stored = weight.stored
    ends = range(stored.begin, stored.begin + stored.nbytes, _CHUNK_BYTES)
    stop = stored.begin + stored.nbytes
    parts = (weight.files.read(stored.file, at, min(at + _CHUNK_BYTES, stop)) for at in ends)
    zeros = b"\0" if weight.codes is None else weight.codes.zeros
    return weight.update is None and not any(part.strip(zeros) for part in parts)


_FETCH = "copy or download the files again; if it stays, the model is damaged"
CHECKS = (
    Check("readable", "error", "every weight file can be read to its end", "copy the file again, from a disk that works", readable),
    Check("finite", "error", "every value is a finite number", "run the merge again; if it stays, the aligned model is damaged", finite, _FETCH),
    Check("all-zero", "error", "no weight is all zero", "run the merge again; compare with expo diff", all_zero, _FETCH),
)  # fmt: skip
