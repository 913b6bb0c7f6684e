"""A device that runs out of memory when a test says so; and the places that devices are tried at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expo.compute.device import Device
from expo.operators.spectra import Library

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
PLACES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
"""The same code on this processor, where torch's kernels stand for a device's, and on a device where one is."""


class Full(Device):
    """A device of which `refuses` says, by the number of an operation in all and the elements that it gives, where its
    memory ends."""

    def __init__(
        self,
        refuses: Callable[[int, int], bool],
        library: Library | None = None,
        error: Callable[[str], RuntimeError] = torch.OutOfMemoryError,
        place: str = "cpu",
    ) -> None:
        super().__init__(torch.device(place), library)
        self.refused, self.done, self.largest = 0, 0, 0
        self._refuses, self._error = refuses, error

    @contextmanager
    def lane(self) -> Iterator[None]:
        with super().lane(), _Counting(self._count):
            yield

    def _count(self, elements: int) -> None:
        self.done += 1
        if self._refuses(self.done, elements):
            self.refused += 1
            raise self._error("no room, says the test")
        self.largest = max(self.largest, elements)


class _Counting(TorchDispatchMode):
    """Tells of every operation of torch's in this thread how many elements it gives."""

    def __init__(self, count: Callable[[int], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        self._count(given.numel() if isinstance(given, Tensor) else 0)
        return given
