"""Power cuts: every step of a run on the disk is recorded, and what a cut between any two may leave is made again.

What is not synced may be there or not: bytes of a file in part, as zeros or not at all; names, renames and removals
in the order of a journal, or each by itself where none needs another. A file's bytes are safe once it was synced, a
name once its directory was.
"""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from expo import disk


@dataclass
class Node:
    """A file's bytes, or a directory's entries by name."""

    content: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] | None = None
    mtime_ns: int = 0


@dataclass(frozen=True)
class Step:
    """`nodes` are the directories that have to be synced for it, or the file; `moved` what a name stood for."""

    kind: str
    nodes: tuple[int, ...]
    names: tuple[str, ...] = ()
    moved: tuple[int, ...] = ()
    offset: int = 0
    data: bytes = b""


DATA = ("write", "resize")
SYNCS = ("sync", "sync_directory")


class Recording:
    """The disk below `root` as it was, and every step since."""

    def __init__(self, root: Path) -> None:
        self.nodes: dict[int, Node] = {}
        self.steps: list[Step] = []
        self._known: dict[int, int] = {}
        self._lock = threading.RLock()
        self.root = self._look(root)
        self.before = deepcopy(self.nodes)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record what happens in the block."""
        with pytest.MonkeyPatch.context() as patched:
            for name in ("create", "claim", "write", "reserve", "resize", "sync", "sync_directory",
                         "make_directory", "rename", "link", "exchange", "remove_file",
                         "remove_directory"):  # fmt: skip
                patched.setattr(disk, name, getattr(self, f"_{name}")(getattr(disk, name)))
            yield

    def _look(self, path: Path) -> int:
        if not path.is_dir():
            return self._new(
                path, Node(bytearray(path.read_bytes()), None, path.stat().st_mtime_ns)
            )
        number = self._new(path, Node(entries={}))
        entries = {entry.name: self._look(entry) for entry in path.iterdir()}
        self.nodes[number].entries = entries
        return number

    def _new(self, path: Path, node: Node) -> int:
        number = len(self.nodes)
        self.nodes[number] = node
        self._known[path.stat().st_ino] = number
        return number

    def _of(self, path: Path) -> int:
        return self._known[path.stat().st_ino]

    def _open(self, fd: int) -> int:
        return self._known[os.fstat(fd).st_ino]

    def _add(self, *step: object, **more: object) -> None:
        self.steps.append(Step(*step, **more))  # type: ignore[arg-type]

    def _create(self, real):
        def create(path: Path) -> int:
            with self._lock:
                was_there = path.exists()
                fd = real(path)
                if was_there:
                    self._add("resize", (self._open(fd),))
                else:
                    number = self._new(path, Node())
                    self._add("create", (self._of(path.parent),), (path.name,), (number,))
                return fd

        return create

    def _claim(self, real):
        def claim(path: Path, **how) -> int | None:
            was_there = path.exists()
            fd = real(path, **how)  # which may wait for others
            with self._lock:
                if not was_there:
                    number = self._new(path, Node())
                    self._add("create", (self._of(path.parent),), (path.name,), (number,))
                return fd

        return claim

    def _link(self, real):
        def link(path: Path, name: Path) -> None:
            with self._lock:
                real(path, name)
                self._add("create", (self._of(name.parent),), (name.name,), (self._of(path),))

        return link

    def _write(self, real):
        def write(fd: int, data: bytes | memoryview, offset: int) -> int:
            with self._lock:
                count = real(fd, data, offset)
                held = bytes(data[:count])
                self._add("write", (self._open(fd),), offset=offset, data=held)
                return count

        return write

    def _resize(self, real):
        def resize(fd: int, nbytes: int) -> None:
            with self._lock:
                real(fd, nbytes)
                self._add("resize", (self._open(fd),), offset=nbytes)

        return resize

    _reserve = _resize

    def _sync(self, real):
        def sync(fd: int) -> None:
            with self._lock:
                real(fd)
                number = self._open(fd)
                self.nodes[number].mtime_ns = os.fstat(fd).st_mtime_ns
                self._add("sync", (number,))

        return sync

    def _sync_directory(self, real):
        def sync_directory(path: Path) -> None:
            with self._lock:
                real(path)
                self._add("sync_directory", (self._known.get(path.stat().st_ino, -1),))

        return sync_directory

    def _make_directory(self, real):
        def make_directory(path: Path, mode: int = 0o777) -> None:
            with self._lock:
                real(path, mode)
                if path.parent.stat().st_ino not in self._known:
                    return  # elsewhere, and for a while
                number = self._new(path, Node(entries={}))
                self._add("create", (self._of(path.parent),), (path.name,), (number,))

        return make_directory

    def _rename(self, real):
        def rename(path: Path, target: Path) -> None:
            with self._lock:
                moved = self._of(path)
                real(path, target)
                places = (self._of(target.parent), self._of(path.parent))
                self._add("rename", places, (target.name, path.name), (moved,))

        return rename

    def _exchange(self, real):
        def exchange(a: Path, b: Path) -> bool:
            with self._lock:
                moved = (self._of(a), self._of(b))
                if done := real(a, b):
                    places = (self._of(a.parent), self._of(b.parent))
                    self._add("exchange", places, (a.name, b.name), moved)
                return done

        return exchange

    def _remove_file(self, real):
        def remove_file(path: Path) -> None:
            with self._lock:
                if os.path.lexists(path):
                    number = self._of(path)
                    real(path)
                    self._add("remove", (self._of(path.parent),), (path.name,), (number,))

        return remove_file

    _remove_directory = _remove_file


def cut(recording: Recording, chance: random.Random, at: int) -> "Tree":
    """What a cut after `at` steps may leave."""
    steps = recording.steps[:at]
    safe = _safe(steps)
    names = [n for n, step in enumerate(steps) if step.kind not in (*DATA, *SYNCS)]
    likely = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    if chance.random() < 0.5:  # a journal: names come in order
        last = max((n for n in names if n in safe), default=-1)
        upto = chance.choice([n for n in names if n > last] or [last])
        kept = {n for n in names if n <= upto}
    else:
        kept = {n for n in names if n in safe or chance.random() < likely}
    tree = Tree(deepcopy(recording.before), recording)
    for number, step in enumerate(steps):
        if step.kind in DATA:
            if number in safe or chance.random() < likely:
                tree.apply(step)
            elif step.kind == "write" and chance.random() < 0.5:
                tree.apply(_torn(step, chance))
        elif number in kept:
            tree.apply(step)
    return tree


def _safe(steps: list[Step]) -> set[int]:
    """The steps that were made durable by one after them."""
    safe: set[int] = set()
    synced: set[int] = set()
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        if step.kind in SYNCS:
            synced.add(step.nodes[0])
        elif step.nodes[0] in synced:  # of a rename the directory that it goes to
            safe.add(number)
    return safe


def _torn(step: Step, chance: random.Random) -> Step:
    end = chance.randrange(len(step.data) + 1)
    data = chance.choice(
        [step.data[:end], bytes(len(step.data)), step.data[:end].ljust(len(step.data), b"\0")]
    )
    return Step("write", step.nodes, offset=step.offset, data=data)


class Tree:
    """A disk after a cut."""

    def __init__(self, nodes: dict[int, Node], recording: Recording) -> None:
        self._nodes, self._recording = nodes, recording

    def apply(self, step: Step) -> None:
        """Do a step, unless one that it needs is missing."""
        getattr(self, f"_{step.kind}")(step)

    def write_to(self, folder: Path) -> Path:
        self._write_out(self._recording.root, folder)
        return folder

    def _node(self, number: int) -> Node:
        is_file = self._recording.nodes[number].entries is None
        return self._nodes.setdefault(number, Node(entries=None if is_file else {}))

    def _entries(self, number: int) -> dict[str, int]:
        entries = self._node(number).entries
        assert entries is not None
        return entries

    def _write(self, step: Step) -> None:
        content, end = self._node(step.nodes[0]).content, step.offset + len(step.data)
        content.extend(bytes(max(end - len(content), 0)))
        content[step.offset : end] = step.data

    def _resize(self, step: Step) -> None:
        content = self._node(step.nodes[0]).content
        del content[step.offset :]
        content.extend(bytes(step.offset - len(content)))

    def _create(self, step: Step) -> None:
        self._entries(step.nodes[0]).setdefault(step.names[0], step.moved[0])

    def _remove(self, step: Step) -> None:
        entries = self._entries(step.nodes[0])
        if entries.get(step.names[0]) == step.moved[0]:
            del entries[step.names[0]]

    def _rename(self, step: Step) -> None:
        target, source = map(self._entries, step.nodes)
        if source.get(step.names[1]) == step.moved[0]:
            del source[step.names[1]]
            target[step.names[0]] = step.moved[0]

    def _exchange(self, step: Step) -> None:
        a, b = map(self._entries, step.nodes)
        if (a.get(step.names[0]), b.get(step.names[1])) == step.moved:
            a[step.names[0]], b[step.names[1]] = step.moved[1], step.moved[0]

    def _write_out(self, number: int, path: Path) -> None:
        node = self._node(number)
        if node.entries is None:
            path.write_bytes(node.content)
            mtime_ns = self._recording.nodes[number].mtime_ns
            os.utime(path, ns=(mtime_ns, mtime_ns))
            return
        path.mkdir()
        for name, entry in node.entries.items():
            self._write_out(entry, path / name)
