"""Byte ranges of weight files: from the page cache where they are in it, else around it.

What was cached stays cached; what was not is read with O_DIRECT and so never enters the cache.
Where O_DIRECT is refused (tmpfs, some network filesystems, macOS) the read is buffered and the
pages it brought in are dropped again, where the system has posix_fadvise.
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expo.checkpoint.headers import ALIGNMENT
from expo.errors import CheckpointError

Bytes = NDArray[np.uint8]

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_MOSTLY_CACHED = 0.75  # from here on, filling the gaps costs less than reading it all again
_SLACK = 2 * ALIGNMENT  # a range that starts and ends inside a page takes up to two pages more


def aligned_buffer(nbytes: int) -> Bytes:
    """Anonymous memory that starts on a page, as direct I/O wants it, and grows only when used."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def read_buffer(nbytes: int) -> Bytes:
    """A buffer for `FileReader.open_range` of up to `nbytes`."""
    return aligned_buffer(nbytes + _SLACK)


class Reader(Protocol):
    """Ranges of one file, wherever it lies; safe to share between threads."""

    def open_range(self, begin: int, nbytes: int, buffer: Bytes) -> Bytes | None:
        """Bytes begin … begin+nbytes, in `buffer` or where they are; None where it is better to `copy` them
        in small pieces, just before they are used: then they are still in the processor's cache.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        ...

    def copy(self, begin: int, target: Bytes) -> None:
        """Fill `target` with the bytes from `begin`. Raises as `open_range`."""
        ...

    def close(self) -> None: ...


class FileReader:
    """Reads ranges of one file on this disk."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._file_bytes = os.fstat(self._fd).st_size
            if hasattr(
                os, "posix_fadvise"
            ):  # no read-ahead: it would bring in what nobody asked for
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._map = mmap.mmap(self._fd, self._file_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error
        self._map_address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        self._direct_fd = open_direct(path, os.O_RDONLY)
        self._reads_direct = self._direct_fd is not None

    def close(self) -> None:
        os.close(self._fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)

    def open_range(self, begin: int, nbytes: int, buffer: Bytes) -> Bytes | None:
        """As `Reader`; None where the page cache holds them."""
        pages = self._cached_pages(begin, nbytes)
        if pages.all():
            return None
        try:
            if self._reads_direct and self._direct_fd is not None and pages.mean() < _MOSTLY_CACHED:
                return self._read_direct(self._direct_fd, begin, nbytes, buffer)
            self._fill(self._fd, buffer[:nbytes], begin, nbytes)
            self._drop_pages(begin, pages)
            return buffer[:nbytes]
        except OSError as error:
            raise self._unreadable(error) from error

    def copy(self, begin: int, target: Bytes) -> None:
        """As `Reader`, by way of the page cache."""
        try:
            if os.preadv(self._fd, [target.data], begin) != target.size:
                self._fill(self._fd, target, begin, target.size)
        except OSError as error:
            raise self._unreadable(error) from error

    def _read_direct(self, fd: int, begin: int, nbytes: int, buffer: Bytes) -> Bytes:
        start = begin - begin % ALIGNMENT
        span = -(-(begin + nbytes - start) // ALIGNMENT) * ALIGNMENT
        try:
            self._fill(fd, buffer[:span], start, begin + nbytes - start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._reads_direct = False  # the filesystem took the flag, but not the read
            self._fill(self._fd, buffer[:nbytes], begin, nbytes)
            return buffer[:nbytes]
        return buffer[begin - start : begin - start + nbytes]

    def _fill(self, fd: int, view: Bytes, begin: int, needed: int) -> None:
        done = 0
        while done < needed:
            count = os.preadv(fd, [view[done:].data], begin + done)
            if count == 0:
                raise CheckpointError(
                    f"{self._name} was cut short while it was read: download it again"
                )
            done += count

    def _cached_pages(self, begin: int, nbytes: int) -> NDArray[np.bool_]:
        start = begin - begin % mmap.PAGESIZE
        pages = np.zeros(-(-(begin + nbytes - start) // mmap.PAGESIZE), dtype=np.uint8)
        if _mincore(self._map_address + start, begin + nbytes - start, pages.ctypes.data):
            return np.zeros(len(pages), dtype=np.bool_)
        return (pages & 1).astype(np.bool_)

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._name} cannot be read: {error.strerror}")

    def _drop_pages(self, begin: int, cached: NDArray[np.bool_]) -> None:
        """Drop the pages that were not cached before they were read."""
        if not hasattr(os, "posix_fadvise"):
            return
        edges = np.flatnonzero(np.diff(np.concatenate(([True], cached, [True])).astype(np.int8)))
        page = mmap.PAGESIZE
        for first, last in edges.reshape(-1, 2).tolist():
            start = begin // page * page + first * page
            os.posix_fadvise(self._fd, start, (last - first) * page, os.POSIX_FADV_DONTNEED)


def open_direct(path: Path, flags: int) -> int | None:
    """A descriptor for direct I/O, or None where system or filesystem have none."""
    if not _O_DIRECT:
        return None
    try:
        return os.open(path, flags | os.O_CLOEXEC | _O_DIRECT)
    except OSError:
        return None


def _mincore(address: int, nbytes: int, vector: int) -> int:
    return _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_void_p(vector))


_LIBC = ctypes.CDLL(None, use_errno=True)
