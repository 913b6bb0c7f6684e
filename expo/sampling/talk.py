"""What a user's code prints is talk, not data: it goes to stderr, whoever prints it."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress

_OUT, _ERR = 1, 2


@contextmanager
def to_stderr() -> Iterator[None]:
    """stdout leads to stderr: that of Python, of C libraries, and of processes that are started meanwhile."""
    with ExitStack() as stack:
        with suppress(OSError):  # one of them is closed
            _flush()  # what was data before stays data
            kept = os.dup(_OUT)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, _OUT)
            stack.callback(_flush)
            os.dup2(_ERR, _OUT)
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _flush() -> None:
    """Send on what buffers hold, of streams that were kept from before too."""
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()  # pyright: ignore[reportOptionalMemberAccess]
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)
