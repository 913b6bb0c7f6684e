"""Folders for the time of a context, of which no end of the process leaves anything.

What removes a folder is a process of its own, which is there before the folder is and waits for this one to end in
whatever way. Where both are killed at once, the next folder's maker finds that nobody holds the lock.
"""

import fcntl
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "expo-run-"
_PRIVATE = 0o700
_OPENED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_REMOVE = 'cat >/dev/null; rm -rf -- "$0" || { sleep 1; rm -rf -- "$0"; }'


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that only its user can read, gone when the context or the process ends.

    Raises:
        OSError: it cannot be made, or no process can be started.
    """
    place = Path(tempfile.gettempdir())
    _sweep(place)
    folder = place / f"{_PREFIX}{secrets.token_hex(8)}"
    remover = subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of what a terminal sends to its group
        cwd="/",
    )
    with remover:  # closes its stdin and waits for it
        fd = lock_directory(folder)
        try:
            yield folder
        finally:
            os.close(fd)


def lock_directory(folder: Path) -> int:
    """Make a directory that only its user can read, unless it is there, and lock it for as long as the descriptor is
    open.

    Raises:
        OSError: it cannot be made or locked, or is a file or a link.
    """
    while True:
        with suppress(FileExistsError):
            folder.mkdir(_PRIVATE)
        # It may go before it is locked: then a new one is locked.
        with suppress(FileNotFoundError):
            fd = os.open(folder, _OPENED)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(fd), folder.lstat()):
                    return fd
            except OSError:
                os.close(fd)
                raise
            os.close(fd)


def _sweep(place: Path) -> None:
    """Remove what runs have left that were killed together with all that they had started."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            fd = os.open(folder, _OPENED)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)
