"""The files of OUT that are published, each with the SHA-256 that the manifest knows."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from expo.checkpoint.files import open_directory
from expo.checkpoint.sidecars import MANIFEST, SIGNATURE, is_apart, is_legal
from expo.errors import CheckpointError, VerificationError
from expo.output.manifest import AdapterManifest, Manifest

_SAMPLE_BYTES = 512


@dataclass(frozen=True)
class Outgoing:
    """A file to publish. `sha256` holds for the file that had this size and time; small ones may come
    from memory (`content`). One that `is_sent` is an LFS object on the Hub, and maybe no longer on this disk."""

    name: str
    path: Path
    nbytes: int
    mtime_ns: int
    sha256: str
    content: bytes | None = None
    is_sent: bool = False

    @cached_property
    def blob_id(self) -> str:
        """Git's name of the content, which is how the Hub knows files that are not in LFS; empty of one that is."""
        if self.is_sent:
            return ""
        content = self.path.read_bytes() if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sample(self) -> bytes:
        """The first bytes, by which the Hub tells text from binary."""
        if self.content is not None:
            return self.content[:_SAMPLE_BYTES]
        with self.path.open("rb") as file:
            return file.read(_SAMPLE_BYTES)

    def read(self) -> bytes:
        """The content.

        Raises:
            VerificationError: it is no longer what the hash is of.
        """
        if self.content is not None:
            return self.content
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise VerificationError(f"{self.path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise self._changed()
        return content

    def confirm(self) -> None:
        """That the file is still the one which the hash is of: by size and time, else by its content.

        Raises:
            VerificationError: it changed, or is gone.
        """
        if self.content is not None or self.is_sent:
            return
        try:
            status = self.path.stat()
            if (status.st_size, status.st_mtime_ns) == (self.nbytes, self.mtime_ns):
                return
            found = _sha256(self.path)
        except OSError as error:
            raise VerificationError(f"{self.path} cannot be read: {error.strerror}") from error
        if found != self.sha256:
            raise self._changed()

    def _changed(self) -> VerificationError:
        return VerificationError(
            f"{self.path} changed while it was published: restore it, or run the merge again"
        )


def snapshot(
    out: Path, manifest: Manifest | AdapterManifest, sent: Mapping[str, int] = {}
) -> list[Outgoing]:
    """Every file to publish as it is now; the model's are taken to be what the manifest says, until a verification
    reads them. Licences and notices that somebody added travel too.

    Args:
        sent: the bytes of those files of the manifest that are on the Hub and not in `out`, by name.

    Raises:
        VerificationError: a file of the manifest is missing.
        CheckpointError: a file that the manifest does not vouch for is a link.
    """
    model = {name: sha256 for name, sha256 in manifest.files.items() if not is_apart(name)}
    for name in model.keys() - sent.keys():
        if not (out / name).is_file():
            raise VerificationError(f"{out / name} is missing: restore it, or run the merge again")
    names = {name for name in open_directory(out).sizes if is_apart(name) or is_legal(name)}
    small = [beside(out, name) for name in (names | {MANIFEST}) - model.keys()]
    there = [outgoing(out, name, model[name]) for name in model.keys() - sent.keys()]
    away = [
        Outgoing(name, out / name, nbytes, 0, model[name], is_sent=True)
        for name, nbytes in sent.items()
    ]
    return _by_name([*small, *there, *away])


def beside(out: Path, name: str) -> Outgoing:
    """A small file that no hash in the manifest vouches for.

    Raises:
        CheckpointError: it is a link.
    """
    return outgoing(out, name, _own_sha256(out / name))


def replaced(files: Iterable[Outgoing], out: Path, contents: Mapping[str, bytes]) -> list[Outgoing]:
    """The files with those of `contents` that differ, which are in memory yet."""
    known = {file.name: file for file in files}
    for name, content in contents.items():
        sha256 = hashlib.sha256(content).hexdigest()
        if name not in known or known[name].sha256 != sha256:
            known[name] = Outgoing(name, out / name, len(content), 0, sha256, content)
    return _by_name(known.values())


def signed(files: Iterable[Outgoing], out: Path) -> list[Outgoing]:
    """The files with the signature that was just written."""
    return _by_name([*(f for f in files if f.name != SIGNATURE), beside(out, SIGNATURE)])


def written(file: Outgoing) -> Outgoing:
    """The same file, from the disk."""
    return replace(outgoing(file.path.parent, file.path.name, file.sha256), name=file.name)


def _by_name(files: Iterable[Outgoing]) -> list[Outgoing]:
    return sorted(files, key=lambda file: file.name)


def outgoing(out: Path, name: str, sha256: str) -> Outgoing:
    """A file as it is now, which has this hash."""
    status = (out / name).stat()
    return Outgoing(name, out / name, status.st_size, status.st_mtime_ns, sha256)


def _own_sha256(path: Path) -> str:
    """Of a file that no hash in the manifest vouches for: a link could lead to anything."""
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link: put the file itself there")
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
