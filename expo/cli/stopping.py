"""How the program ends when it is told to: at once, with one line.

Raising in whatever the signal meets would lose it in an import, a callback or a destructor. And nothing has to be
cleaned up: what a run leaves is what a power cut leaves, which the next one goes on from.
"""

import contextlib
import os
import signal

# Not imported: until signals are minded, every import is one that they can break.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

RESUMABLE: "list[Path]" = []
"""The outputs that this process has begun to write, for the message on an interruption."""

_ENDS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}


class Stop(BaseException):
    """A signal arrived where something has to be waited for. Nothing but the entry point may swallow it."""

    def __init__(self, number: int) -> None:
        self.number = number


def mind_signals() -> None:
    """From here on SIGINT and SIGTERM end the process, unless they were ignored when it began."""
    _handle(_end)


def last_words(number: int) -> tuple[str, int]:
    """What is said when a signal ends the program, and its exit code."""
    word, code = _ENDS[signal.Signals(number)]
    resume = "; what is finished is kept, run the same command again to resume" if RESUMABLE else ""
    return f"expo: {word}{resume}", code


@contextlib.contextmanager
def gently() -> "Iterator[None]":
    """The first signal raises `Stop`, so that what is under way can be waited for; the next one ends the process."""

    def once(number: int, _frame: "FrameType | None") -> None:
        _handle(_end)
        raise Stop(number)

    is_minded = signal.getsignal(signal.SIGINT) is _end or signal.getsignal(signal.SIGTERM) is _end
    if is_minded:
        _handle(once)
    try:
        yield
    finally:
        if is_minded:
            _handle(_end)


def finish_with(code: int) -> None:
    """All is done and said: a signal only makes the process end sooner."""
    _handle(lambda _number, _frame: os._exit(code))


def ignore_signals() -> None:
    """For the last moments, in which Python would give signals back their defaults."""
    _handle(signal.SIG_IGN)


def _handle(handler: "Callable[[int, FrameType | None], None] | signal.Handlers") -> None:
    for number in _ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _end(number: int, _frame: "FrameType | None") -> None:
    words, code = last_words(number)
    with contextlib.suppress(OSError):  # stderr may be closed
        below = "\n" if os.isatty(2) else ""  # the terminal's ^C, or a bar
        os.write(2, f"{below}{words}\n".encode())
    os._exit(code)
