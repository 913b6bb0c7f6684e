"""Legacy `pytorch_model*.bin` files, described like safetensors so that one reader serves both.

A `.bin` is a zip of raw storages and one pickle that says which tensor lies in which storage.
Only that pickle is loaded here (restricted to tensors, storages mapped, never read); the data is
then read from the byte offsets it names, like any other shard.
"""

import hashlib
import io
import pickle
from typing import NoReturn

from expo.checkpoint.dtypes import BY_TORCH_NAME
from expo.checkpoint.files import Files
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.errors import CheckpointError

_READ_BYTES = 1 << 16
_CONVERT = "convert it with transformers' save_pretrained on a machine that trusts it"


def read_pickle(files: Files, file: str) -> Shard:
    """Describe the tensors of a `.bin` file; of one on the Hub only the zip's index and the pickle
    are fetched.

    Raises:
        CheckpointError: it is not torch's zip format, holds more than tensors, or a tensor is not
            contiguous in its storage.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        # Under fake tensors torch notes each storage's offset in the file and reads no data.
        with FakeTensorMode():
            if files.is_local(file):
                path = files.local_path(file)
                state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            else:
                remote = io.BufferedReader(_Remote(files, file), _READ_BYTES)
                state = torch.load(remote, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        _refuse(file, f"holds more than tensors and could run code, refused; {_CONVERT}", error)
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        _refuse(file, f"is damaged or in torch's format from before 1.6; {_CONVERT}", error)
    if not isinstance(state, dict):
        _refuse(file, f"holds a {type(state).__name__}, not a state dict")
    size = files.sizes[file]
    tensors = [
        _describe(file, str(name), value, size)
        for name, value in state.items()
        if isinstance(value, torch.Tensor) or _refuse_value(file, str(name), value)
    ]
    tensors.sort(key=lambda tensor: tensor.begin)
    digest = hashlib.sha256(repr(tensors).encode()).hexdigest()
    return Shard(file, {"format": "pt"}, tuple(tensors), size, digest)


class _Remote(io.RawIOBase):
    """A file that is read by range as torch's zip reader seeks about in it."""

    def __init__(self, files: Files, file: str) -> None:
        self._files, self._file, self._at = files, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._files.sizes[self._file]}
        self._at = origin[whence] + offset
        return self._at

    def readinto(self, buffer) -> int:
        data = self._files.read(self._file, self._at, self._at + len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _describe(file: str, name: str, tensor, file_bytes: int) -> TensorInfo:
    dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        _refuse(file, f"stores {printable(name)} as {tensor.dtype}, which expo cannot add")
    if not tensor.is_contiguous():
        _refuse(file, f"stores {printable(name)} transposed or strided; {_CONVERT}")
    storage = tensor.untyped_storage()
    begin = storage._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
    info = TensorInfo(name, dtype, tuple(tensor.shape), file, begin)
    if begin + info.nbytes > file_bytes:
        _refuse(file, f"is truncated: {printable(name)} ends after the file; download it again")
    return info


def _refuse_value(file: str, name: str, value: object) -> NoReturn:
    _refuse(file, f"holds {printable(name)}, a {type(value).__name__}, beside its tensors")


def _refuse(file: str, fault: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"{printable(file)} {fault}") from cause
