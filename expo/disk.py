"""Every step by which expo changes an output on a disk. Nothing else does, so that tests can cut the power
between any two of them (`tests/crashes.py`)."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from expo.errors import BusyError

CLAIMS = ".expo-claims"
"""The folder, in a directory that several processes may change, of the files that they lock. A lock on the directory
itself would be easier to leave no trace of; but NFS and Lustre know locks of files only, and let one on a directory
hold on each machine by itself."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a filesystem without locks says."""

_HOLD = "hold"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def create(path: Path) -> int:
    """An empty file, open to read and write; what was there is gone. The caller closes it."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def claim(
    path: Path, *, makes: bool = True, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB
) -> int | None:
    """A file, made if need be, that is locked until its descriptor is closed; None while another process has it.

    Args:
        how: as `fcntl.flock` takes it.

    Raises:
        FileNotFoundError: the directory is gone, or the file is not there and is not to be made.
        OSError: the filesystem has no locks.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if makes else 0)
    fd = os.open(path, flags, 0o666)
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def hold(folder: Path, how: int) -> int | None:
    """Lock a directory that is there, as `claim` does a file in it, also while it gets another name.

    Raises:
        FileNotFoundError: the directory is gone.
        OSError: the filesystem has no locks, or something else has the name of what is locked.
    """
    path = folder / CLAIMS / _HOLD
    while not path.parent.is_symlink():
        with suppress(FileExistsError):
            make_directory(path.parent)
        with suppress(FileNotFoundError):
            fd = claim(path, how=how)
            if fd is None or _is_file(fd, path):
                return fd
            os.close(fd)  # another holder removed it before it was locked
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))


def let_go(folder: Path) -> None:
    """Remove what `hold` has made in a directory, by a holder of it. What a network filesystem keeps of an open
    file stays until the next one who holds the directory lets it go."""
    with suppress(OSError):
        remove(folder / CLAIMS)


def write(fd: int, data: bytes | memoryview, offset: int) -> int:
    """How many of the bytes are written; none is durable yet."""
    return os.pwrite(fd, data, offset)


def reserve(fd: int, nbytes: int) -> None:
    """Give a file its size and its blocks, so that a full disk shows now; nothing where the system cannot."""
    if not hasattr(os, "posix_fallocate") or nbytes == 0:
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def resize(fd: int, nbytes: int) -> None:
    os.ftruncate(fd, nbytes)


def sync(fd: int) -> None:
    """Make what a file holds durable; its name becomes so with its directory."""
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make new names, renames and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path, mode: int = 0o777) -> None:
    path.mkdir(mode)


def open_up(folder: Path) -> None:
    """Give a directory that was its user's alone the mode that directories have."""
    folder.chmod(0o777 & ~mask())


def mask() -> int:
    """The modes that this process gives to nothing that it makes."""
    found = os.umask(0)
    os.umask(found)
    return found


def rename(path: Path, target: Path) -> None:
    """In one step; a file or an empty directory that has the name is replaced."""
    path.replace(target)


def link(path: Path, name: Path) -> None:
    """Give a file another name, in one step; FileExistsError where something has it."""
    name.hardlink_to(path)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where system or filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(a), os.fsencode(b))
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def touch(path: Path) -> None:
    """Give a file that is there the time of now."""
    os.utime(path)


def remove_file(path: Path) -> None:
    path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.rmdir()


def make_directories(path: Path, *, below: Path | None = None) -> None:
    """A directory and those above it, durable; FileNotFoundError where `below`, which is left alone, is not there."""
    if path == below or path.is_dir():
        return
    make_directories(path.parent, below=below)
    with suppress(FileExistsError):
        make_directory(path)
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """A file, a link, or a directory with all that is in it, its locks last; nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name == CLAIMS):
            remove(entry)
        remove_directory(path)
    else:
        remove_file(path)


def clear(folder: Path) -> None:
    """Remove all that is in a directory but what holds it."""
    for entry in folder.iterdir():
        if entry.name != CLAIMS:
            remove(entry)
        else:
            for claimed in entry.iterdir():
                if claimed.name != _HOLD:
                    remove(claimed)


@contextmanager
def locked(folder: Path, out: Path, *, waits: bool = False) -> Iterator[None]:
    """Keep other runs that write `out` away from a directory that is there; the lock dies with the process.

    Where the filesystem has no locks, nothing is kept away: only workers whose work was divided beforehand come there.

    Args:
        waits: for who holds it, which is at it for a moment.

    Raises:
        BusyError: another run holds it.
    """
    try:
        fd = hold(folder, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield
        return
    if fd is None:
        raise BusyError(f"another run is writing {out}: wait for it")
    try:
        yield
    finally:
        let_go(folder)
        os.close(fd)


def _is_file(fd: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
