"""One worker's view of the inputs: ranges of weights, block by block, in stored form or widened."""

import threading
from collections import OrderedDict, defaultdict
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.codes import Scales
from expo.checkpoint.dtypes import TORCH_NAMES
from expo.checkpoint.files import Files
from expo.checkpoint.reader import Bytes, Reader, Room, aligned_buffer, read_buffer
from expo.checkpoint.weight import LastScales, Weight
from expo.compute.ahead import ReadAhead, Steps
from expo.compute.arithmetic import Arithmetic, Coded, Stored
from expo.operators.methods import Array
from expo.planning.chunks import BLOCK_ELEMENTS
from expo.planning.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from expo.checkpoint.headers import TensorInfo


def fetch(plan: Plan) -> None:
    """Bring every input to this disk before anything is written or read."""
    fetch_weights(*plan.sources.values())
    for sidecar in plan.sidecars:
        if not sidecar.files.is_local(sidecar.name):
            sidecar.files.local_path(sidecar.name)


def fetch_weights(*checkpoints: Checkpoint) -> None:
    """Bring the weights of models to this disk, unless they are read where they lie."""
    for checkpoint in checkpoints:
        for files, shard in checkpoint.inputs():
            if not files.is_local(shard.file) and not files.streams:
                files.local_path(shard.file)


_MATRICES = 8
"""Of codes that workers share: those at hand of both sides, and the next ones."""


