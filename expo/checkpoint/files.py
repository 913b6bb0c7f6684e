"""The files of one location, wherever they lie: list them, read a range, bring one to the disk."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from expo import disk
from expo.checkpoint.contents import FIRST_BYTES, mistaken
from expo.checkpoint.headers import printable
from expo.checkpoint.parsing import MOST_BYTES, parse_json
from expo.checkpoint.places import fault_of
from expo.checkpoint.placing import WORK, settle
from expo.checkpoint.reader import FileReader, Reader
from expo.checkpoint.reference import Location
from expo.checkpoint.sidecars import MANIFEST, is_one_file, manifest_path
from expo.errors import CheckpointError, MistakenFileError

_SKIPPED_DIRECTORIES = {".git", ".cache", "__pycache__", disk.CLAIMS}


class Files(Protocol):
    """What a checkpoint needs from the place that holds its files."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every file's size in bytes, by its path relative to the root, with `/` between parts."""
        ...

    @property
    def label(self) -> str:
        """How messages, the manifest and the card name this place: never an absolute path."""
        ...

    @property
    def commit(self) -> str | None:
        """The Hub commit, where there is one."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop.

        Raises:
            CheckpointError: the file cannot be read.
            MistakenFileError: it begins as no file of a model does.
        """
        ...

    def local_path(self, name: str) -> Path:
        """Where the whole file lies on this disk, downloaded now if it has to be."""
        ...

    def is_local(self, name: str) -> bool: ...

    def reader(self, name: str) -> Reader:
        """For ranges of a weight file, which is on this disk or in memory, or is streamed."""
        ...

    @property
    def streams(self) -> bool:
        """Whether weights that are not on this disk are read by range where they lie, not downloaded."""
        ...

    def identity(self, name: str) -> dict[str, str | int]:
        """What tells this file from a changed one, without reading it."""
        ...


@dataclass(frozen=True)
class Directory:
    """A local directory (also a snapshot in the Hub's cache, which then has a commit)."""

    root: Path
    sizes: Mapping[str, int]
    label: str
    commit: str | None = None
    notes: tuple[str, ...] = ()
    """What the user should know of how it was found."""
    streams: bool = False

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return read_local(self.local_path(name), start, stop, where(self, name))

    def local_path(self, name: str) -> Path:
        if name not in self.sizes:
            raise CheckpointError(f"{self.label} has no file {name}")
        return self.root / name

    def is_local(self, name: str) -> bool:
        return name in self.sizes

    def reader(self, name: str) -> Reader:
        return FileReader(self.local_path(name), where(self, name))

    def identity(self, name: str) -> dict[str, str | int]:
        with _readable(where(self, name)):
            status = self.local_path(name).stat()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


@dataclass(frozen=True)
class OneFile(Directory):
    """A model in a single file; its manifest lies beside it, and is called as in a directory."""

    def local_path(self, name: str) -> Path:
        path = super().local_path(name)
        return manifest_path(self.root / self.label) if name == MANIFEST else path


def where(files: Files, name: str) -> str:
    """How messages name a file of a place."""
    return name if files.label == name else f"{files.label}/{printable(name)}"


@dataclass(frozen=True)
class Remains(Directory):
    """A local directory whose shards have left it: of those that are in `headers` nothing else can be read."""

    headers: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        header = self.headers.get(name)
        if header is None:
            return super().read(name, start, stop)
        if start >= len(header):
            raise CheckpointError(f"{self.label}/{name} is no longer on this disk")
        return header[start:stop]

    def local_path(self, name: str) -> Path:
        if name in self.headers:
            raise CheckpointError(f"{self.label}/{name} is no longer on this disk")
        return super().local_path(name)

    def is_local(self, name: str) -> bool:
        return name in self.sizes and name not in self.headers


@dataclass(frozen=True)
class Overlay:
    """Two places as one: the files of `upper` that are `chosen`, and all the others of `lower`."""

    lower: Files
    upper: Files
    chosen: Callable[[str], bool]

    @property
    def sizes(self) -> Mapping[str, int]:
        return {
            name: size
            for files in (self.lower, self.upper)
            for name, size in files.sizes.items()
            if self._holder(name) is files
        }

    @property
    def label(self) -> str:
        return self.lower.label

    @property
    def commit(self) -> str | None:
        return self.lower.commit

    @property
    def streams(self) -> bool:
        return self.lower.streams

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return self._holder(name).read(name, start, stop)

    def local_path(self, name: str) -> Path:
        return self._holder(name).local_path(name)

    def is_local(self, name: str) -> bool:
        return self._holder(name).is_local(name)

    def reader(self, name: str) -> Reader:
        return self._holder(name).reader(name)

    def identity(self, name: str) -> dict[str, str | int]:
        return self._holder(name).identity(name)

    def _holder(self, name: str) -> Files:
        return self.upper if self.chosen(name) else self.lower


