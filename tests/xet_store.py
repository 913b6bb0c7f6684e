"""A Xet store in a folder, which hf_xet itself writes (`local://`): which files it holds."""

from collections.abc import Iterator
from pathlib import Path

_ENTRY = 48
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


def xet_hashes(store: Path) -> dict[str, str]:
    """Xet hash by SHA-256 of every file whose shard was registered."""
    shards = store.glob("xet/xorbs/shards/*.mdb")
    return {sha256: xet for shard in shards for sha256, xet in _files(shard.read_bytes())}


def _files(raw: bytes) -> Iterator[tuple[str, str]]:
    """The file section of a shard: entries of 48 bytes, each file's after its header."""
    at = _ENTRY
    while raw[at : at + 32] != b"\xff" * 32:
        xet, at = raw[at : at + 32], at
        flags, entries = (int.from_bytes(raw[at + n : at + n + 4], "little") for n in (32, 36))
        at += _ENTRY * (1 + entries * (2 if flags & _HAS_VERIFICATION else 1))
        if flags & _HAS_SHA256:
            yield _hex(raw[at : at + 32]), _hex(xet)
            at += _ENTRY


def _hex(raw: bytes) -> str:
    """Four little-endian numbers, as Xet writes its hashes."""
    words = (int.from_bytes(raw[n : n + 8], "little") for n in range(0, 32, 8))
    return "".join(f"{word:016x}" for word in words)
