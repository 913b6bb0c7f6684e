"""The aligned model's tensors, range by range beside the folder's."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.dtypes import FLOATS, ITEM_BYTES, TORCH_NAMES
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo
from expo.checkpoint.reader import Bytes, FileReader, read_buffer
from expo.checkpoint.weight import LastScales, Weight

if TYPE_CHECKING:
    import torch

PIECE = 1 << 20  # elements at a time: what both sides need stays in the processor's cache


class Beside:
    """Reads the aligned model's files; each is opened once. Use as a context manager, in one thread."""

    def __init__(self, aligned: Checkpoint | None) -> None:
        self._aligned, self._stack = aligned, ExitStack()
        self._readers: dict[str, FileReader] = {}
        self._buffer: Bytes | None = None
        self._last: tuple[tuple[str, int, int], Bytes] | None = None
        self._scales = LastScales()

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def piece(self, tensor: TensorInfo, first: int, count: int) -> "torch.Tensor | None":
        """Elements first … first+count (at most PIECE) of the tensor of this name and shape.

        None where they cannot be read along. The next piece takes the place of this one.
        """
        weight = self._aligned.weights.get(tensor.name) if self._aligned else None
        if weight is None or weight.shape != tensor.shape or not is_beside(weight):
            return None
        return self.elements(weight, first, count)

    def elements(self, weight: Weight, first: int, count: int) -> "torch.Tensor":
        """The same of a weight that `is_beside`."""
        raw = self._read(weight, *weight.span(first, count))
        scales = self._scales.of(weight, first, count, self._reader)
        if weight.codes is None or scales is None:
            return as_floats(raw, weight.stored.dtype)
        return weight.codes.values(raw, scales, weight.codes.within(first), count)

    def _read(self, weight: Weight, begin: int, nbytes: int) -> Bytes:
        """A range of a weight's file; the last one is still there: of some codes one is read for several pieces."""
        place = weight.stored.file, begin, nbytes
        if self._last is not None and self._last[0] == place:
            return self._last[1]
        if self._buffer is None or self._buffer.size < nbytes:
            self._buffer = read_buffer(max(nbytes, PIECE * max(ITEM_BYTES.values())))
        reader = self._reader(weight.files, weight.stored.file)
        found = reader.open_range(begin, nbytes, self._buffer)
        if found is None:
            found = self._buffer[:nbytes]
            reader.copy(begin, found)
        self._last = place, found
        return found

    def _reader(self, files: Files, file: str) -> FileReader:
        if file not in self._readers:
            reader = FileReader(files.local_path(file), file)
            self._stack.callback(reader.close)
            self._readers[file] = reader
        return self._readers[file]


def is_beside(weight: Weight) -> bool:
    """Whether the values of a weight lie on this disk, without an adapter's update."""
    if weight.update is not None or not (weight.codes or weight.stored.dtype in FLOATS):
        return False
    files = [info.file for _, info in weight.parts]
    return all(map(weight.files.is_local, files))


def as_floats(part: Bytes, dtype: str) -> "torch.Tensor":
    """Bytes as the one-dimensional tensor that they are."""
    import torch

    torch.set_num_threads(1)
    kind = getattr(torch, TORCH_NAMES[dtype])
    if part.ctypes.data % kind.itemsize:
        part = part.copy()
    return torch.frombuffer(part.data, dtype=kind)
