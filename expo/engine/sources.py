"""The input files of a run: opened once, read by range into one worker's buffers."""

import threading

import torch
from torch import Tensor

from expo.checkpoint.adapter import LowRank
from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.dtypes import TORCH_NAMES
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo
from expo.checkpoint.reader import Bytes, FileReader, read_buffer


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
    """One worker's view of the inputs: two read buffers, one for each side."""

    def __init__(self, files: OpenFiles, buffer_bytes: int) -> None:
        self._files = files
        self._buffers = (read_buffer(buffer_bytes), read_buffer(buffer_bytes))
        self._factors: dict[LowRank, tuple[Tensor, Tensor]] = {}

    def read(self, weight: Weight, begin: int, count: int, *, side: int) -> Bytes:
        """The stored bytes of `count` elements from `begin`; valid until the side's next read."""
        stored = weight.stored
        reader = self._files.reader(weight.files, stored.file)
        item = stored.item_bytes
        return reader.read(stored.begin + begin * item, count * item, self._buffers[side])

    def factors(self, weight: Weight) -> tuple[Tensor, Tensor]:
        """L (out, r) and R (r, in) in float32 with ΔW = s·L·R."""
        update = weight.update
        assert update is not None
        assert weight.update_files is not None
        if update not in self._factors:
            a = self._whole(weight.update_files, update.a)
            b = self._whole(weight.update_files, update.b)
            self._factors.clear()  # the pieces of one tensor follow each other
            left_right = (a.T, b.T) if update.transposed else (b, a)
            self._factors[update] = (left_right[0].contiguous(), left_right[1].contiguous())
        return self._factors[update]

    def _whole(self, files: Files, info: TensorInfo) -> Tensor:
        reader = self._files.reader(files, info.file)
        stored = reader.read(info.begin, info.nbytes, read_buffer(info.nbytes)).copy()
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        return torch.frombuffer(stored.data, dtype=dtype).view(info.shape).float()
