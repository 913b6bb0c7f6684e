"""Work on matrices side by side: one thread each, results in order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """What `work` makes of each item, in their order; the first failure ends it.

    Args:
        progress: called with (results so far, results in all).
    """

    def alone(item: Item) -> Result:
        torch.set_num_threads(1)  # of this thread: two contend for the same cores
        return work(item)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(alone, item) for item in items]
        try:
            for number, future in enumerate(futures):
                yield future.result()
                if progress:
                    progress(number + 1, len(items))
        finally:
            for future in futures:
                future.cancel()
