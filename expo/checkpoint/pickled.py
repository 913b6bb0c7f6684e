"""Legacy `pytorch_model*.bin` files, described like safetensors so that one reader serves both.

A `.bin` is a zip of raw storages and one pickle that says which tensor lies in which storage.
Only that pickle is read, in a child process that runs no code of torch's (`confined.py`); the data is then
read from the byte offsets it names, like any other shard.
"""

import hashlib
import math
from itertools import accumulate
from operator import mul
from typing import NoReturn

from expo.checkpoint.child import unpickle
from expo.checkpoint.dtypes import BY_TORCH_NAME
from expo.checkpoint.files import Files
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.checkpoint.parsing import shown
from expo.errors import CheckpointError

_CONVERT = "convert it with transformers' save_pretrained on a machine that trusts it"
_MOST = 1 << 62


def read_pickle(files: Files, file: str) -> Shard:
    """Describe the tensors of a `.bin` file; of one on the Hub only the zip's index, the pickle and the heads
    of the storages are fetched.

    Raises:
        CheckpointError: it is not torch's zip format, holds more than tensors, or a tensor is not
            contiguous in its storage.
    """
    size = files.sizes[file]
    try:
        found = unpickle(lambda begin, end: files.read(file, begin, end), size)
    except ValueError as error:
        _refuse(file, f"is damaged ({error}); {_CONVERT}")
    if not isinstance(found, list):
        _refuse(file, f"{printable(str(found))}; {_CONVERT}")
    tensors = sorted((_described(file, entry) for entry in found), key=lambda tensor: tensor.begin)
    digest = hashlib.sha256(repr(tensors).encode()).hexdigest()
    return Shard(file, {"format": "pt"}, tuple(tensors), size, digest)


def _described(file: str, entry: object) -> TensorInfo:
    match entry:
        case [
            str(name),
            str(dtype),
            list(shape),
            list(stride),
            int(first),
            int(begin),
            int(nbytes),
        ]:
            pass
        case _:
            _refuse(file, f"describes a tensor as {shown(entry)}; {_CONVERT}")
    if dtype not in BY_TORCH_NAME:
        _refuse(file, f"stores {printable(name)} as {printable(dtype)}, which expo cannot add")
    if not all(isinstance(n, int) and 0 <= n <= _MOST for n in (*shape, *stride, first)):
        _refuse(file, f"gives {printable(name)} the impossible shape {shown(shape)}")
    if not _is_contiguous(shape, stride):
        _refuse(file, f"stores {printable(name)} transposed or strided; {_CONVERT}")
    info = TensorInfo(name, BY_TORCH_NAME[dtype], tuple(shape), file, begin)
    first *= info.item_bytes
    if first + info.nbytes > nbytes:
        _refuse(file, f"is damaged: {printable(name)} ends after its storage; download it again")
    return TensorInfo(name, info.dtype, info.shape, file, begin + first)


def _is_contiguous(shape: list[int], stride: list[int]) -> bool:
    """As torch says: dimensions of one element, and tensors of none, may have any step."""
    steps = [*accumulate(reversed(shape[1:]), mul, initial=1)][::-1] if shape else []
    pairs = zip(shape, stride, steps, strict=False)
    return len(stride) == len(shape) and (
        math.prod(shape) == 0 or all(size == 1 or step == want for size, step, want in pairs)
    )


def _refuse(file: str, fault: str) -> NoReturn:
    raise CheckpointError(f"{printable(file)} {fault}")
