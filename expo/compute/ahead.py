"""Ranges of files that lie elsewhere, fetched before they are asked for, by more requests at once than workers.

The steps of a run say in their order which ranges they need. Every byte of them is in one span, every span is
fetched once, and it is kept until the last of its steps is done.
"""

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from expo.checkpoint.files import Files
from expo.checkpoint.reader import Bytes, Reader, aligned_buffer
from expo.planning.reads import AHEAD_BYTES, REQUEST_BYTES, REQUESTS, FileRange
from expo.threads import Crew, Stopped

_ALIGNMENT = (
    64  # data lies in memory as it does in its file, so that its elements are aligned in both
)

Steps = Iterable[Iterable[FileRange]]
_Asked = dict[tuple[int, int], set[int]]  # (begin, end) → the steps that need it


class _State(Enum):
    WAITING, COMING, HERE, FAILED, GONE = range(5)


@dataclass(slots=True, eq=False)
class _Span:
    """Bytes begin … end of a file, which `steps` need."""

    reader: Reader
    begin: int
    end: int
    steps: frozenset[int]
    users: int
    state: _State = _State.WAITING
    room: Bytes | None = None
    error: BaseException | None = None

    @property
    def first(self) -> int:
        return min(self.steps)

    @property
    def data(self) -> Bytes:
        assert self.room is not None
        gap = self.begin % _ALIGNMENT
        return self.room[gap : gap + self.end - self.begin]


