"""A staging directory in which several processes work, on a filesystem that all of them see.

    .OUT.expo-staging/model-00001-of-00004.safetensors    finished, by whoever
                      .expo-work-NAME-x/journal.jsonl     what a process of worker NAME has finished, with its sums
                      .expo-work-NAME-x/….partial         what it is at
                      .expo-work-NAME-x/alive             locked while it lives
                      .expo-claims/2                      locked by whoever is at the third shard
                      .expo-claims/place                  locked by whoever verifies and places OUT
                      .expo-claims/placer                 which share of the work does, and that it lives

What is claimed by a lock is free again when its process is gone, however it ended. Without locks the work is
divided beforehand, and who places OUT is known by its signs of life.
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from expo import disk
from expo.checkpoint.placing import WORK
from expo.checkpoint.sidecars import JOURNAL, PARTIAL
from expo.errors import OutputError
from expo.output.durable import write_all
from expo.output.journal import Fingerprint, Journal
from expo.output.sink import FinishedShard
from expo.output.staging import Hold, Staging
from expo.output.writer import ShardWriter
from expo.planning.plan import ShardPlan
from expo.threads import Crew

_PLACE, _PLACER, _ALIVE = "place", "placer", "alive"
_BEAT_SECONDS, _SILENT_SECONDS = 5.0, 60.0
"""Between two signs of life, and how long there may be none."""


class SharedStaging(Staging):
    """One worker's part in a staging directory. Use as a context manager."""

    def __init__(self, out: Path, *, overwrite: bool = False, worker: str | None = None) -> None:
        """Enter the staging directory of OUT, when no run by itself is writing there.

        Args:
            worker: the name of a share of the work that was divided beforehand; None claims shards by locks.

        Raises:
            OutputError: the directory cannot be made.
        """
        hold = Hold.TOGETHER if worker is None else Hold.UNLOCKED
        super().__init__(out, overwrite=overwrite, hold=hold)
        self._worker = worker or "any"
        self._work = self.folder / f"{WORK}{self._worker}-{secrets.token_hex(8)}"
        self._journal = Journal(self._work / JOURNAL)
        self._locks: dict[str, int] = {}

    def __enter__(self) -> "SharedStaging":
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._locks.values():
            os.close(fd)
        super().__exit__(*error)

    def enter(self, print_: Fingerprint) -> bool:
        """Begin this process's journal, and remove what dead ones were at; False where OUT is being placed.

        Raises:
            OutputError: the directory holds the work of another plan.
            OSError: the filesystem has no locks.
        """
        if self._hold is Hold.UNLOCKED:
            self._enter(print_)
            return True
        with placing(self.folder, makes=True) as is_mine:  # not while others enter, or place OUT
            if is_mine:
                self._enter(print_)
            return is_mine

    def leave_empty(self) -> None:
        """Remove the directory, if nobody has put anything into it."""
        with suppress(OSError):
            self.folder.rmdir()

    def _enter(self, print_: Fingerprint) -> None:
        for parts, _ in self._journals():
            if parts != print_.parts:
                raise OutputError(
                    f"{self.folder} holds the work of another plan ({print_.difference(parts)} changed): give all "
                    "workers the same command and inputs; remove the directory if that plan is given up"
                )
        disk.make_directories(self._work, below=self.folder)
        if self._hold is Hold.TOGETHER and (fd := disk.claim(self._work / _ALIVE)) is not None:
            self._locks[_ALIVE] = fd
        self._journal.start(print_)
        for left in self._left_by_dead():
            disk.remove_file(left)

    def holds(self, shard: ShardPlan) -> bool:
        """Whether a shard is finished, by whoever."""
        return self._is_there(shard)

    def begun_bytes(self) -> int:
        """What shards that are not finished take of the disk already."""
        total = 0
        for path in self.folder.glob(f"{WORK}*/**/*{PARTIAL}"):
            with suppress(FileNotFoundError):  # it has got its name
                total += path.stat().st_blocks * 512
        return total

    def claim(self, number: int, shard: ShardPlan) -> bool:
        """Whether this worker may compute a shard: it is not finished, and nobody else is at it."""
        if self._hold is Hold.UNLOCKED:
            return not self.holds(shard)
        fd = disk.claim(self.folder / disk.CLAIMS / str(number))
        if fd is None:
            return False
        if self.holds(shard):
            os.close(fd)
            return False
        self._locks[shard.file] = fd
        return True

    def open(self, shard: ShardPlan) -> ShardWriter:
        """As `Staging.open`. Raises FileNotFoundError where OUT has been placed meanwhile."""
        for path in (self._temporary(shard.file), self.folder / shard.file):
            disk.make_directories(path.parent, below=self.folder)
        return super().open(shard)

    def record(self, shard: FinishedShard) -> None:
        """As `Staging.record`; of two workers who finish the same shard both have the same bytes."""
        disk.sync_directory(self._temporary(shard.file).parent)  # the name that is changed below
        super().record(shard)
        if (fd := self._locks.pop(shard.file, None)) is not None:
            os.close(fd)

    def _left_by_dead(self) -> Iterator[Path]:
        """What processes were at that have ended: of this share, where there are no locks to tell."""
        if self._hold is Hold.TOGETHER:  # so no run by itself is alive
            for path in self.folder.rglob(f"*{PARTIAL}"):
                if not path.relative_to(self.folder).parts[0].startswith(WORK):
                    yield path
        for work in self.folder.glob(f"{WORK}{self._worker}-*"):
            if work != self._work and self._is_dead(work):
                yield from work.rglob(f"*{PARTIAL}")

    def _is_dead(self, work: Path) -> bool:
        if self._hold is Hold.UNLOCKED:
            return True
        fd = disk.claim(work / _ALIVE)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def _temporary(self, file: str) -> Path:
        return self._work / super()._temporary(file).relative_to(self.folder)


