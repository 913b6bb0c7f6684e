"""Filling a directory where it stands: OUT is a mount point or was there empty, or nothing can be exchanged in one step.

    1. what OUT holds moves into OUT/.expo-old, what a loader looks for first
    2. the new directory, whole and durable, becomes OUT/.expo-new
    3. its files move into OUT, what a loader looks for last; then it goes, and .expo-old with it

Every step is durable before the next. A cut before 2 is taken back, one after it is finished, by whoever sees the
directory next: the two names say which, and nothing but moves is needed.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from expo import disk
from expo.checkpoint.sidecars import MANIFEST
from expo.errors import OutputError

STAGING = ".expo-staging"
"""How the name of a directory ends that a run works in."""

WORK = ".expo-work-"
"""How the name of the directory of one worker among several begins: its journal, and shards that are not finished."""

OLD, NEW = ".expo-old", ".expo-new"

KEPT = frozenset({OLD, NEW, disk.CLAIMS, "lost+found"})
"""What lies in a directory and is not moved."""

_DECISIVE = (
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)


def fill(out: Path, new: Path) -> None:
    """Put the files of `new`, a directory on the same filesystem, in the place of what `out` holds.

    Raises:
        OSError: as the disk says. `settle` finishes it or takes it back.
    """
    held = [entry for entry in out.iterdir() if entry.name not in KEPT and entry != new]
    if held:
        disk.make_directory(out / OLD)
        disk.sync_directory(out)
        _move(held, out / OLD, hides=True)
    disk.rename(new, out / NEW)
    disk.sync_directory(out)
    _finish(out)


def is_unsettled(out: Path) -> bool:
    """Whether a cut has left `out` half filled."""
    return (out / NEW).is_dir() or (out / OLD).is_dir()


def settle(out: Path) -> bool:
    """Finish or take back what a cut has left of `fill`; whether there was anything.

    Raises:
        OutputError: another run is filling it now.
        OSError: as the disk says.
    """
    sweep(out)
    if not is_unsettled(out):
        return False
    with disk.locked(out, out):
        if (out / NEW).is_dir():
            _finish(out)
        elif (out / OLD).is_dir():
            _move((out / OLD).iterdir(), out)
            disk.remove_directory(out / OLD)
            disk.sync_directory(out)
    return True


def sweep(out: Path) -> None:
    """Remove what came along to OUT of processes that made it together, locks and what one was at that came when OUT
    was placed, unless somebody is at it or nothing can be changed here."""
    if out.name.endswith(STAGING):
        return
    with suppress(OSError, OutputError):
        left = list(out.glob(f"{WORK}*"))
        if left or (out / disk.CLAIMS).is_dir():
            with disk.locked(out, out):
                for work in left:
                    disk.remove(work)


def _finish(out: Path) -> None:
    new = out / NEW
    if (out / OLD).is_dir():
        disk.rename(out / OLD, new / OLD)
        disk.sync_directory(out)
        disk.sync_directory(new)
    _move((entry for entry in new.iterdir() if entry.name not in (OLD, disk.CLAIMS)), out)
    disk.remove(new)
    disk.sync_directory(out)


def _move(entries: Iterable[Path], target: Path, *, hides: bool = False) -> None:
    """Move entries of one directory, in three groups: the files that decide what a directory is go last, or
    first where they are to be hidden."""
    groups: dict[int, list[Path]] = {0: [], 1: [], 2: []}
    for entry in entries:
        groups[2 if entry.name == MANIFEST else int(entry.name in _DECISIVE)].append(entry)
    for rank in sorted(groups, reverse=hides):
        for entry in groups[rank]:
            disk.rename(entry, target / entry.name)
        if groups[rank]:
            disk.sync_directory(target)
            disk.sync_directory(groups[rank][0].parent)