class ReadAhead:
    """Fetches the spans in the order of their steps. Of those that nobody has asked for yet, no more than
    `ahead_bytes` are in memory.

    Args:
        direct: opens the reader that asks a server.
    """

    def __init__(
        self,
        steps: Steps,
        direct: Callable[[Files, str], Reader],
        *,
        request_bytes: int = REQUEST_BYTES,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._room_bytes = request_bytes + _ALIGNMENT
        self._most_ahead = ahead_bytes // request_bytes
        self._files: dict[tuple[int, str], _Ahead] = {}
        for (files, name), asked in _asked(steps).items():
            reader = direct(files, name)
            spans = list(_spans(reader, asked, request_bytes))
            self._files[id(files), name] = _Ahead(self, reader, spans)
        every = (span for file in self._files.values() for span in file.spans)
        self._order = sorted(every, key=lambda span: span.first)
        self._of_step: dict[int, list[_Span]] = defaultdict(list)
        for span in self._order:
            for step in span.steps:
                self._of_step[step].append(span)
        self._next, self._reached, self._live = 0, -1, 0
        self._free: list[Bytes] = []
        self._changed = threading.Condition()
        self._crew, self._ended = Crew(), False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to fetch."""
        return not self._order

    def start(self) -> None:
        for _ in range(min(REQUESTS, len(self._order))):
            self._crew.start(self._fetch_all)

    def end(self) -> None:
        """Fetch no more, and let go of whoever waits."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for file in self._files.values():
            file.close()
        self._crew.stop()

    def reader(self, files: Files, name: str) -> Reader | None:
        """In place of the direct one, where ranges of the file are expected."""
        return self._files.get((id(files), name))

    def done(self, step: int) -> None:
        """Forget what no other step needs."""
        with self._changed:
            for span in self._of_step.pop(step, ()):
                span.users -= 1
                if not span.users:
                    self._release(span)
            self._changed.notify_all()

    def ready(self, span: _Span) -> bool:
        """Wait for a span that a step needs; whether it is there: one that is done with is not."""
        with self._changed:
            if span.first > self._reached:
                self._reached = span.first
                self._changed.notify_all()
            mine = span.state is _State.WAITING
            if mine:
                self._claim(span)
        if mine:
            self._fetch(span)
        with self._changed:
            self._changed.wait_for(lambda: span.state is not _State.COMING or self._ended)
            if span.error is not None:
                raise span.error
            if span.state is _State.COMING:
                raise Stopped
            return span.state is _State.HERE

    def _fetch_all(self) -> None:
        while (span := self._upcoming()) is not None:
            self._fetch(span)

    def _upcoming(self) -> _Span | None:
        """The next span that has room: steps under way always have, whatever they hold."""
        with self._changed:
            while not self._ended:
                while self._next < len(self._order) and self._order[self._next].state is not _State.WAITING:  # fmt: skip
                    self._next += 1
                if self._next == len(self._order):
                    return None
                span = self._order[self._next]
                if span.first <= self._reached or self._live < self._most_ahead:
                    self._claim(span)
                    return span
                self._changed.wait()
        return None

    def _claim(self, span: _Span) -> None:
        span.state = _State.COMING
        span.room = self._free.pop() if self._free else aligned_buffer(self._room_bytes)
        self._live += 1

    def _fetch(self, span: _Span) -> None:
        try:
            span.reader.copy(span.begin, span.data)
            state = _State.HERE
        except BaseException as error:  # raised by whoever asks for the span
            span.error, state = error, _State.FAILED
        with self._changed:
            span.state = state
            if not span.users:
                self._release(span)
            self._changed.notify_all()

    def _release(self, span: _Span) -> None:
        if span.state is _State.COMING:
            return  # whoever fetches it will see that it has no user
        if span.room is not None:
            self._live -= 1
            if len(self._free) < self._most_ahead:
                self._free.append(span.room)
        span.state, span.room = _State.GONE, None


@dataclass
class _Ahead:
    """The `Reader` of one file whose ranges are fetched ahead. What is not expected is asked for directly."""

    ahead: ReadAhead
    direct: Reader
    spans: list[_Span]
    begins: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.begins = [span.begin for span in self.spans]

    def open_range(self, begin: int, nbytes: int, buffer: Bytes) -> Bytes:
        number = bisect_right(self.begins, begin) - 1
        span = self.spans[number] if number >= 0 else None
        if span is not None and begin + nbytes <= span.end and self.ahead.ready(span):
            return span.data[begin - span.begin : begin - span.begin + nbytes]
        self.copy(begin, buffer[:nbytes])
        return buffer[:nbytes]

    def copy(self, begin: int, target: Bytes) -> None:
        done = 0
        while done < target.size:
            done += self._part(begin + done, target[done:])

    def close(self) -> None:
        self.direct.close()

    def _part(self, begin: int, target: Bytes) -> int:
        """Fill the start of `target`, up to where a span ends or starts."""
        number = bisect_right(self.begins, begin)
        span = self.spans[number - 1] if number else None
        if span is not None and begin < span.end and self.ahead.ready(span):
            part = span.data[begin - span.begin :][: target.size]
            target[: part.size] = part
            return part.size
        following = self.begins[number] if number < len(self.begins) else begin + target.size
        count = min(target.size, following - begin)
        self.direct.copy(begin, target[:count])
        return count


class _Place(tuple[Files, str]):
    """A file, told from others by identity: places need not be hashable."""

    def __hash__(self) -> int:
        return hash((id(self[0]), self[1]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place) and self[0] is other[0] and self[1] == other[1]


def _asked(steps: Steps) -> dict[_Place, _Asked]:
    """Which steps need which ranges of which files that are not on this disk."""
    found: dict[_Place, _Asked] = {}
    is_local: dict[_Place, bool] = {}
    for number, ranges in enumerate(steps):
        for one in ranges:
            place = _Place((one.files, one.name))
            if place not in is_local:
                is_local[place] = one.files.is_local(one.name)
            if not is_local[place] and one.begin < one.end:
                found.setdefault(place, {}).setdefault((one.begin, one.end), set()).add(number)
    return found


def _spans(reader: Reader, asked: _Asked, request_bytes: int) -> Iterator[_Span]:
    """The ranges of one file, cut so that no two overlap, neighbours that the same steps need as one."""
    run: tuple[int, int, frozenset[int]] | None = None
    for begin, end, steps in _disjoint(asked):
        if run is not None and run[1] == begin and run[2] == steps:
            run = (run[0], end, steps)
            continue
        yield from _requests(reader, run, request_bytes)
        run = (begin, end, steps)
    yield from _requests(reader, run, request_bytes)


def _disjoint(asked: _Asked) -> Iterator[tuple[int, int, frozenset[int]]]:
    starting, ending = defaultdict(list), defaultdict(list)
    for (begin, end), steps in asked.items():
        starting[begin].append(steps)
        ending[end].append(steps)
    users: dict[int, int] = defaultdict(int)
    for begin, end in pairwise(sorted({*starting, *ending})):
        for change, sets in ((-1, ending[begin]), (1, starting[begin])):
            for step in (step for steps in sets for step in steps):
                users[step] += change
                if not users[step]:
                    del users[step]
        if users:
            yield begin, end, frozenset(users)


def _requests(
    reader: Reader, run: tuple[int, int, frozenset[int]] | None, request_bytes: int
) -> Iterator[_Span]:
    """Equal parts of a run, none of more than `request_bytes`."""
    if run is None:
        return
    begin, end, steps = run
    parts = -(-(end - begin) // request_bytes)
    edges = [begin + (end - begin) * part // parts for part in range(parts + 1)]
    for first, last in pairwise(edges):
        yield _Span(reader, first, last, steps, len(steps))
