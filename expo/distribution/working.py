"""What one worker among several does until all shards are there, or all of its share."""

import time
from collections.abc import Callable, Iterable, Sequence

from expo.compute.stream import Progress, Tuning, stream
from expo.distribution.shared import SharedStaging
from expo.output.sink import FinishedShard
from expo.planning.plan import Plan

_POLL_SECONDS, _LONGEST_SECONDS = 0.2, 1.0
"""Between two looks at what others are at: more and more, since every look asks a network filesystem for locks."""


class Team:
    """One merge, at one α or several, and this worker's part in the staging directory of each output."""

    def __init__(
        self,
        both: Sequence[tuple[Plan, SharedStaging]],
        *,
        tuning: Tuning = Tuning(),
        progress: Progress | None = None,
    ) -> None:
        self._both = both
        self._tuning, self._progress = tuning, progress

    def left(self) -> list[int]:
        """The numbers of the shards that some output still lacks."""
        lacking = (
            n for p, s in self._both for n, shard in enumerate(p.shards) if not s.holds(shard)
        )
        return sorted(set(lacking))

    def work(self, shards: Iterable[int]) -> bool:
        """Compute those of the shards that are to be had; whether there was one.

        Raises:
            CheckpointError, OSError: as `stream`.
        """
        computed = [number for number in shards if self._compute(number)]
        return bool(computed)

    def work_to_the_end(self, waits: Callable[[int], None]) -> None:
        """Compute what is to be had, and wait for the others, whose shards are to be had when they die.

        Args:
            waits: called with the number of shards that are waited for, when it changes.
        """
        waited_for, pause = 0, _POLL_SECONDS
        while left := self.left():
            if self.work(left):
                pause = _POLL_SECONDS
                continue
            if len(left) != waited_for:
                waited_for = len(left)
                waits(waited_for)
            if self._progress:
                there = (shard for both in self._both for shard in _there(*both))
                total = sum(plan.write_bytes for plan, _ in self._both)
                self._progress(sum(shard.file_bytes for shard in there), total)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_SECONDS)

    def _compute(self, number: int) -> bool:
        """Compute one shard into the outputs that lack it, unless others are at it."""
        mine = [(p, s) for p, s in self._both if s.claim(number, p.shards[number])]
        if not mine:
            return False
        stream(
            [plan for plan, _ in mine],
            [sink for _, sink in mine],
            finished=[_there(plan, sink) for plan, sink in mine],
            shards=[number],
            tuning=self._tuning,
            progress=self._progress,
        )
        return True


def _there(plan: Plan, sink: SharedStaging) -> list[FinishedShard]:
    """What is finished, by whoever: the journals have the rest of what is known of it."""
    return [FinishedShard(s.file, s.file_bytes, "") for s in plan.shards if sink.holds(s)]
