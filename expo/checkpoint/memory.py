"""State dicts in memory as checkpoints: the same headers, names and ranges that files have."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.checkpoint import SINGLE, Checkpoint
from expo.checkpoint.dtypes import BY_TORCH_NAME
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.checkpoint.quantized import coding
from expo.checkpoint.reader import Bytes, Reader
from expo.checkpoint.reference import Location, Reference
from expo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_VOCABULARY = "vocab.json"


class MemoryReader:
    """Ranges of bytes that are in memory: views of them, never copies."""

    def __init__(self, data: Bytes, name: str) -> None:
        self._data, self._name = data, name

    def open_range(self, begin: int, nbytes: int, buffer: Bytes) -> Bytes:
        self._check(begin + nbytes)
        return self._data[begin : begin + nbytes]

    def copy(self, begin: int, target: Bytes) -> None:
        self._check(begin + target.size)
        target[:] = self._data[begin : begin + target.size]

    def close(self) -> None:
        pass

    def _check(self, end: int) -> None:
        if end > self._data.size:
            raise CheckpointError(f"{self._name} was cut short while it was read")


@dataclass(frozen=True)
class Memory:
    """Named bytes, as `Files`."""

    label: str
    contents: Mapping[str, Bytes]
    commit: None = None
    streams: bool = False

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: data.size for name, data in self.contents.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return self.contents[name][start:stop].tobytes()

    def local_path(self, name: str) -> Path:
        raise CheckpointError(f"{self.label}: {name} is in memory, not on a disk")

    def is_local(self, name: str) -> bool:
        return True

    def reader(self, name: str) -> Reader:
        return MemoryReader(self.contents[name], f"{self.label}/{name}")

    def identity(self, name: str) -> dict[str, str | int]:
        return {"sha256": hashlib.sha256(self.contents[name].data).hexdigest()}


def state_dict_checkpoint(
    tensors: "Mapping[str, Tensor]", label: str, vocabulary: Mapping[str, int] | None = None
) -> Checkpoint:
    """A state dict as a checkpoint. Tensors are used where they are, if they are contiguous on the CPU.

    Args:
        vocabulary: ids by token, as a tokenizer's `get_vocab()` has them.

    Raises:
        CheckpointError: a tensor is of a dtype that cannot be merged, or codes lack their scales.
    """
    contents = {name: _bytes(tensor) for name, tensor in tensors.items()}
    infos = tuple(TensorInfo(name, _dtype(name, t, label), tuple(t.shape), name, 0) for name, t in tensors.items())  # fmt: skip
    if vocabulary is not None:
        raw = json.dumps(dict(vocabulary)).encode()
        contents[_VOCABULARY] = np.frombuffer(raw, dtype=np.uint8)
    size = sum(info.nbytes for info in infos)
    shard = Shard(SINGLE, {"format": "pt"}, infos, size, "")
    place = Reference(Location(repo_id=label)), Memory(label, contents)
    return Checkpoint(*place, (shard,), {}, coding=coding(label, [shard], {}))


def _dtype(name: str, tensor: "Tensor", label: str) -> str:
    dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(
            f"{printable(name)} is {tensor.dtype} in {label}, which expo cannot add"
        )
    return dtype


def _bytes(tensor: "Tensor") -> Bytes:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
