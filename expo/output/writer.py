"""One shard, written front to back: preallocated, around the page cache where possible, durable."""

import errno
import os
from pathlib import Path

from expo import disk
from expo.checkpoint.headers import ALIGNMENT
from expo.checkpoint.reader import Bytes, open_direct


class ShardWriter:
    """Writes a file of known size in page-aligned pieces, in any order."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        """Create `path` and reserve its blocks, so that a full disk shows now.

        Raises:
            OSError: the file cannot be created, or there is no room for it.
        """
        self._path = path
        self._file_bytes = file_bytes
        self._fd = disk.create(path)
        self._direct_fd = open_direct(path, os.O_WRONLY)
        self._writes_direct = self._direct_fd is not None
        try:
            disk.reserve(self._fd, file_bytes)
        except OSError:
            self.close()
            raise

    def write(self, offset: int, data: Bytes) -> None:
        """Write whole pages at a multiple of ALIGNMENT. The last piece may be padded past the end.

        Raises:
            OSError: as the disk says.
        """
        done = 0
        while done < len(data):
            fd = (
                self._direct_fd if self._writes_direct and self._direct_fd is not None else self._fd
            )
            try:
                done += disk.write(fd, data[done:].data, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or fd == self._fd:
                    raise
                self._writes_direct = False  # it stays open: another thread may be writing to it
            if done % ALIGNMENT and self._writes_direct:
                done -= done % ALIGNMENT  # a short write: direct I/O goes on from a whole page

    def finish(self) -> None:
        """Cut the padding off and make the file durable; its pages leave the cache."""
        disk.resize(self._fd, self._file_bytes)
        disk.sync(self._fd)
        if not self._writes_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()

    def close(self) -> None:
        os.close(self._fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)
