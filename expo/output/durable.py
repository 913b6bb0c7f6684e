"""Small files, written so that they survive a power cut before anything speaks of them."""

import errno
import hashlib
import os
from pathlib import Path

from expo.errors import OutputError

_COPY_BYTES = 1 << 20


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_of_the_process(error: OSError) -> bool:
    """Whether memory, files or threads have run out, or a library does not load: no fault of any file."""
    lacking = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, None)
    return error.errno in lacking


def unwritable(error: OSError, out: Path, *, kept: str = "") -> OutputError:
    """What a failed write means, and the cure; `kept` is what the same command goes on from."""
    if is_full(error):
        kept = f"{kept} are kept, " if kept else ""
        return OutputError(
            f"the disk of {out} is full: {kept}make room and run the same command again"
        )
    where = f" ({error.filename})" if error.filename else ""
    return OutputError(f"{out} cannot be written: {error.strerror}{where}")


def write_file(path: Path, content: bytes) -> str:
    """Write a small file durably and return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)
    return hashlib.sha256(content).hexdigest()


def place_file(path: Path, content: bytes) -> None:
    """Write a small file that appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    whole = path.with_name(f".{path.name}.expo-part")
    try:
        write_file(whole, content)
        whole.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise unwritable(error, path) from error


def copy_file(source: Path, target: Path) -> str:
    """Copy a file of any size, durably, and return its SHA-256."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_COPY_BYTES):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    sync_directory(target.parent)
    return digest.hexdigest()


def seal_file(path: Path) -> str:
    """Make a file durable that a library has written, with the mode that files have; its SHA-256."""
    path.chmod(0o666 & ~_mask())
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_up(folder: Path) -> None:
    """Give a directory that was its user's alone the mode that directories have."""
    folder.chmod(0o777 & ~_mask())


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
