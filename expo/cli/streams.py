"""The standard streams, the one way to the terminal: what is written there shows, and does nothing.

Whatever would act on a terminal or not be seen comes out as an escape, so that no caller can forget it. What cannot
be printed is one line and an exit code; talk that nobody can hear is no reason to fail.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from expo.checkpoint.shown import visible, without_secrets

_OWN = os.urandom(8).hex()  # what no text from outside can hold
_RED, _PLAIN = f"<{_OWN}>", f"</{_OWN}>"


def red(text: str) -> str:
    """Red on a terminal that wants colours, plain elsewhere."""
    return f"{_RED}{text}{_PLAIN}"


def _shown(text: str, stream: TextIO) -> str:
    """What shows of a text, in characters that the stream can hold. On a terminal a bar begins with a return to the
    start of its line, which covers nothing but the bar."""
    start = "\r" if text.startswith("\r") and stream.isatty() else ""
    shown = re.sub(r"[^\n\t]+", lambda piece: visible(piece[0]), text.removeprefix(start))
    has_colours = stream.isatty() and not os.environ.get("NO_COLOR")
    shown = shown.replace(_RED, "\x1b[31m" if has_colours else "")
    shown = shown.replace(_PLAIN, "\x1b[0m" if has_colours else "")
    encoding = stream.encoding or "utf-8"
    return start + shown.encode(encoding, "backslashreplace").decode(encoding)


class Unprinted(Exception):
    """stdout is full or closed: the work is done, what came of it could not be said."""


class _Talk:
    """A text stream that falls silent where it cannot be written. Of addresses it tells no secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.buffer = _Bytes(self)
        self._broken: OSError | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._put(without_secrets(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _put(self, text: str) -> None:
        shown = _shown(text, self._stream)
        self._attempt(lambda: self._stream.write(shown))

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            if self._broken is None:
                act()
        except OSError as error:
            self._broken = error
            # Python flushes once more at its end, and would complain in its own words
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Bytes:
    """A text stream for bytes, as click takes for its scripts: no way around the text stream."""

    def __init__(self, stream: _Talk) -> None:
        self._stream = stream

    def write(self, raw: bytes) -> int:
        self._stream.write(raw.decode(errors="backslashreplace"))
        return len(raw)

    def flush(self) -> None:
        self._stream.flush()


class _Data(_Talk):
    """A text stream that says, each time, that it cannot be written: click tries before it writes.

    What it is given is data for programs too: nothing is left out of it.
    """

    def write(self, text: str) -> int:
        self._put(text)
        return len(text)

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


def crashed(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """What nobody has foreseen quotes what files hold as well."""
    with guarded():
        traceback.print_exception(error)
