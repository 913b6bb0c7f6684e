"""The staging directory: where a run works until OUT can appear whole, in one rename.

It lies beside OUT, or inside where OUT is an empty directory or a mount point. It survives an
interruption and a full disk; a lock on it, which dies with the process, keeps a second run out.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from tempfile import TemporaryDirectory

from expo import disk
from expo.checkpoint.placing import WORK, fill, settle, sweep
from expo.checkpoint.sidecars import JOURNAL, MANIFEST, PARTIAL, is_one_file, manifest_path
from expo.errors import BusyError, OutputError
from expo.output.claim import (
    check_free,
    check_out,
    is_free,
    is_part,
    is_taken,
    remove_parts,
    staging_path,
)
from expo.output.durable import place_file, seal_file, write_file
from expo.output.journal import Fingerprint, Journal
from expo.output.manifest import Manifest, is_whole
from expo.output.sink import FinishedShard
from expo.output.writer import ShardWriter
from expo.planning.plan import ShardPlan
from expo.spec.request import Request

_PRIVATE = 0o700  # until it is placed
_OTHERS_WRITE = 0o022


class Hold(IntEnum):
    """How a process holds a staging directory: by a lock, or not at all where the filesystem has none."""

    ALONE = fcntl.LOCK_EX | fcntl.LOCK_NB
    IN_TURN = fcntl.LOCK_EX
    TOGETHER = fcntl.LOCK_SH
    UNLOCKED = fcntl.LOCK_UN


class Staging:
    """One run's claim on OUT, and the sink that its bytes go to. Use as a context manager: leaving releases the
    lock, nothing else."""

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        hold: Hold = Hold.ALONE,
        makes: bool = True,
    ) -> None:
        """Lock the staging directory of an OUT that may be written (see `check_out`), after what a cut has left
        of an earlier placement is settled.

        Args:
            hold: alone, and at once or not at all; alone, when others are done; with others.
            makes: the directory, where there is none.

        Raises:
            FileNotFoundError: there is none, and it is not to be made.
            OutputError: another run is writing OUT, or the directory cannot be made.
        """
        self.out = out.resolve()
        self._overwrite, self._hold = overwrite, hold
        beside = staging_path(self.out, inside=False)
        self.folder = beside
        try:
            self._may_be_done = (
                settle(self.out)
                or is_part(self.out)
                or (is_one_file(self.out) and self.out.exists())
            )
            self._is_inside = self.out.is_dir() and (
                os.path.ismount(self.out) or (is_free(self.out) and not beside.is_dir())
            )
            self.folder = staging_path(self.out, inside=self._is_inside)
            self._fd = self._lock(makes=makes)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not makes:
                raise
            cure = (
                "; its filesystem has no locks: --worker 0/1 does without"
                if error.errno in disk.NO_LOCKS
                else ""
            )
            raise OutputError(
                f"{self.folder} cannot be created or locked: {error.strerror}{cure}"
            ) from error
        self._journal = Journal(self.folder / JOURNAL)

    @property
    def is_taken(self) -> bool:
        """Whether OUT holds a model by now."""
        return is_taken(self.out)

    def is_done(self, print_: Fingerprint | None) -> bool:
        """Whether OUT is the output of a plan, which has come to its place only now."""
        complete = print_ and self.complete_manifest(print_)
        return self._may_be_done and complete is not None

    @property
    def has_shards(self) -> bool:
        """Whether there is work to resume."""
        return any(shards for _, shards in self._journals())

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def resume(self, print_: Fingerprint) -> tuple[list[FinishedShard], str | None]:
        """The shards that an earlier run of the same plan left, and why there are none, if so."""
        journals = list(self._journals())
        others = [parts for parts, _ in journals if parts != print_.parts]
        if journals and not others:
            self._journal.go_on(print_)
            for partial in self.folder.rglob(f"*{PARTIAL}"):  # of runs that are gone
                disk.remove_file(partial)
            done = {shard.file: shard for _, shards in journals for shard in shards}
            return [shard for shard in done.values() if self._is_there(shard)], None
        reason = None
        if others:
            changed = print_.difference(others[0])
            reason = f"an unfinished run was for another plan ({changed} changed): starting afresh"
        elif any(self._entries()):
            reason = "what an unfinished run left cannot be read: starting afresh"
        self.start_afresh(print_)
        return [], reason

    def start_afresh(self, print_: Fingerprint) -> None:
        """Forget what an earlier run left, whatever it was."""
        disk.clear(self.folder)
        self._journal.start(print_)

    def complete_manifest(self, print_: Fingerprint) -> Manifest | None:
        """The manifest, if an earlier run of the same plan finished all but the placement, or all but its end."""
        for folder in (self.folder, *([self.out] if self._may_be_done else [])):
            manifest = Manifest.of_folder(folder)
            if manifest is None or manifest.plan != print_.digest:
                continue
            if is_whole(folder, manifest):
                return manifest
        return None

    def open(self, shard: ShardPlan) -> ShardWriter:
        """A temporary file that takes the shard's name when it is recorded.

        Raises:
            OSError: it cannot be made, or there is no room for it.
        """
        path = self._temporary(shard.file)
        disk.make_directories(path.parent)
        return ShardWriter(path, shard.file_bytes)

    def record(self, shard: FinishedShard) -> None:
        """Give a finished temporary file its name and enter it in the journal."""
        path = self.folder / shard.file
        disk.rename(self._temporary(shard.file), path)
        disk.sync_directory(path.parent)
        self._journal.append(shard)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, unless it is there, and place the output, unless that is done."""
        if self._may_be_done and self._is_placed(manifest):
            self.discard()
            return
        if Manifest.of_folder(self.folder) != manifest:
            write_file(self.folder / MANIFEST, manifest.to_json().encode())
        self.place()

    def _is_placed(self, manifest: Manifest) -> bool:
        """Whether OUT is what a manifest says: a cut may have come while it was made, or removed."""
        if is_one_file(self.out) and (self.folder / self.out.name).exists():
            return False  # it goes last
        return Manifest.of_folder(self.out) == manifest and is_whole(self.out, manifest)

    def _temporary(self, file: str) -> Path:
        return self.folder / f"{file}{PARTIAL}"

    def seal(self) -> dict[str, str]:
        """Make everything durable that a library has written here; SHA-256 by name."""
        paths = (path for top in self._entries() for path in (top, *top.rglob("*")))
        named = ((path.relative_to(self.folder).as_posix(), path) for path in paths)
        return {
            name: seal_file(path)
            for name, path in sorted(named)
            if name != JOURNAL and path.is_file()
        }

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    @property
    def disk(self) -> int:
        """The number of the disk that it lies on."""
        return self.folder.stat().st_dev

    def place(self) -> None:
        """Make OUT appear. From here on the manifest, not the journal, says what is in it.

        Raises:
            OutputError: OUT holds by now what is not to be replaced.
        """
        check_free(self.out, overwrite=self._overwrite)
        for entry in self.folder.glob(f"{WORK}*"):
            disk.remove(entry)
        self._journal.remove()
        disk.open_up(self.folder)
        disk.sync_directory(self.folder)
        if is_one_file(self.out):
            self._place_file()
        elif self.out.is_dir() and (self._overwrite or self._is_inside or is_free(self.out)):
            # Also under its next name. Who has it sweeps or settles: this run holds the staging directory.
            with disk.locked(self.out, self.out, waits=True):
                self._replace()
        else:
            disk.rename(self.folder, self.out)  # which fails where something has come there since
        disk.sync_directory(self.out.parent)
        disk.let_go(self.out)
        sweep(self.out)
        remove_parts(self.out)

    def discard(self) -> None:
        """Remove everything: the run was refused, there is nothing to resume."""
        with suppress(OSError):
            disk.remove(self.folder)

    def _place_file(self) -> None:
        """A model in one file, with its manifest beside it. What is here goes last: until then a killed run
        finds all of it again."""
        place_file(manifest_path(self.out), (self.folder / MANIFEST).read_bytes())
        disk.rename(self.folder / self.out.name, self.out)
        disk.sync_directory(self.out.parent)
        self.discard()

    def _replace(self) -> None:
        """Take the place of what OUT holds: in one step where the system can, which leaves the old model here."""
        if self._is_inside or not disk.exchange(self.folder, self.out):
            fill(self.out, self.folder)
        else:
            disk.sync_directory(self.out.parent)
            self.discard()

    def _lock(self, *, makes: bool) -> int | None:
        disk.make_directories(self.folder.parent)
        while makes or self.folder.is_dir():
            with suppress(FileExistsError):
                if makes:
                    disk.make_directory(self.folder, _PRIVATE)
            disk.sync_directory(self.folder.parent)
            # It may get another name, or go, before it is locked: then a new one is made.
            with suppress(FileNotFoundError):
                self._check_folder()
                if self._hold is Hold.UNLOCKED:
                    return None
                fd = disk.hold(self.folder, self._hold)
                if fd is None:
                    raise BusyError(f"another run is writing {self.out}: wait for it")
                return fd
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder))

    def _check_folder(self) -> None:
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise OutputError(
                f"{self.folder} is a link or a file, not a run's directory: remove it"
            )
        if fault := _not_ours_alone(found, self.folder.parent):
            raise OutputError(
                f"{self.folder} {fault}, who may change what a run writes there: have it removed, or choose "
                "another OUT"
            )

    def _journals(self) -> Iterator[tuple[dict[str, str], list[FinishedShard]]]:
        """What can be read of this run's journal, and of those of workers."""
        own = sorted(self.folder.glob(f"{WORK}*/{JOURNAL}"))
        found = (Journal(path).read() for path in (self.folder / JOURNAL, *own))
        return (journal for journal in found if journal is not None)

    def _entries(self) -> Iterator[Path]:
        """What is in the directory but for the locks."""
        return (entry for entry in self.folder.iterdir() if entry.name != disk.CLAIMS)

    def _is_there(self, shard: FinishedShard | ShardPlan) -> bool:
        path = self.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.file_bytes


@contextmanager
def claimed(
    out: Path,
    request: Request,
    *,
    overwrite: bool,
    print_: Fingerprint | None = None,
    hold: Hold = Hold.ALONE,
) -> Iterator[Staging]:
    """The claim on an OUT that `check_out` let pass, unless another run has ended there since.

    Args:
        print_: of a plan whose finished output may be there, if it was only now that it came to its place.
        hold: as `Staging` has it.

    Raises:
        FileNotFoundError: OUT has been placed by another of those that share its directory.
        OutputError: as `check_out` and `Staging`.
    """
    makes = hold is Hold.ALONE  # the others come where there is something to place
    with Staging(out, overwrite=overwrite, hold=hold, makes=makes) as staging:
        if staging.is_taken and not overwrite and not staging.is_done(print_):
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
