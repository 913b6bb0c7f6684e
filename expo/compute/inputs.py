"""The input files of a run: opened once, read by range into one worker's buffers."""

import threading

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.dtypes import TORCH_NAMES
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo
from expo.checkpoint.reader import Bytes, FileReader, read_buffer
from expo.operators.extrapolate import low_rank_product
from expo.planning.chunks import BLOCK_ELEMENTS
from expo.planning.plan import Plan


def fetch(plan: Plan) -> None:
    """Bring every input to this disk before anything is written."""
    for checkpoint in plan.sources.values():
        for files, shard in checkpoint.inputs():
            files.local_path(shard.file)
    for sidecar in plan.sidecars:
        sidecar.files.local_path(sidecar.name)


class OpenFiles:
    """Every file that a run reads, opened when first needed and shared by all workers."""

    def __init__(self) -> None:
        self._readers: dict[tuple[int, str], FileReader] = {}
        self._lock = threading.Lock()

    def reader(self, files: Files, name: str) -> FileReader:
        key = (id(files), name)
        with self._lock:
            if key not in self._readers:
                label = f"{files.label}/{name}"
                self._readers[key] = FileReader(files.local_path(name), label)
            return self._readers[key]

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()


class Sources:
    """One worker's view of the inputs: a read buffer for each side, made when first needed."""

    def __init__(self, files: OpenFiles, buffer_bytes: int) -> None:
        self._files = files
        self.buffer_bytes = buffer_bytes
        self._buffers: dict[int, Bytes] = {}
        self._factors: dict[int, tuple[Weight, tuple[Tensor, Tensor]]] = {}
        self._fronts: dict[tuple[int, torch.dtype, int], tuple[Bytes, Tensor]] = {}

    def open(self, weight: Weight, begin: int, count: int, *, side: int) -> "Stretch":
        """`count` stored elements from `begin`; valid until the side is opened again."""
        return Stretch(self, weight, begin, count, side)

    def reader(self, files: Files, name: str) -> FileReader:
        return self._files.reader(files, name)

    def buffer(self, side: int) -> Bytes:
        if side not in self._buffers:
            self._buffers[side] = read_buffer(self.buffer_bytes)
        return self._buffers[side]

    def front(self, side: int, dtype: torch.dtype, count: int) -> tuple[Bytes, Tensor]:
        """The first `count` elements of a side's buffer, as bytes and as a tensor."""
        key = (side, dtype, count)
        if key not in self._fronts:
            stored = self.buffer(side)[: count * dtype.itemsize]
            self._fronts[key] = (stored, torch.frombuffer(stored.data, dtype=dtype))
        return self._fronts[key]

    def factors(self, weight: Weight, *, side: int) -> tuple[Tensor, Tensor]:
        """L (out, r) and R (r, in) in float32 with ΔW = s·L·R; the last of each side is kept."""
        known = self._factors.get(side)
        if known is not None and known[0] is weight:
            return known[1]
        update, files = weight.update, weight.update_files
        assert update is not None
        assert files is not None
        a, b = self._whole(files, update.a), self._whole(files, update.b)
        left, right = (a.T, b.T) if update.transposed else (b, a)
        factors = left.contiguous(), right.contiguous()
        self._factors[side] = (weight, factors)
        return factors

    def _whole(self, files: Files, info: TensorInfo) -> Tensor:
        reader = self._files.reader(files, info.file)
        stored = np.empty(info.nbytes, dtype=np.uint8)
        reader.copy(info.begin, stored)
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        return torch.frombuffer(stored.data, dtype=dtype).view(info.shape).float()


class Stretch:
    """A run of one weight's stored elements, taken block by block.

    What the page cache holds is copied when a block is taken; the rest was read on opening.
    """

    def __init__(self, sources: Sources, weight: Weight, begin: int, count: int, side: int) -> None:
        stored = weight.stored
        self.dtype = torch_dtype(stored.dtype)
        self._sources, self._side = sources, side
        self._reader = sources.reader(weight.files, stored.file)
        self._begin = stored.begin + begin * stored.item_bytes
        nbytes = count * stored.item_bytes
        whole = self._reader.open_range(self._begin, nbytes, sources.buffer(side))
        self._whole = None if whole is None else typed(whole, self.dtype, count)

    def take(self, start: int, count: int) -> Tensor:
        """`count` elements from `start`; valid until the next are taken.

        Raises:
            CheckpointError: the file ends before, or the disk fails.
        """
        if self._whole is not None:
            return self._whole[start : start + count]
        stored, values = self._sources.front(self._side, self.dtype, count)
        self._reader.copy(self._begin + start * self.dtype.itemsize, stored)
        return values


def torch_dtype(dtype: str) -> torch.dtype:
    return getattr(torch, TORCH_NAMES[dtype])


def typed(stored: Bytes, dtype: torch.dtype, count: int) -> Tensor:
    """A tensor over `stored`, or over a copy where its address does not suit the dtype."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if stored.ctypes.data % dtype.itemsize:
        stored = stored.copy()
    return torch.frombuffer(stored.data, dtype=dtype, count=count)


def typed_output(out: Bytes, dtype: torch.dtype, count: int) -> Tensor:
    """A tensor over `out`, or beside it where the address does not suit the dtype."""
    if count == 0 or out.ctypes.data % dtype.itemsize:
        return torch.empty(count, dtype=dtype)
    return torch.frombuffer(out.data, dtype=dtype, count=count)


class Side:
    """One model's part of a piece, brought to the working precision block by block."""

    def __init__(
        self, sources: Sources, weight: Weight, begin: int, count: int, *, side: int
    ) -> None:
        self._weight, self._begin = weight, begin
        self._stretch = sources.open(weight, begin, count, side=side)
        self._factors = None if weight.update is None else sources.factors(weight, side=side)

    @property
    def dtype(self) -> torch.dtype:
        return self._stretch.dtype

    def load(self, start: int, values: Tensor) -> None:
        """Fill `values` with the elements from `start` of this piece."""
        values.copy_(self._stretch.take(start, values.numel()))
        if self._factors is not None:
            self._add_low_rank(*self._factors, self._begin + start, values)

    def _add_low_rank(self, left: Tensor, right: Tensor, begin: int, values: Tensor) -> None:
        """Add s·L·R to `values`, in blocks of whole rows that the tensor's shape alone decides."""
        assert self._weight.update is not None
        width = right.shape[1]
        rows = max(BLOCK_ELEMENTS // width, 1)
        end = begin + values.numel()
        for row in range(begin // width // rows * rows, -(-end // width), rows):
            product = low_rank_product(left[row : row + rows], right, self._weight.update.scale)
            first = row * width
            start, stop = max(begin, first), min(end, first + product.numel())
            values[start - begin : stop - begin] += product.view(-1)[start - first : stop - first]


def working_dtype(*sides: Side) -> torch.dtype:
    double = any(side.dtype == torch.float64 for side in sides)
    return torch.float64 if double else torch.float32


def read_tensor(
    sources: Sources,
    weight: Weight,
    shape: tuple[int, ...],
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The elements of a tensor from `first` that fill `shape`, in the working precision, its
    adapter's update included."""
    whole = torch.empty(shape, dtype=dtype)
    flat = whole.view(-1)
    step = max(sources.buffer_bytes // 8 // BLOCK_ELEMENTS, 1) * BLOCK_ELEMENTS
    for begin in range(0, flat.numel(), step):
        count = min(step, flat.numel() - begin)
        side = Side(sources, weight, first + begin, count, side=0)
        for start in range(0, count, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, count)
            side.load(start, flat[begin + start : begin + stop])
    return whole
