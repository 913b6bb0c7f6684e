"""The standard streams: what cannot be printed is one line and an exit code; talk that nobody can hear is
no reason to fail."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO


class Unprinted(Exception):
    """stdout is full or closed: the work is done, what came of it could not be said."""


class _Talk:
    """A text stream that falls silent where it cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken: OSError | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            if self._broken is None:
                act()
        except OSError as error:
            self._broken = error
            # Python flushes once more at its end, and would complain in its own words
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Data(_Talk):
    """A text stream that says, each time, that it cannot be written: click tries before it writes."""

    def _attempt(self, act: Callable[[], object]) -> None:
        super()._attempt(act)
        if self._broken is not None:
            raise Unprinted(self._broken.strerror) from self._broken


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """stdout raises `Unprinted` where it cannot be written, stderr falls silent."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(_Data(sys.stdout)))  # type: ignore[type-var]
        talk = sys.stderr or stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stderr(_Talk(talk)))  # type: ignore[type-var]
        yield