@contextmanager
def placing(folder: Path, *, makes: bool = False) -> Iterator[bool]:
    """Whether nobody else enters a staging directory or places OUT, and this process may, until it leaves.

    Always, where the filesystem has no locks. `makes` the lock, where there is none yet.

    Raises:
        FileNotFoundError: the directory is gone, OUT has been placed.
    """
    path = folder / disk.CLAIMS / _PLACE
    try:
        fd = disk.claim(path, makes=makes)
    except OSError as error:
        if error.errno not in disk.NO_LOCKS:
            raise
        yield True
        return
    try:
        # it may have come to OUT before it was locked
        yield fd is not None and os.path.samestat(os.fstat(fd), path.stat())
    finally:
        if fd is not None:
            os.close(fd)


class Turns:
    """Whose turn it is to place OUT where the work was divided beforehand, and there may be no locks: who asked first,
    as long as it gives signs of life.

    The text of the file `placer` is a share, and its time changes while that is at it.
    """

    def __init__(self, share: str) -> None:
        self._share = share
        self._asks_at: dict[Path, float] = {}

    @contextmanager
    def turn(self, folder: Path) -> Iterator[bool]:
        """Whether it is this share's, until it leaves. Two processes of one share exclude each other if there are locks.

        Raises:
            FileNotFoundError: the directory is gone, OUT has been placed.
            OSError: the filesystem has no links either.
        """
        now = time.monotonic()
        if now < self._asks_at.get(folder, now) or not self._is_mine(folder):
            self._asks_at.setdefault(folder, now + _BEAT_SECONDS)
            yield False
            return
        with placing(folder, makes=True) as is_alone, Crew() as crew:
            if is_alone:
                crew.start(partial(_beat, crew, folder / disk.CLAIMS / _PLACER))
            yield is_alone

    def _is_mine(self, folder: Path) -> bool:
        self._asks_at.pop(folder, None)
        path = folder / disk.CLAIMS / _PLACER
        disk.make_directories(path.parent, below=folder)
        mine = path.with_name(secrets.token_hex(8))
        try:
            _write(mine, self._share)
            with suppress(FileExistsError):
                disk.link(mine, path)
            if path.read_text() == self._share:
                return True
            if mine.stat().st_mtime - path.stat().st_mtime < _SILENT_SECONDS:
                return False
            disk.rename(mine, path)
            return True
        finally:
            disk.remove_file(mine)
            disk.sync_directory(path.parent)


def _write(path: Path, text: str) -> None:
    fd = disk.create(path)
    try:
        write_all(fd, text.encode(), 0)
        disk.sync(fd)
    finally:
        os.close(fd)


def _beat(crew: Crew, path: Path) -> None:
    with suppress(OSError):  # it is gone when OUT is placed
        while True:
            disk.touch(path)
            crew.pause(_BEAT_SECONDS)
