"""The aligned model's tensors, range by range beside the folder's."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.dtypes import FLOATS, ITEM_BYTES, TORCH_NAMES
from expo.checkpoint.headers import TensorInfo
from expo.checkpoint.reader import Bytes, FileReader, read_buffer
from expo.checkpoint.weight import Weight

if TYPE_CHECKING:
    import torch

PIECE = 1 << 20  # elements at a time: what both sides need stays in the processor's cache


class Beside:
    """Reads the aligned model's files; each is opened once. Use as a context manager, in one thread."""

    def __init__(self, aligned: Checkpoint | None) -> None:
        self._aligned, self._stack = aligned, ExitStack()
        self._readers: dict[str, FileReader] = {}
        self._buffer: Bytes | None = None

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
        stored, size = weight.stored, ITEM_BYTES[weight.stored.dtype]
        return as_floats(
            self._read(weight, stored.begin + first * size, count * size), stored.dtype
        )

    def _read(self, weight: Weight, begin: int, nbytes: int) -> Bytes:
        file = weight.stored.file
        if file not in self._readers:
            reader = FileReader(weight.files.local_path(file), file)
            self._stack.callback(reader.close)
            self._readers[file] = reader
        if self._buffer is None:
            self._buffer = read_buffer(PIECE * max(ITEM_BYTES.values()))
        found = self._readers[file].open_range(begin, nbytes, self._buffer)
        if found is None:
            found = self._buffer[:nbytes]
            self._readers[file].copy(begin, found)
        return found


def is_beside(weight: Weight) -> bool:
    """Whether the values of a weight lie on this disk as they are."""
    stored = weight.stored
    return weight.update is None and stored.dtype in FLOATS and weight.files.is_local(stored.file)


def as_floats(part: Bytes, dtype: str) -> "torch.Tensor":
    """Bytes as the one-dimensional tensor that they are."""
    import torch

    torch.set_num_threads(1)
    kind = getattr(torch, TORCH_NAMES[dtype])
    if part.ctypes.data % kind.itemsize:
        part = part.copy()
    return torch.frombuffer(part.data, dtype=kind)
