"""The child process for what can hang, swell or crash: regular expressions and pickles of others.

Run as a script, by path. It imports nothing of expo and nothing that is installed, sees no variable of its
parent's environment and no file but through its parent: it reads requests from stdin and answers on stdout,
one JSON value a line. Arguments: the task (`match`, `unpickle`), its bytes of memory, its seconds of computing.
"""

import io
import json
import pickle
import re
import resource
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

_BUFFER_BYTES = 1 << 16
_PICKLE_BYTES = 64 << 20
_RECORD, _RECORD_BYTES = b"PK\3\4", 30  # of a zip archive: what precedes a file's name


def main() -> None:
    _limit(*map(int, sys.argv[2:]))
    {"match": _match, "unpickle": _unpickle}[sys.argv[1]]()


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    for name, value in (("AS", memory_bytes), ("CPU", cpu_seconds), ("CORE", 0), ("NOFILE", 16)):
        with suppress(ValueError, OSError):  # where the system knows no such limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _match() -> None:
    """{"patterns", "texts"}: of every pattern the numbers of the texts that it is found in."""
    request = json.load(sys.stdin)
    for pattern in request["patterns"]:
        try:
            search = re.compile(pattern).search
            _say([number for number, text in enumerate(request["texts"]) if search(text)])
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            _say(str(error) or type(error).__name__)


def _unpickle() -> None:
    """The tensors of a `.bin` file: what they are, and where their storages lie."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_Parents(), _BUFFER_BYTES)) as archive:
            _say(list(_tensors(archive)))
    except _RefusedError as refused:
        _say(str(refused))
    except Exception:  # whatever it is, the file is no such archive
        _say("is damaged or in torch's format from before 1.6")


class _RefusedError(Exception):
    """What the file holds that no state dict does."""


class _Parents(io.RawIOBase):
    """The file, which the parent reads: a line asks for a range, 8 bytes of length and the bytes answer."""

    def __init__(self) -> None:
        self._at, self._size = 0, json.loads(sys.stdin.buffer.readline())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        if self._at < 0:
            raise OSError("before the file")
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        end = max(self._at, min(self._at + len(buffer), self._size))
        _say({"read": [self._at, end]})
        (length,) = struct.unpack("<Q", sys.stdin.buffer.read(8))
        buffer[:length] = sys.stdin.buffer.read(length)
        self._at += length
        return length


def _tensors(archive: zipfile.ZipFile) -> Iterator[tuple]:
    """(name, dtype, shape, stride, first element, begin of the storage, its bytes)"""
    [name] = [n for n in archive.namelist() if n.endswith("data.pkl") and n.count("/") <= 1]
    prefix = name.removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.NameToInfo and _content(archive, order) != b"little":
        raise _RefusedError("holds numbers in the order of another processor (big-endian)")
    state = _Unpickler(io.BytesIO(_content(archive, name))).load()
    if not isinstance(state, dict):
        raise _RefusedError(f"holds a {type(state).__name__}, not a state dict")
    for name, value in dict.items(state):
        if not isinstance(name, str):
            raise _RefusedError(f"names a tensor by a {type(name).__name__}")
        if not isinstance(value, _Tensor):
            raise _RefusedError(f"holds {name[:100]}, a {type(value).__name__}, beside its tensors")
        kind, key = value.storage
        begin, nbytes = _place(archive, f"{prefix}data/{key}")
        dtype = value.dtype or kind
        yield name, dtype, list(value.shape), list(value.stride), value.first, begin, nbytes


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    begin, nbytes = _place(archive, name)
    if nbytes > _PICKLE_BYTES or archive.fp is None:
        raise _RefusedError(f"holds a pickle of {nbytes} bytes")
    archive.fp.seek(begin)
    return archive.fp.read(nbytes)


def _place(archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """Where a record lies: (first byte, bytes). torch compresses none."""
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED or archive.fp is None:
        raise _RefusedError("is compressed, which torch reads none of")
    archive.fp.seek(record.header_offset)
    head = archive.fp.read(_RECORD_BYTES)
    if not head.startswith(_RECORD):
        raise ValueError("no record there")
    return record.header_offset + len(head) + sum(struct.unpack("<HH", head[-4:])), record.file_size


class _Storage(NamedTuple):
    """A storage by its key, and the dtype that torch wrote it as."""

    dtype: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str = ""


def _tensor(storage: _Storage, first: int, shape: tuple, stride: tuple, *_: object) -> _Tensor:
    return _Tensor(storage, first, shape, stride)


def _tensor_of_dtype(storage: _Storage, first: int, shape: tuple, stride: tuple, _grad: object,
                     _hooks: object, dtype: str, *_: object) -> _Tensor:  # fmt: skip
    return _Tensor(storage, first, shape, stride, dtype)


def _parameter(data: object, *_: object) -> object:
    return data


def _of_type(make: Callable, _type: object, arguments: tuple, *_: object) -> object:
    return make(*arguments)


_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16",
    "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "complex64",
    "complex128",
)  # fmt: skip
_KNOWN: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch.nn.parameter", "Parameter"): "Parameter",
    ("torch.storage", "UntypedStorage"): "untyped",
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", dtype): dtype for dtype in _DTYPES},
}
"""Every name that a pickle may use, and what stands for it here: no code of torch's runs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        if (module, name) not in _KNOWN:
            raise _RefusedError("holds more than tensors and could run code, refused")
        return _KNOWN[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), *_):
                return _Storage(dtype, key)
        raise ValueError("no storage")


if __name__ == "__main__":
    main()
