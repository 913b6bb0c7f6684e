"""Small files, written so that they survive a power cut before anything speaks of them."""

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from expo import disk
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
    return _write(path, [content])


def place_file(path: Path, content: bytes) -> None:
    """Write a small file that appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    whole = path.with_name(f".{path.name}.expo-part")
    try:
        write_file(whole, content)
        disk.rename(whole, path)
        disk.sync_directory(path.parent)
    except OSError as error:
        raise unwritable(error, path) from error


def copy_file(source: Path, target: Path) -> str:
    """Copy a file of any size, durably, and return its SHA-256."""
    with source.open("rb") as reader:
        return _write(target, iter(lambda: reader.read(_COPY_BYTES), b""))


def _write(path: Path, blocks: Iterable[bytes]) -> str:
    disk.make_directories(path.parent)
    digest, at = hashlib.sha256(), 0
    fd = disk.create(path)
    try:
        for block in blocks:
            digest.update(block)
            at += write_all(fd, block, at)
        disk.sync(fd)
    finally:
        os.close(fd)
    disk.sync_directory(path.parent)
    return digest.hexdigest()


def write_all(fd: int, content: bytes, offset: int) -> int:
    """Write every byte at `offset`; how many those are."""
    done = 0
    while done < len(content):
        done += disk.write(fd, memoryview(content)[done:], offset + done)
    return done


def seal_file(path: Path) -> str:
    """Make a file durable that a library has written, with the mode that files have; its SHA-256."""
    path.chmod(0o666 & ~disk.mask())
    with path.open("rb") as file:
        disk.sync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
