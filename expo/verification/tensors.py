"""The one read of every shard, SHA-256 and the values' range in the same pass; and its checks."""

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.checkpoint.reader import Bytes, FileReader, read_buffer
from expo.errors import CheckpointError
from expo.verification.check import Check, Inherited
from expo.verification.subject import Subject, TensorFacts

_CHUNK_BYTES = 16 << 20
_SHARDS = 2  # at a time, each with two threads: one reads and looks, one hashes

Progress = Callable[[int, int], None]


@dataclass
class _Scan:
    """What is known of one shard so far. Zeros count until something else turns up."""

    file: str
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    failure: str | None = None
    nonfinite: dict[str, int] = field(default_factory=dict)
    nonzero: set[str] = field(default_factory=set)

    def note(self, name: str, is_zero: bool, nonfinite: int) -> None:
        if not is_zero:
            self.nonzero.add(name)
        if nonfinite:
            self.nonfinite[name] = self.nonfinite.get(name, 0) + nonfinite


def read_tensors(subject: Subject, progress: Progress | None = None) -> TensorFacts:
    """Read every weight file once, whole."""
    shards = list(subject.shards.values())
    total = sum(shard.file_bytes for shard in shards)
    done, lock = 0, threading.Lock()

    def tick(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress:
                progress(done, total)

    with ThreadPoolExecutor(_SHARDS) as pool:
        scans = list(pool.map(lambda shard: _scan(subject, shard, tick), shards))
    read = {scan.file for scan in scans if scan.failure is None}
    names = {t.name for shard in shards if shard.file in read for t in shard.tensors if t.count}
    return TensorFacts(
        {scan.file: scan.digest.hexdigest() for scan in scans if scan.file in read},
        tuple(scan.failure for scan in scans if scan.failure is not None),
        {name: count for scan in scans for name, count in scan.nonfinite.items()},
        frozenset(names.difference(*(scan.nonzero for scan in scans))),
    )


def _scan(subject: Subject, shard: Shard, tick: Callable[[int], None]) -> _Scan:
    scan = _Scan(shard.file)
    try:
        reader = FileReader(subject.out.local_path(shard.file), shard.file)
        try:
            _scan_chunks(reader, shard, scan, tick)
        finally:
            reader.close()
    except CheckpointError as error:
        scan.failure = str(error)
    return scan


def _scan_chunks(
    reader: FileReader, shard: Shard, scan: _Scan, tick: Callable[[int], None]
) -> None:
    """This thread reads and looks, another one hashes the chunk before."""
    buffers = [read_buffer(_CHUNK_BYTES) for _ in range(2)]
    with ThreadPoolExecutor(1) as hasher:
        pending = hasher.submit(lambda: None)
        for number, (begin, nbytes) in enumerate(_cuts(shard)):
            chunk = _read(reader, begin, nbytes, buffers[number % 2])
            pending.result()  # the hasher is done with the other buffer
            pending = hasher.submit(scan.digest.update, chunk.data)
            _look(shard.tensors, begin, chunk, scan)
            tick(nbytes)
        pending.result()


def _read(reader: FileReader, begin: int, nbytes: int, buffer: Bytes) -> Bytes:
    chunk = reader.open_range(begin, nbytes, buffer)
    if chunk is None:
        chunk = buffer[:nbytes]
        reader.copy(begin, chunk)
    return chunk


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


def _look(tensors: tuple[TensorInfo, ...], begin: int, chunk: Bytes, scan: _Scan) -> None:
    """Note which parts of tensors in this chunk hold NaN or Inf, and which anything but zero."""
    for tensor in tensors:
        start = max(tensor.begin, begin)
        stop = min(tensor.begin + tensor.nbytes, begin + chunk.size)
        if start >= stop:
            continue
        part = chunk[start - begin : stop - begin]
        if tensor.dtype not in FLOATS:
            scan.note(tensor.name, not part.any(), 0)
        else:
            scan.note(tensor.name, *_range(part, tensor))


def _range(part: Bytes, tensor: TensorInfo) -> tuple[bool, int]:
    """Whether all of `part` is zero, and how many values are NaN or infinite."""
    import torch

    torch.set_num_threads(1)
    if part.ctypes.data % tensor.item_bytes:
        part = part.copy()
    values = torch.frombuffer(part.data, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
    lowest, highest = (bound.item() for bound in values.aminmax())
    if math.isfinite(lowest) and math.isfinite(highest):  # a NaN shows in both
        return lowest == highest == 0, 0
    return False, int((~torch.isfinite(values)).sum())


def readable(s: Subject) -> Iterator[str]:
    yield from s.scanned.failures


def finite(s: Subject) -> Iterator[str]:
    for name, count in s.scanned.nonfinite.items():
        yield f"{printable(name)} holds {count} values that are NaN or infinite"


def all_zero(s: Subject) -> Iterator[str]:
    for name in sorted(s.scanned.zero):
        is_matrix = len(s.tensors[name].shape) > 1
        if s.aligned is None:
            if is_matrix:  # a bias or a norm may well be zero
                yield f"{printable(name)} is all zero"
        elif name in s.aligned.weights:
            if not _is_zero(s.aligned.weights[name]):
                yield f"{printable(name)} is all zero"
            elif is_matrix:
                yield Inherited(f"{printable(name)} is all zero")


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
