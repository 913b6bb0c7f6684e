"""JSON lines that survive a kill: the configuration first, then what was done, each whole or not at all."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from expo.errors import OutputError
from expo.output.durable import unwritable

Configuration = Mapping[str, str]


class Journal:
    """An append-only file of one sweep. One process writes it at a time.

    Raises:
        OutputError: another process has it.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise unwritable(error, path) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise OutputError(
                f"{path} is being written by another sweep: wait for it, or name another OUT_DIR"
            ) from None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what was appended is durable, what failed was said
            self._file.close()

    def read(self, is_entry: Callable[[dict], bool]) -> tuple[Configuration | None, list[dict]]:
        """The configuration and the entries; None where there is none. A torn last line is cut off, and
        what follows a line that a power cut has damaged, or that is no entry."""
        lines, whole_bytes = [], 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                entry = None
            if not isinstance(entry, dict) or (lines and not is_entry(entry)):
                break
            lines.append(entry)
            whole_bytes += len(line)
        os.truncate(self._path, whole_bytes)
        known = lines[0].get(self._kind) if lines else None
        return (known, lines[1:]) if isinstance(known, dict) else (None, [])

    def start(self, configuration: Configuration) -> None:
        """Begin anew."""
        os.truncate(self._path, 0)
        self.append([{self._kind: dict(configuration)}])

    def append(self, entries: Iterable[Mapping[str, object]]) -> None:
        """Write entries durably, all in one go.

        Raises:
            OutputError: the disk is full, or does not take them.
        """
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(error, self._path, kept="the answers so far") from error


def is_ours(path: Path, kind: str) -> bool:
    """Whether a file is such a journal, even one whose first line is torn."""
    with path.open("rb") as file:
        start = file.read(len(kind) + 5)
    return f'{{"{kind}": '.encode().startswith(start)


def difference(known: Configuration, wanted: Configuration) -> str:
    """The names of what differs, for a message."""
    names = sorted(known.keys() | wanted.keys())
    return ", ".join(name for name in names if known.get(name) != wanted.get(name))
