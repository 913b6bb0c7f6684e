"""One budget for all child processes of a verification: what they take together, and how long they are waited for."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from expo.threads import Crew
from expo.verification.process import MEMORY_BYTES, WAIT_SECONDS, Process, Report

_LOOK_SECONDS = 0.02  # a process that only fills memory takes 0.1 GB meanwhile


@contextmanager
def bounded(processes: Sequence[Process], *, memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Whenever the processes take more than `memory_bytes` together, the largest is ended.

    A part for each would be too small for the tokenizer with the largest vocabulary, whose neighbours need little.
    """
    with Crew() as crew:

        def watch() -> None:
            while any(process.is_running for process in processes):
                sizes = [process.own_bytes for process in processes]
                if sum(sizes) > memory_bytes:
                    processes[sizes.index(max(sizes))].end(
                        f"took more memory than the {memory_bytes / 1e9:.1f} GB that a verification has"
                    )
                crew.pause(_LOOK_SECONDS)

        crew.start(watch)
        yield


def reports(
    processes: Sequence[Process | None], *, seconds: float = WAIT_SECONDS
) -> list[Report | None]:
    """What came of each, after so much time for all of them."""
    ends = time.monotonic() + seconds
    return [p and p.report(max(0.0, ends - time.monotonic())) for p in processes]
