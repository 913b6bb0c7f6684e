"""What has to be known of whole tensors and matrices before their first block, made once for all workers."""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from expo.planning.jobs import Blend, TensorJob

T = TypeVar("T")

Unit = tuple[TensorJob, int | None]
"""A tensor of a job, or one of its edited matrices by number."""

_Key = tuple[int, int | None]


class Preparations(Generic[T]):
    """Made by the first worker that needs them, dropped when all their elements are computed.

    A worker that finds what it needs under way makes one of those that come next meanwhile, so that
    tensors and matrices are prepared side by side, at most `ahead` of them before their turn.
    """

    def __init__(self, jobs: Iterable[TensorJob] = (), ahead: int = 0) -> None:
        self._order: list[Unit] = [unit for job in jobs for unit in _units(job)]
        self._places = {_key(unit): place for place, unit in enumerate(self._order)}
        self._ahead = ahead
        self._changed = threading.Condition()
        self._made: dict[_Key, T] = {}
        self._taken: set[_Key] = set()  # being made, made or dropped
        self._left: dict[_Key, int] = {}

    def get(self, unit: Unit, make: Callable[[Unit], T]) -> T:
        key = _key(unit)
        while True:
            with self._changed:
                if key in self._made:
                    return self._made[key]
                chosen = self._choose(unit)
                if chosen is None:
                    self._changed.wait()
                    continue
                self._taken.add(_key(chosen))
            self._make(chosen, make)

    def done(self, unit: Unit, count: int, whole: int) -> None:
        """`count` of the `whole` elements are computed; forget the unit once all are."""
        key = _key(unit)
        with self._changed:
            left = self._left.get(key, whole) - count
            self._left[key] = left
            if left == 0:
                self._made.pop(key, None)

    def _choose(self, unit: Unit) -> Unit | None:
        """The unit itself, or one that comes next, if nobody has it in hand."""
        place = self._places.get(_key(unit))
        following = [] if place is None else self._order[place + 1 : place + 1 + self._ahead]
        free = (one for one in (unit, *following) if _key(one) not in self._taken)
        return next(free, None)

    def _make(self, unit: Unit, make: Callable[[Unit], T]) -> None:
        key = _key(unit)
        try:
            made = make(unit)
        except BaseException:
            with self._changed:
                self._taken.discard(key)
                self._changed.notify_all()
            raise
        with self._changed:
            self._made[key] = made
            self._changed.notify_all()


def _units(job: TensorJob) -> list[Unit]:
    whole = isinstance(job.rule, Blend) and job.rule.needs_whole
    return [*([(job, None)] if whole else []), *((job, n) for n in range(len(job.matrices)))]


def _key(unit: Unit) -> _Key:
    return id(unit[0]), unit[1]  # of several plans, each has a job for the tensor
