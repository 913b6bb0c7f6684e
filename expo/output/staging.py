"""The staging directory: where a run works until OUT can appear whole, in one rename.

It lies beside OUT, or inside where OUT is an empty directory or a mount point. It survives an
interruption and a full disk; a lock on it, which dies with the process, keeps a second run out.
"""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from expo.checkpoint.sidecars import MANIFEST
from expo.errors import OutputError
from expo.output.claim import check_free, check_out, is_free, staging_path
from expo.output.durable import open_up, seal_file, sync_directory, write_file
from expo.output.journal import Fingerprint, Journal
from expo.output.manifest import Manifest
from expo.output.sink import FinishedShard
from expo.output.writer import ShardWriter
from expo.planning.plan import ShardPlan
from expo.spec.request import Request
from expo.temporary import lock_directory

_JOURNAL = "journal.jsonl"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_PRIVATE = 0o700  # until it is placed
_OTHERS_WRITE = 0o022


class Staging:
    """One run's claim on OUT, and the sink that its bytes go to. Use as a context manager: leaving releases the
    lock, nothing else."""

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        """Lock the staging directory of an OUT that may be written (see `check_out`).

        Raises:
            OutputError: another run is writing OUT, or the directory cannot be made.
        """
        self.out = out.resolve()
        self._overwrite = overwrite
        self._is_inside = self.out.is_dir() and (is_free(self.out) or os.path.ismount(self.out))
        self.folder = staging_path(self.out, inside=self._is_inside)
        try:
            self._fd = self._lock()
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be created or locked: {error.strerror}"
            ) from error
        self._journal = Journal(self.folder / _JOURNAL)

    @property
    def is_taken(self) -> bool:
        """Whether OUT holds a model by now."""
        return self.out.is_dir() and not is_free(self.out)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def resume(self, print_: Fingerprint) -> tuple[list[FinishedShard], str | None]:
        """The shards that an earlier run of the same plan left, and why there are none, if so."""
        journal = self._journal.read()
        if journal is not None and journal[0] == print_.parts:
            self._journal.trim()
            return [shard for shard in journal[1] if self._is_there(shard)], None
        reason = None
        if journal is not None:
            changed = print_.difference(journal[0])
            reason = f"an unfinished run was for another plan ({changed} changed): starting afresh"
        self.start_afresh(print_)
        return [], reason

    def start_afresh(self, print_: Fingerprint) -> None:
        """Forget what an earlier run left, whatever it was."""
        self._clear()
        self._journal.start(print_)

    def complete_manifest(self, print_: Fingerprint) -> Manifest | None:
        """The manifest, if an earlier run of the same plan finished all but the placement."""
        manifest = Manifest.of_folder(self.folder)
        return manifest if manifest is not None and manifest.plan == print_.digest else None

    def open(self, shard: ShardPlan) -> ShardWriter:
        """A temporary file that takes the shard's name when it is recorded.

        Raises:
            OSError: it cannot be made, or there is no room for it.
        """
        path = self._temporary(shard.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        return ShardWriter(path, shard.file_bytes)

    def record(self, shard: FinishedShard) -> None:
        """Give a finished temporary file its name and enter it in the journal."""
        path = self.folder / shard.file
        self._temporary(shard.file).rename(path)
        sync_directory(path.parent)
        self._journal.append(shard)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, unless it is there, and place the output."""
        if Manifest.of_folder(self.folder) != manifest:
            write_file(self.folder / MANIFEST, manifest.to_json().encode())
        self.place()

    def _temporary(self, file: str) -> Path:
        return self.folder / f"{file}.partial"

    def seal(self) -> dict[str, str]:
        """Make everything durable that a library has written here; SHA-256 by name."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        named = ((path.relative_to(self.folder).as_posix(), path) for path in paths)
        return {name: seal_file(path) for name, path in named if name != _JOURNAL}

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def place(self) -> None:
        """Make OUT appear. From here on the manifest, not the journal, says what is in it.

        Raises:
            OutputError: OUT holds by now what is not to be replaced.
        """
        check_free(self.out, overwrite=self._overwrite)
        self._journal.remove()
        open_up(self.folder)
        sync_directory(self.folder)
        if self._is_inside:
            self._place_inside()
        elif self.out.exists():
            self._exchange()
        else:
            self.folder.rename(self.out)
        sync_directory(self.out.parent)

    def discard(self) -> None:
        """Remove everything: the run was refused, there is nothing to resume."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place_inside(self) -> None:
        """Move file by file, what a loader looks for first comes last."""
        new = sorted(self.folder.iterdir(), key=_placement_order)
        if self._overwrite:
            for old in self.out.iterdir():
                if old != self.folder and not (self.folder / old.name).exists():
                    _remove(old)
        for entry in new:
            target = self.out / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            entry.rename(target)
            sync_directory(self.out)
        self.folder.rmdir()

    def _exchange(self) -> None:
        """Swap OUT and staging in one step where the system can, then remove the old model."""
        if not _renameat2_exchange(self.folder, self.out):
            retired = self.out.with_name(f".{self.out.name}.expo-old")
            shutil.rmtree(retired, ignore_errors=True)
            self.out.rename(retired)
            self.folder.rename(self.out)
            self.folder = retired
        sync_directory(self.out.parent)
        shutil.rmtree(self.folder)

    def _lock(self) -> int:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise OutputError(
                f"{self.folder} is a link or a file, not a run's directory: remove it"
            )
        try:
            fd = lock_directory(self.folder, mode=_PRIVATE)
        except BlockingIOError as error:
            raise OutputError(f"another run is writing {self.out}: wait for it") from error
        if fault := _not_ours_alone(os.fstat(fd), self.folder.parent):
            os.close(fd)
            raise OutputError(
                f"{self.folder} {fault}, who may change what a run writes there: have it removed, or choose "
                "another OUT"
            )
        return fd

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            _remove(entry)

    def _is_there(self, shard: FinishedShard) -> bool:
        path = self.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.file_bytes


@contextmanager
def claimed(out: Path, request: Request, *, overwrite: bool) -> Iterator[Staging]:
    """The claim on an OUT that `check_out` let pass, unless another run has ended there since.

    Raises:
        OutputError: as `check_out` and `Staging`.
    """
    with Staging(out, overwrite=overwrite) as staging:
        if not overwrite and staging.is_taken:
            staging.discard()
            check_out(out, request, overwrite=False)
        yield staging


def _not_ours_alone(found: os.stat_result, beside: Path) -> str | None:
    """Whose a directory is as well, None where it is its user's alone."""
    if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
        return None
    # Not every disk knows owners and modes: what would a directory of ours look like here?
    with TemporaryDirectory(prefix=".expo-", dir=beside) as fresh:
        made = Path(fresh).stat()
    if found.st_uid != made.st_uid:
        return f"belongs to another user ({found.st_uid})"
    others = found.st_mode & ~made.st_mode & _OTHERS_WRITE
    return f"can be written by others (mode {found.st_mode & 0o777:o})" if others else None


def _placement_order(entry: Path) -> tuple[bool, bool, str]:
    decisive = entry.name in ("config.json", "model.safetensors.index.json")
    return entry.name == MANIFEST, decisive, entry.name


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    elif entry.name != "lost+found":
        entry.unlink()


def _renameat2_exchange(a: Path, b: Path) -> bool:
    """Linux's atomic exchange of two names; False where system or filesystem lack it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(a), os.fsencode(b))
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
