"""Ranges of a file that lies elsewhere: asked again where an answer fails, refused where it is another file's."""

import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from expo.checkpoint.contents import mistaken
from expo.checkpoint.headers import printable
from expo.checkpoint.reader import Bytes
from expo.errors import CheckpointError, MistakenFileError
from expo.threads import Stopped

TRIES = 6  # without a byte between them
FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
_LONGEST_ASKED_SECONDS = 600.0  # a server that asks for more patience than that is down


class Again(Exception):
    """A request failed in a way that another one may not: why, how many seconds the server asks for, and the
    cure where it goes on failing."""

    def __init__(
        self, why: str, after: float | None = None, *, cure: str = "run again later"
    ) -> None:
        super().__init__(why)
        self.after, self.cure = after, cure


class Source(Protocol):
    """One file at a server."""

    def request(self, begin: int, target: Bytes) -> Iterator[int]:
        """Ask once for the bytes from `begin`, fill `target` and yield how many came, as they come.

        Raises:
            Again: the answer was none, or not the one that was asked for.
            CheckpointError, HubError: asking again is of no use.
        """
        ...


class RangeReader:
    """A `Reader` of a file at a server. What has come is not asked for again.

    Args:
        head: the first bytes of the file, where they are known already.
    """

    def __init__(self, source: Source, name: str, head: bytes = b"") -> None:
        self._source, self.name, self._head = source, name, head
        self._closed = threading.Event()

    def open_range(self, begin: int, nbytes: int, buffer: Bytes) -> Bytes:
        self.copy(begin, buffer[:nbytes])
        return buffer[:nbytes]

    def copy(self, begin: int, target: Bytes) -> None:
        """As `Reader`.

        Raises:
            CheckpointError: the server fails again and again, or has another file by now.
            HubError: the Hub refuses.
        """
        done, failures = self._from_head(begin, target), 0
        while done < target.size:
            before = done
            try:
                for count in self._source.request(begin + done, target[done:]):
                    done += count
                    self._check_open()
                fault = Again("the answer ended early")
            except Again as again:
                fault = again
            failures = failures + 1 if done == before else 1
            if done < target.size:
                self._wait(failures, fault)

    def close(self) -> None:
        """End every pause and every answer that is being read."""
        self._closed.set()

    def _from_head(self, begin: int, target: Bytes) -> int:
        known = memoryview(self._head)[begin : begin + target.size]
        target[: len(known)] = known
        return len(known)

    def _wait(self, failures: int, fault: Again) -> None:
        if failures >= TRIES or (fault.after or 0.0) > _LONGEST_ASKED_SECONDS:
            tries = f"{failures} tries" if failures > 1 else "1 try"
            raise CheckpointError(f"{self.name} cannot be read: {fault} ({tries}): {fault.cure}")
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (failures - 1), _LONGEST_PAUSE_SECONDS)
        self._closed.wait(pause if fault.after is None else fault.after)
        self._check_open()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Stopped


def changed(name: str) -> CheckpointError:
    """What to raise where an answer is of another file than the one that was listed."""
    return CheckpointError(f"{name} changed while it was read: run again")


def read_range(
    reader: RangeReader, begin: int, end: int, heads: dict[str, bytes], name: str
) -> bytes:
    """Bytes begin … end of a file; in `heads` its start is kept, so that no byte of it is asked for twice.

    Raises:
        MistakenFileError: it begins as no file of a model does.
    """
    content = np.empty(max(end - begin, 0), dtype=np.uint8)
    reader.copy(begin, content)
    known = heads.get(name, b"")
    if begin <= len(known) < begin + content.size:
        heads[name] = known[:begin] + content.tobytes()
    if begin == 0 and (fault := mistaken(content.tobytes())):
        raise MistakenFileError(f"{printable(reader.name)} {fault}")
    return content.tobytes()