def open_location(location: Location, *, streams: bool = False) -> Files:
    """List the files at `location`. A Hub repository is pinned to a commit, nothing is downloaded.

    Args:
        streams: read the weights of a Hub repository by range, where they lie; a store's always are.

    Raises:
        CheckpointError: the directory or the store cannot be listed.
        HubError: the Hub has no such repository or revision, refuses it, or is out of reach.
        SpecError: stores need a library that is not installed.
    """
    if location.path is not None:
        return open_directory(location.path)
    if location.url is not None:
        from expo.checkpoint.store import open_store

        return open_store(location.url)
    from expo.checkpoint.hub import open_repository

    return open_repository(location, streams=streams)


def open_directory(root: Path, *, label: str | None = None, commit: str | None = None) -> Directory:
    """List a local directory; one that a power cut has left half placed is placed first. Of a file that alone,
    with its manifest.

    Raises:
        CheckpointError: it cannot be listed.
        OutputError: another run is placing it now.
    """
    if is_one_file(root):
        there = {root.name: root, MANIFEST: manifest_path(root)}
        sizes = {name: path.stat().st_size for name, path in there.items() if path.is_file()}
        return OneFile(root.parent, sizes, root.name)
    with _readable(str(root)):
        settle(root)
    sizes: dict[str, int] = {}
    for folder, directories, names in os.walk(root, onerror=_unlistable):
        directories[:] = sorted(filter(_is_of_a_model, directories))
        for name in sorted(names):
            path = Path(folder, name)
            place = PurePosixPath(path.relative_to(root)).as_posix()
            with _readable(str(path)):
                if not path.is_file():
                    continue
                if fault := fault_of(place):
                    raise CheckpointError(
                        f"{root} holds a file whose name {fault}: rename {printable(place)}"
                    )
                sizes[place] = path.stat().st_size
    return Directory(root, sizes, label or root.resolve().name, commit)


def _is_of_a_model(directory: str) -> bool:
    """Whether a directory may hold a part of one. Those of processes that make it together come and go meanwhile."""
    return directory not in _SKIPPED_DIRECTORIES and not directory.startswith(WORK)


def open_remains(root: Path, gone: Mapping[str, tuple[bytes, int]]) -> Directory:
    """A local directory with the shards that it held: of those that are gone (header, bytes in all) by name."""
    there = open_directory(root)
    headers = {name: header for name, (header, _) in gone.items()}
    sizes = dict(there.sizes) | {name: file_bytes for name, (_, file_bytes) in gone.items()}
    in_order = sorted(sizes, key=lambda name: ("/" in name, name))
    return Remains(root, {name: sizes[name] for name in in_order}, there.label, headers=headers)


def read_local(path: Path, start: int, stop: int | None, what: str) -> bytes:
    """Bytes start … stop of a file on this disk, which messages call `what`.

    Raises:
        CheckpointError: it cannot be read.
        MistakenFileError: it begins as no file of a model does.
    """
    with _readable(what), path.open("rb") as file:
        if stop is not None and hasattr(os, "posix_fadvise"):
            # a header needs no megabytes of read-ahead
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(start)
        content = file.read() if stop is None else os.pread(file.fileno(), stop - start, start)
    if start == 0 and (fault := mistaken(content)):
        raise MistakenFileError(f"{printable(what)} {fault}")
    return content


def check_contents(files: Files, name: str) -> None:
    """Look at the first bytes of a file that is only copied.

    Raises:
        CheckpointError: as `Files.read`.
    """
    if files.is_local(name):
        files.read(name, 0, FIRST_BYTES)


def read_json(files: Files, name: str) -> dict:
    """A JSON object among the files of a checkpoint.

    Raises:
        CheckpointError: it cannot be read or is not an object.
    """
    try:
        value = load_json(files, name)
    except ValueError as error:
        what = f"{where(files, name)} is not JSON ({error})"
        raise CheckpointError(f"{what}: download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where(files, name)} is not a JSON object: download it again")
    return value


def load_json(files: Files, name: str) -> object:
    """Any JSON value.

    Raises:
        ValueError: it is not JSON, or beyond the limits of `parse_json`.
        CheckpointError: it cannot be read.
    """
    return parse_json(read_whole(files, name))


def read_whole(files: Files, name: str) -> bytes:
    """All of a file that is no weight file.

    Raises:
        CheckpointError: it cannot be read, or is larger than any such file is.
    """
    if files.sizes[name] > MOST_BYTES:
        raise CheckpointError(
            f"{files.label}/{printable(name)} has {files.sizes[name]} bytes, at most {MOST_BYTES} are read: "
            "is it the right file?"
        )
    return files.read(name)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what} cannot be read: {error.strerror}") from error


def _unlistable(error: OSError) -> None:
    raise CheckpointError(f"{error.filename} cannot be listed: {error.strerror}") from error
