"""Byte ranges of weight files: from the page cache where they are in it, else around it.

What was cached stays cached; what was not is read with O_DIRECT and so never enters the cache.
Where O_DIRECT is refused (tmpfs, some network filesystems, macOS) the read is buffered and the
pages it brought in are dropped again, where the system has posix_fadvise.
"""

import ctypes
import errno
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expo.checkpoint.headers import ALIGNMENT
from expo.errors import CheckpointError

Bytes = NDArray[np.uint8]

Room = Callable[[int], Bytes]
"""Gives so many bytes of memory, which start on a page."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_MOSTLY_CACHED = 0.75  # from here on, filling the gaps costs less than reading it all again
_SLACK = 2 * ALIGNMENT  # a range that starts and ends inside a page takes up to two pages more


def aligned_buffer(nbytes: int) -> Bytes:
    """Anonymous memory that starts on a page, as direct I/O wants it, and grows only when used."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def read_buffer(nbytes: int, room: Room = aligned_buffer) -> Bytes:
    """A buffer for `FileReader.open_range` of up to `nbytes`, in memory that `room` gives."""
    return room(nbytes + _SLACK)


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
    """Reads ranges of one file on this disk, which is open while it is in use, and as long after as there is room.

    Raises:
        CheckpointError: it cannot be read, or is not the file that it was.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._identity: tuple[int, ...] | None = None
        self._reads_direct = True
        with self._opened():
            pass

    def close(self) -> None:
        _OPEN.close(self)

    def open_range(self, begin: int, nbytes: int, buffer: Bytes) -> Bytes | None:
        """As `Reader`; None where the page cache holds them."""
        with self._opened() as file:
            pages = self._cached_pages(begin, nbytes)
            if pages.all():
                return None
            if pages.mean() < _MOSTLY_CACHED:
                found = self._read_direct(file, begin, nbytes, buffer)
                if found is not None:
                    return found
            self._fill(file.fd, buffer[:nbytes], begin, nbytes)
            _drop_pages(file.fd, begin, pages)
            return buffer[:nbytes]

    def read_around(self, begin: int, nbytes: int, buffer: Bytes) -> None:
        """Read them around the page cache, whatever lies in it, or through it where there is no other way. Raises as
        `open_range`."""
        with self._opened() as file:
            if self._read_direct(file, begin, nbytes, buffer) is None:
                self._fill(file.fd, buffer[:nbytes], begin, nbytes)

    def copy(self, begin: int, target: Bytes) -> None:
        """As `Reader`, by way of the page cache."""
        with self._opened() as file:
            if os.preadv(file.fd, [target.data], begin) != target.size:
                self._fill(file.fd, target, begin, target.size)

    @contextmanager
    def _opened(self) -> Iterator["_OpenFile"]:
        try:
            with _OPEN.use(self, lambda: _OpenFile(self._path)) as file:
                self._identity = self._identity or file.identity
                if file.identity != self._identity:
                    raise CheckpointError(f"{self._name} changed while it was read: run again")
                yield file
        except OSError as error:
            raise CheckpointError(f"{self._name} cannot be read: {error.strerror}") from error

    def _read_direct(
        self, file: "_OpenFile", begin: int, nbytes: int, buffer: Bytes
    ) -> Bytes | None:
        """None where system or filesystem have no direct I/O."""
        if file.direct_fd is None or not self._reads_direct:
            return None
        start = begin - begin % ALIGNMENT
        span = -(-(begin + nbytes - start) // ALIGNMENT) * ALIGNMENT
        try:
            self._fill(file.direct_fd, buffer[:span], start, begin + nbytes - start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._reads_direct = False  # the filesystem took the flag, but not the read
            return None
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
        with self._opened() as file:
            address = file.map_address + start
            if _mincore(address, begin + nbytes - start, pages.ctypes.data):
                return np.zeros(len(pages), dtype=np.bool_)
        return (pages & 1).astype(np.bool_)


class _OpenFile:
    """A file's descriptors, and a map of it, by which the system says what is cached."""

    def __init__(self, path: Path) -> None:
        self.users = 0
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(self.fd)
            self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if hasattr(os, "posix_fadvise"):
                # no read-ahead: it would bring in what nobody asked for
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._map = mmap.mmap(self.fd, max(status.st_size, 1), prot=mmap.PROT_READ)
        except OSError:
            os.close(self.fd)
            raise
        self.map_address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        self.direct_fd = open_direct(path, os.O_RDONLY)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
        if self.direct_fd is not None:
            os.close(self.direct_fd)


class _OpenFiles:
    """Every file that readers have open, in the order of their last use: not more than `most` that nobody uses."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._files: dict[FileReader, _OpenFile] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, reader: FileReader, opened: Callable[[], _OpenFile]) -> Iterator[_OpenFile]:
        with self._lock:
            file = self._files.pop(reader, None) or self._make(opened)
            self._files[reader] = file
            file.users += 1
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1

    def close(self, reader: FileReader) -> None:
        with self._lock:
            if file := self._files.pop(reader, None):
                file.close()

    def _make(self, opened: Callable[[], _OpenFile]) -> _OpenFile:
        self._keep(self._most - 1)
        try:
            return opened()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._keep(0)  # others need more than was left to them
            return opened()

    def _keep(self, most: int) -> None:
        idle = [reader for reader, file in self._files.items() if not file.users]
        for reader in idle[: max(len(self._files) - most, 0)]:
            self._files.pop(reader).close()


def _most_open() -> int:
    """How many files may stay open: three descriptors each (through the cache, around it, of the map), which leaves
    more than half of what a process may have to others."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if allowed == resource.RLIM_INFINITY else min(max(allowed // 8, 2), 256)


_OPEN = _OpenFiles(_most_open())


def _drop_pages(fd: int, begin: int, cached: NDArray[np.bool_]) -> None:
    """Drop the pages that were not cached before they were read."""
    if not hasattr(os, "posix_fadvise"):
        return
    edges = np.flatnonzero(np.diff(np.concatenate(([True], cached, [True])).astype(np.int8)))
    page = mmap.PAGESIZE
    for first, last in edges.reshape(-1, 2).tolist():
        start = begin // page * page + first * page
        os.posix_fadvise(fd, start, (last - first) * page, os.POSIX_FADV_DONTNEED)


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
