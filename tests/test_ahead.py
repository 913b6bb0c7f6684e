"""What is fetched ahead: every byte once, no more in memory than allowed, whoever asks for what."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo.checkpoint.memory import Memory
from expo.checkpoint.reader import Bytes
from expo.compute.ahead import ReadAhead
from expo.planning.reads import FileRange
from expo.threads import side_by_side

CONTENT = np.arange(5000, dtype=np.uint32).view(np.uint8)


class Elsewhere(Memory):
    """Files in memory that count as far away."""

    def is_local(self, name: str) -> bool:
        return False


@dataclass
class Counting:
    """A reader that counts how often each byte is asked for, and fails from `bad` on."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(CONTENT.size, dtype=int))
    bad: int = CONTENT.size
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open_range(self, begin: int, nbytes: int, buffer: Bytes) -> Bytes:
        self.copy(begin, buffer[:nbytes])
        return buffer[:nbytes]

    def copy(self, begin: int, target: Bytes) -> None:
        if begin + target.size > self.bad:
            raise OSError("the server is gone")
        with self.lock:
            self.counts[begin : begin + target.size] += 1
        target[:] = CONTENT[begin : begin + target.size]

    def close(self) -> None:
        pass


FILES = Elsewhere("far", {"a": CONTENT, "b": CONTENT})
Ranges = list[tuple[str, int, int]]


def read_all(steps: list[Ranges], counting: dict[str, Counting], threads: int) -> None:
    """Read every range of every step as workers do, and compare."""
    expected = [[FileRange(FILES, name, b, e) for name, b, e in step] for step in steps]
    ahead = ReadAhead(expected, lambda _, name: counting[name], request_bytes=64, ahead_bytes=256)
    ahead.start()

    def work(numbered: tuple[int, Ranges]) -> None:
        number, step = numbered
        for name, begin, end in step:
            reader = ahead.reader(FILES, name) or counting[name]
            found = reader.open_range(begin, end - begin, np.empty(end - begin, dtype=np.uint8))
            assert np.array_equal(found, CONTENT[begin:end])
        ahead.done(number)

    try:
        list(side_by_side(work, enumerate(steps), threads))
    finally:
        ahead.end()


a_range = st.tuples(st.sampled_from("ab"), st.integers(0, 900), st.integers(0, 300)).map(
    lambda one: (one[0], one[1], one[1] + one[2])
)


@given(st.lists(st.lists(a_range, max_size=4), max_size=8), st.integers(1, 3))
def test_each_byte_is_fetched_once(steps: list[Ranges], threads: int) -> None:
    counting = {"a": Counting(), "b": Counting()}
    read_all(steps, counting, threads)
    wanted = {name: np.zeros(CONTENT.size, dtype=int) for name in counting}
    for name, begin, end in (one for step in steps for one in step):
        wanted[name][begin:end] = 1
    for name, counted in counting.items():
        assert np.array_equal(counted.counts, wanted[name])


def test_what_nobody_asks_for_stays_within_bounds() -> None:
    steps = [[FileRange(FILES, "a", at, at + 64)] for at in range(0, 6400, 64)]
    counting = Counting()
    ahead = ReadAhead(steps, lambda *_: counting, request_bytes=64, ahead_bytes=256)
    ahead.start()
    reader = ahead.reader(FILES, "a")
    assert reader is not None
    for number in range(100):
        reader.open_range(64 * number, 64, np.empty(64, dtype=np.uint8))
        with counting.lock:
            assert counting.counts.sum() <= 64 * (number + 1 + 4)
        ahead.done(number)
    ahead.end()
    assert counting.counts.sum() == 6400


def test_a_tensor_that_is_larger_than_the_bound_is_held() -> None:
    steps: list[Ranges] = [[("a", 0, 2000)]] * 3 + [[("a", 2000, 2100)]]
    counting = {"a": Counting(), "b": Counting()}
    read_all(steps, counting, 2)
    assert counting["a"].counts.sum() == 2100


def test_a_failure_reaches_who_asks() -> None:
    steps: list[Ranges] = [[("a", 64 * at, 64 * at + 64)] for at in range(20)]
    with pytest.raises(OSError, match="the server is gone"):
        read_all(steps, {"a": Counting(bad=640), "b": Counting()}, 2)


def test_what_was_not_expected_or_is_done_with_is_asked_directly() -> None:
    counting = Counting()
    ahead = ReadAhead([[FileRange(FILES, "a", 100, 200)]], lambda *_: counting)
    ahead.start()
    reader = ahead.reader(FILES, "a")
    assert reader is not None
    assert np.array_equal(
        reader.open_range(50, 300, np.empty(300, dtype=np.uint8)), CONTENT[50:350]
    )
    ahead.done(0)
    assert np.array_equal(
        reader.open_range(100, 50, np.empty(50, dtype=np.uint8)), CONTENT[100:150]
    )
    assert ahead.reader(FILES, "b") is None
    ahead.end()
