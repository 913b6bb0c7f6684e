"""The one way in which threads are started: they end together, on the first failure or when all is done."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

from expo.errors import ExpoError

DEFAULT_THREADS = 3  # workers of a merge: two compute, one waits for the disk

CREW = "expo"
"""The name of every thread that expo starts: libraries start others, which it does not end."""

_POLL_SECONDS = 0.2

Item = TypeVar("Item")
Result = TypeVar("Result")
T = TypeVar("T")


class Stopped(Exception):
    """Another thread failed or the user interrupted: leave quietly."""


class Flow(Generic[T]):
    """A queue between two threads that gives up when the crew stops."""

    def __init__(self, stop: threading.Event) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._stop = stop

    def put(self, item: T) -> None:
        self._queue.put(item)

    def get(self) -> T:
        while not self._stop.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
        raise Stopped


class Crew:
    """Threads at work together. Leaving the context stops and joins them; the first failure of any is
    raised there, unless something else is on its way."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if self._failure is not None and (kind is None or issubclass(kind, Stopped)):
            raise self._failure

    def flow(self) -> Flow:
        return Flow(self._stop)

    def start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(work,), name=CREW, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise ExpoError(
                "a thread cannot be started: raise the limits on processes and memory (ulimit -u -v), or take "
                "fewer --threads"
            ) from error
        self._threads.append(thread)

    def pause(self, seconds: float) -> None:
        """Wait, in one of the threads. Raises Stopped when the crew ends."""
        if self._stop.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        """End every thread at its next wait."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, tick: Callable[[], None]) -> None:
        """Until every thread has ended or one has failed; `tick` is called now and then from this one."""
        for thread in self._threads:
            while thread.is_alive() and not self._stop.is_set():
                thread.join(_POLL_SECONDS / 2)
                tick()
        tick()

    def _guarded(self, work: Callable[[], None]) -> None:
        _here.crew = self
        try:
            torch = sys.modules.get("torch")  # it may be half imported
            if torch is not None and hasattr(torch, "set_num_threads"):
                torch.set_num_threads(1)  # of this thread: two contend for the same cores
            work()
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that waits
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()


_here = threading.local()


def pause(seconds: float) -> None:
    """Sleep, in any thread; in one of a crew that ends, Stopped is raised."""
    if crew := getattr(_here, "crew", None):
        crew.pause(seconds)
    else:
        time.sleep(seconds)


class PerThread(Generic[T]):
    """One of something for every thread that asks."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._local = make, threading.local()

    def __call__(self) -> T:
        if not hasattr(self._local, "one"):
            self._local.one = self._make()
        return self._local.one


class WhileInside:
    """A setting of the whole process, made by the first thread that comes and undone by the last that leaves.

    Args:
        begin: makes it, and gives what undoes it.
    """

    def __init__(self, begin: Callable[[], Callable[[], None]]) -> None:
        self._begin, self._lock, self._inside = begin, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._undo = self._begin()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo()


def side_by_side(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """What `work` makes of each item, in their order; the first failure ends it.

    No more than two results a thread wait for their turn.

    Args:
        progress: called with (results so far, results in all).
    """
    known = list(items)
    numbered, lock = enumerate(known), threading.Lock()
    with Crew() as crew:
        made: Flow[tuple[int, Result]] = crew.flow()
        turns: Flow[None] = crew.flow()
        for _ in range(2 * threads):
            turns.put(None)

        def loop() -> None:
            while True:
                turns.get()
                with lock:
                    number, item = next(numbered, (None, None))
                if number is None:
                    return
                made.put((number, work(item)))  # type: ignore[arg-type]

        for _ in range(threads):
            crew.start(loop)
        waiting: dict[int, Result] = {}
        for number in range(len(known)):
            while number not in waiting:
                done, result = made.get()
                waiting[done] = result
            yield waiting.pop(number)
            turns.put(None)
            if progress:
                progress(number + 1, len(known))
