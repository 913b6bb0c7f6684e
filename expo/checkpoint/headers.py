"""The safetensors header: read strictly, laid out exactly.

The format is 8 bytes of little-endian length, that many bytes of JSON, then the data. The data
offsets start at 0 and leave neither holes nor a tail (https://github.com/huggingface/safetensors).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from expo.checkpoint.dtypes import ITEM_BYTES
from expo.checkpoint.parsing import parse_json, shown
from expo.errors import CheckpointError

_AGAIN = "download it again"
MAX_HEADER_BYTES = 100_000_000
_MOST = 1 << 62  # bytes or elements: what counts them has 64 bits
_MOST_DIMENSIONS = 64  # torch's own limit
ALIGNMENT = 4096
"""Data of our own shards starts on this boundary, so that direct I/O works from the first byte."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `begin` is its first byte, counted from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.count * self.item_bytes


@dataclass(frozen=True)
class Shard:
    """One weight file: its tensors in the order of their data."""

    file: str
    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    header_sha256: str


def printable(text: str, limit: int = 200) -> str:
    """A name from a file, safe for a terminal: control characters escaped, length bounded."""
    clean = re.sub(r"[^\x20-\x7e\u00a0-\u024f]", lambda m: ascii(m[0])[1:-1], text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def header_bytes(first8: bytes, file: str, file_bytes: int) -> int:
    """The length of the JSON header, from the first 8 bytes of a file of `file_bytes` bytes.

    Raises:
        CheckpointError: the file cannot hold such a header.
    """
    if len(first8) < 8:
        _refuse(file, f"is {file_bytes} bytes long, too short for a safetensors header: {_AGAIN}")
    length = int.from_bytes(first8, "little")
    if length > MAX_HEADER_BYTES:
        _refuse(
            file,
            f"is not safetensors: a header of {length} bytes, the format allows {MAX_HEADER_BYTES}; {_AGAIN}",
        )
    if 8 + length > file_bytes:
        _refuse(file, f"claims a header of {length} bytes but the file has {file_bytes}: {_AGAIN}")
    return length


def parse_header(raw: bytes, file: str, file_bytes: int, *, name: str | None = None) -> Shard:
    """Check the JSON header `raw` of a file and return its tensors in data order.

    Args:
        name: what the shard is called, where messages call its file otherwise.

    Raises:
        CheckpointError: the header is not valid, or its offsets overlap, leave holes, or do not
            end where the file ends.
    """
    entries = _load_json(raw, file)
    metadata = entries.pop("__metadata__", {})
    if not _is_string_map(metadata):
        _refuse(file, "has a __metadata__ that is not a map of strings")
    start = 8 + len(raw)
    spans = sorted((_entry(file, *one) for one in entries.items()), key=_by_offset)
    ends = [0, *(end for *_, end in spans)]
    for (tensor, _, _, begin, _), previous_end in zip(spans, ends, strict=False):
        if begin != previous_end:
            fault = "overlaps the tensor before it" if begin < previous_end else "follows a hole"
            at = f"starts at {begin}, expected {previous_end}"
            _refuse(file, f"is damaged, {printable(tensor)} {fault}: {at}; {_AGAIN}")
    if start + ends[-1] != file_bytes:
        fault = "is truncated" if start + ends[-1] > file_bytes else "has trailing bytes"
        sizes = f"the header describes {start + ends[-1]} bytes, the file has {file_bytes}"
        _refuse(file, f"{fault}: {sizes}; {_AGAIN}")
    name = name or file
    tensors = tuple(TensorInfo(n, d, s, name, start + begin) for n, d, s, begin, _ in spans)
    return Shard(name, metadata, tensors, file_bytes, hashlib.sha256(raw).hexdigest())


def layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, int]:
    """The header of a shard with `tensors` (name, dtype, shape) in this order, and its data bytes.

    The JSON is padded with spaces, which the format allows, so that the data starts on a
    multiple of ALIGNMENT.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw, end


def _load_json(raw: bytes, file: str) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        names = sorted(name for name, _ in pairs)
        for name, following in pairwise(names):
            if name == following:
                _refuse(file, f"names {printable(name)} twice in its header")
        return dict(pairs)

    try:
        entries = parse_json(raw, pairs=unique)
    except ValueError as error:
        _refuse(file, f"has a header that is not JSON ({error}): {_AGAIN}")
    if not isinstance(entries, dict):
        _refuse(file, "has a header that is not a JSON object")
    return entries


def _entry(file: str, name: str, entry: object) -> tuple[str, str, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            _refuse(file, f"describes {printable(name)} without dtype, shape and data_offsets")
    if dtype not in ITEM_BYTES:
        _refuse(
            file,
            f"stores {printable(name)} as {printable(dtype)}, which expo cannot add; "
            "dequantize the model to bfloat16 first",
        )
    if len(shape) > _MOST_DIMENSIONS or not all(_is_size(size) for size in shape):
        _refuse(file, f"gives {printable(name)} the impossible shape {shown(shape)}")
    if not 0 <= begin <= end <= _MOST or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        _refuse(
            file,
            f"gives {printable(name)} {shown(end - begin)} bytes, not {shown(shape)} × {dtype}",
        )
    return name, dtype, tuple(shape), begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _by_offset(span: tuple[str, str, tuple[int, ...], int, int]) -> tuple[int, int]:
    return span[3], span[4]


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _refuse(file: str, fault: str) -> NoReturn:
    raise CheckpointError(f"{printable(file)} {fault}")