class Readers:
    """A reader for every file of a run, opened when first needed and shared by all workers.

    What is not on this disk is fetched ahead of those that `expect` it.
    """

    def __init__(self) -> None:
        self._readers: dict[tuple[int, str], Reader] = {}
        self._lock = threading.Lock()
        self._ahead: ReadAhead | None = None
        self._matrices: OrderedDict[tuple[int, int], Future[Bytes]] = OrderedDict()

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for reader in self._readers.values():
            reader.close()

    def expect(self, steps: Steps) -> None:
        """What is going to be read, in this order; each step is to be said `done`."""
        ahead = ReadAhead(steps, self._direct)
        if not ahead.is_idle:
            self._ahead = ahead
            ahead.start()

    def done(self, step: int) -> None:
        if self._ahead is not None:
            self._ahead.done(step)

    def end(self) -> None:
        """Fetch nothing more; whoever waits for a server is let go."""
        if self._ahead is not None:
            self._ahead.end()

    def reader(self, files: Files, name: str) -> Reader:
        ahead = None if self._ahead is None else self._ahead.reader(files, name)
        return self._direct(files, name) if ahead is None else ahead

    def matrix(self, weight: Weight, begin: int) -> Bytes:
        """The matrix of codes that begins at a byte of its file: read once, though several pieces and workers take it
        one soon after the other.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        key = id(weight), begin
        with self._lock:
            is_mine = key not in self._matrices
            shared = self._matrices.setdefault(key, Future())
            if len(self._matrices) > _MATRICES:
                self._matrices.popitem(last=False)
        if is_mine:
            try:
                shared.set_result(self._whole_matrix(weight, begin))
            except BaseException as error:  # which all who wait for it raise
                shared.set_exception(error)
        return shared.result()

    def _whole_matrix(self, weight: Weight, begin: int) -> Bytes:
        assert weight.codes is not None
        nbytes = weight.codes.whole_bytes
        reader, buffer = self.reader(weight.files, weight.stored.file), read_buffer(nbytes)
        found = reader.open_range(begin, nbytes, buffer)
        if found is None:
            found = buffer[:nbytes]
            reader.copy(begin, found)
        # what was fetched ahead does not stay
        return found if np.may_share_memory(found, buffer) else found.copy()

    def _direct(self, files: Files, name: str) -> Reader:
        key = (id(files), name)
        with self._lock:
            if key not in self._readers:
                self._readers[key] = files.reader(name)
            return self._readers[key]


class Inputs:
    """Read buffers, one for each weight that a piece is made of, the scales of codes and the factors of adapters.

    Args:
        room: gives the memory of the buffers.
    """

    def __init__(self, readers: Readers, buffer_bytes: int, room: Room = aligned_buffer) -> None:
        self._readers, self._room = readers, room
        self.buffer_bytes = buffer_bytes
        self._buffers: dict[int, Bytes] = {}
        self._held: dict[int, tuple[Weight, int, int, Bytes]] = {}
        self._scales: dict[int, LastScales] = defaultdict(LastScales)
        self._factors: dict[int, tuple[Weight, tuple[Tensor, Tensor]]] = {}

    def open(self, weight: Weight, begin: int, count: int, *, side: int = 0) -> "Range":
        """`count` elements of a weight from `begin`; valid until the side is opened again."""
        factors = None if weight.update is None else self._factors_of(weight, side)
        scales = self._scales[side].of(weight, begin, count, self._readers.reader)
        reader = self._readers.reader(weight.files, weight.stored.file)
        at, nbytes = weight.span(begin, count)
        if weight.codes is not None and weight.codes.whole_bytes:
            buffer, whole = _NOTHING, self._matrices(weight, begin, count, side)
        else:
            buffer = self._buffer(side, nbytes)
            whole = reader.open_range(at, nbytes, buffer) if nbytes else _NOTHING
        if whole is not None and whole.ctypes.data % weight.stored.item_bytes:
            whole = whole.copy()
        return Range(weight, begin, reader, at, whole, buffer, scales, factors)

    def _matrices(self, weight: Weight, begin: int, count: int, side: int) -> Bytes:
        """The codes of all matrices that elements begin … take; the last of each side are kept."""
        assert weight.codes is not None
        at, nbytes = weight.span(begin, count)
        known = self._held.get(side)
        if known is not None and known[0] is weight and known[1:3] == (at, nbytes):
            return known[3]
        each = weight.codes.whole_bytes
        parts = [self._readers.matrix(weight, at + n) for n in range(0, nbytes, each)]
        found = parts[0] if len(parts) == 1 else np.concatenate([_NOTHING, *parts])
        self._held[side] = weight, at, nbytes, found
        return found

    def _buffer(self, side: int, nbytes: int) -> Bytes:
        known = self._buffers.get(side)
        if known is None or known.size < nbytes:
            known = self._buffers[side] = read_buffer(max(self.buffer_bytes, nbytes), self._room)
        return known

    def _factors_of(self, weight: Weight, side: int) -> "tuple[Tensor, Tensor]":
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

    def _whole(self, files: Files, info: "TensorInfo") -> "Tensor":
        import torch

        stored = np.empty(info.nbytes, dtype=np.uint8)
        self._readers.reader(files, info.file).copy(info.begin, stored)
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        return torch.frombuffer(stored.data, dtype=dtype).view(info.shape).float()


_NOTHING = np.empty(0, dtype=np.uint8)
_PRODUCT_ELEMENTS = 131_072  # of an adapter's product at a time: BLAS decides its last bits by it


class Range:
    """A run of one weight's elements, taken block by block.

    What the page cache holds is copied when a block is taken; the rest was read on opening.
    """

    def __init__(
        self,
        weight: Weight,
        begin: int,
        reader: Reader,
        at: int,
        whole: Bytes | None,
        buffer: Bytes,
        scales: Scales | None,
        factors: "tuple[Tensor, Tensor] | None",
    ) -> None:
        self.weight, self._begin, self._reader, self._at = weight, begin, reader, at
        self._whole, self._buffer, self._scales, self._factors = whole, buffer, scales, factors

    @property
    def is_as_stored(self) -> bool:
        """Whether the elements are what lies in the file: no codes, no adapter's update."""
        return self._scales is None and self._factors is None

    def stored(self, start: int, count: int) -> Stored:
        """`count` stored elements from `start`, as they lie in the file; valid until the next are taken.

        Raises:
            CheckpointError: the file ends before, or the disk fails.
        """
        item = self.weight.stored.item_bytes
        if self._whole is not None:
            data = self._whole[start * item : (start + count) * item]
        else:
            data = self._buffer[: count * item]
            self._reader.copy(self._at + start * item, data)
        return Stored(data, self.weight.stored.dtype)

    def load(self, start: int, values: Array, arithmetic: Arithmetic) -> None:
        """Fill `values`, in the working precision, with the elements from `start`."""
        if self.weight.codes is None or self._scales is None:
            arithmetic.widen(self.stored(start, values.size), values)
        else:
            coded = Coded(self._codes(start, values.size), self._scales, self.weight.codes)
            arithmetic.decode(coded, self.weight.codes.within(self._begin) + start, values)
        if self._factors is not None:
            self._add_low_rank(*self._factors, self._begin + start, values)

    def _codes(self, start: int, count: int) -> Bytes:
        """Those of elements from `start`, or all that were opened where they do not lie in that order."""
        assert self.weight.codes is not None
        if self.weight.codes.whole_bytes and self._whole is not None:
            return self._whole
        return self.stored(start, count).data

    def _add_low_rank(self, left: "Tensor", right: "Tensor", begin: int, values: Array) -> None:
        """Add s·L·R to `values`, in blocks of whole rows that the tensor's shape alone decides."""
        from expo.operators.extrapolate import low_rank_product

        assert self.weight.update is not None
        width = right.shape[1]
        rows = max(_PRODUCT_ELEMENTS // width, 1)
        end = begin + values.size
        for row in range(begin // width // rows * rows, -(-end // width), rows):
            product = low_rank_product(left[row : row + rows], right, self.weight.update.scale)
            first = row * width
            start, stop = max(begin, first), min(end, first + product.numel())
            added = product.view(-1)[start - first : stop - first].numpy()
            values[start - begin : stop - begin] += added


def read_tensor(
    inputs: Inputs,
    weight: Weight,
    count: int,
    arithmetic: Arithmetic,
    *,
    first: int = 0,
    dtype: type[np.floating] = np.float32,
) -> Array:
    """`count` elements of a tensor from `first`, flat, in the working precision, its adapter's update
    included."""
    whole = np.empty(count, dtype=dtype)
    for begin, part in _parts(whole, inputs.buffer_bytes // 8):
        source = inputs.open(weight, first + begin, part.size)
        for start in range(0, part.size, BLOCK_ELEMENTS):
            source.load(start, part[start : start + BLOCK_ELEMENTS], arithmetic)
    return whole


def _parts(whole: Array, elements: int) -> "list[tuple[int, Array]]":
    step = max(elements // BLOCK_ELEMENTS, 1) * BLOCK_ELEMENTS
    return [(begin, whole[begin : begin + step]) for begin in range(0, whole.size, step)]
