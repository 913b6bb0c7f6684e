"""The one read of every shard: SHA-256, the values' range, and the aligned model's beside them."""

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.dtypes import FLOATS
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.checkpoint.names import is_embedding
from expo.checkpoint.reader import Bytes, FileReader, read_buffer
from expo.errors import CheckpointError
from expo.threads import Crew, Flow, side_by_side
from expo.verification.beside import Beside, as_floats
from expo.verification.check import Check, Info
from expo.verification.subject import Subject, Sums, TensorFacts, Values

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 16 << 20
_SHARDS = 2  # at a time, each with two threads: one reads and looks, one hashes

Progress = Callable[[int, int], None]


@dataclass
class _Seen:
    """What is known of one tensor so far."""

    is_zero: bool = True
    nonfinite: int = 0
    largest: float = 0.0
    live_rows: "np.ndarray | None" = None
    sums: Sums | None = None

    def values(self) -> Values:
        dead = () if self.live_rows is None else np.flatnonzero(~self.live_rows).tolist()
        return Values(self.largest, tuple(dead), self.sums)


@dataclass
class _Scan:
    """What is known of one shard so far, of its tensors and of the aligned model's beside them."""

    shard: Shard
    beside: Beside
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    failure: str | None = None
    mine: dict[str, _Seen] = field(default_factory=dict)
    theirs: dict[str, _Seen] = field(default_factory=dict)

    def facts(self) -> TensorFacts:
        whole = self.failure is None
        file = self.shard.file
        return TensorFacts(
            {file: self.digest.hexdigest()} if whole else {},
            () if self.failure is None else (self.failure,),
            {name: seen.nonfinite for name, seen in self.mine.items() if seen.nonfinite},
            frozenset(name for name, seen in self.mine.items() if whole and seen.is_zero),
            {name: seen.values() for name, seen in self.mine.items() if whole},
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
        for begin, nbytes in _cuts(scan.shard):
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


def _cuts(shard: Shard) -> Iterator[tuple[int, int]]:
    """(begin, bytes) of chunks that split no element."""
    begin = 0
    while begin < shard.file_bytes:
        end = min(begin + _CHUNK_BYTES, shard.file_bytes)
        for tensor in shard.tensors:
            if tensor.begin < end < tensor.begin + tensor.nbytes:
                end -= (end - tensor.begin) % tensor.item_bytes
        yield begin, end - begin
        begin = end


def _look(begin: int, chunk: Bytes, scan: _Scan) -> None:
    """Note what the parts of tensors in this chunk hold."""
    for tensor in scan.shard.tensors:
        start = max(tensor.begin, begin)
        stop = min(tensor.begin + tensor.nbytes, begin + chunk.size)
        if start >= stop:
            continue
        seen = scan.mine.setdefault(tensor.name, _Seen())
        part = chunk[start - begin : stop - begin]
        if tensor.dtype not in FLOATS:
            seen.is_zero &= not part.any()
            continue
        first = (start - tensor.begin) // tensor.item_bytes
        values = as_floats(part, tensor.dtype)
        _note(seen, tensor, first, values)
        _compare(scan, tensor, first, values)


def _note(seen: _Seen, tensor: TensorInfo, first: int, values: "torch.Tensor") -> None:
    lowest, highest = (bound.item() for bound in values.aminmax())
    if math.isfinite(lowest) and math.isfinite(highest):  # a NaN shows in both
        seen.is_zero &= lowest == highest == 0
        seen.largest = max(seen.largest, -lowest, highest)
    else:
        seen.is_zero = False
        seen.nonfinite += int((~values.isfinite()).sum())
    if is_embedding(tensor.name) and len(tensor.shape) == 2:
        if seen.live_rows is None:
            seen.live_rows = np.zeros(tensor.shape[0], dtype=np.bool_)
        _note_rows(seen.live_rows, tensor.shape[1], first, values)


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


def _compare(scan: _Scan, tensor: TensorInfo, first: int, values: "torch.Tensor") -> None:
    """Sums over this part and the aligned model's same part."""
    for at, theirs in scan.beside.pieces(tensor, first, len(values)):
        other = scan.theirs.setdefault(tensor.name, _Seen())
        _note(other, tensor, first + at, theirs)
        w, a = values[at : at + len(theirs)].float(), theirs.float()
        d = w - a
        sums = Sums(*(x.dot(y).item() for x, y in ((w, w), (a, a), (w, a), (d, d))))
        seen = scan.mine[tensor.name]
        seen.sums = sums if seen.sums is None else seen.sums + sums


def readable(s: Subject) -> Iterator[str]:
    yield from s.scanned.failures


def finite(s: Subject) -> Iterator[str]:
    for name, count in s.scanned.nonfinite.items():
        yield f"{printable(name)} holds {count} values that are NaN or infinite"


def all_zero(s: Subject) -> Iterator[str]:
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
    return weight.update is None and not any(part.strip(b"\0") for part in parts)


CHECKS = (
    Check("readable", "error", "every weight file can be read to its end", "copy the file again, from a disk that works", readable),
    Check("finite", "error", "every value is a finite number", "run the merge again; if it stays, the aligned model is damaged", finite),
    Check("all-zero", "error", "no weight is all zero", "run the merge again; compare with expo diff", all_zero),
)  # fmt: skip
