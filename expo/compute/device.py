"""A device that tensors are computed on: streams, page-locked memory, and what to do when there is no more room."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from expo.checkpoint.headers import ALIGNMENT
from expo.checkpoint.reader import Bytes, aligned_buffer
from expo.compute.devices import usable
from expo.errors import ExpoError
from expo.operators.spectra import ON_DEVICE, ON_DEVICE_DOUBLE, Library

CHUNK_BYTES = (16 << 20) - (32 << 10)
"""Of a run on a device: page-locked buffers come in powers of two, and one for a chunk, with its pages around, takes
all of 16 MB."""

_GOOD_AT_DOUBLES = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})
"""Compute capabilities with float64 at half the rate of float32 (P100, V100, A100, H100 and H200, B200); on others it
is a 32nd or a 64th."""

_FULL = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED", "cublasCreate", "cusolverDnCreate")
"""What the allocator and CUDA say, and what cuBLAS and cuSOLVER do: their handles need memory, too."""


class Device:
    """One device, shared by the threads of a run.

    Whoever is in a `lane` has a stream to itself. What the thread does goes through it in order, and the thread waits
    for it before it looks at a result or fills a buffer again. So no memory, here or there, is used by two streams at
    once, and nothing else has to be kept in step. Who comes next takes the stream that was left last: torch keeps
    memory for every stream apart, so there are no more of them than threads in a lane at once. While the bytes of one
    thread are on the bus, which carries both ways at once, kernels of another run, and a third reads: copies and
    compute overlap as soon as there are three threads.

    Args:
        place: any device of torch's, the processor too: there is nothing to overlap then.
        library: takes matrices apart there; by default as the device is good at float64.
    """

    def __init__(self, place: torch.device, library: Library | None = None) -> None:
        self.place, self.library = place, library or _library(place)
        self.turnstile = Turnstile()
        self._free: list[torch.cuda.Stream] = []

    @property
    def backend(self) -> str:
        """What decides the last bits of a decomposition."""
        is_cuda = self.place.type == "cuda"
        name = f" {torch.cuda.get_device_name(self.place)}," if is_cuda else ""
        return f"{self.place.type}:{name} torch {torch.__version__}"

    @contextmanager
    def lane(self) -> Iterator[None]:
        """Work on a stream of one's own; when left, by whatever way, all of the work is done.

        Raises:
            ExpoError: the device failed.
        """
        if self.place.type != "cuda":
            yield
            return
        try:
            stream = self._free.pop()  # at once, whatever other threads do
        except IndexError:
            stream = torch.cuda.Stream(self.place)
        with self._failing(), torch.cuda.stream(stream):
            try:
                yield
            finally:
                stream.synchronize()  # else a late copy could reach a buffer that has a new use
                self._free.append(stream)

    def buffer(self, nbytes: int) -> Bytes:
        """Memory of this machine that starts on a page and is locked, so that the device copies from and to it by
        itself; pageable, which only is slower, where the system locks no more."""
        if self.place.type != "cuda":
            return aligned_buffer(nbytes)
        try:
            with torch.cuda.device(self.place):
                room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError:
            return aligned_buffer(nbytes)
        gap = -room.ctypes.data % ALIGNMENT
        return room[gap : gap + nbytes]

    def make_room(self) -> None:
        """Give back what is kept for later. Not from a handler: the error holds what filled the device."""
        if self.place.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What CUDA reports, in words. It works for nobody in this process then."""
        try:
            yield
        except torch.AcceleratorError as error:
            if is_full(error):
                raise
            said = str(error).strip().partition("\n")[0][:200]
            raise ExpoError(
                f"the device {self.place} failed ({said}): run the same command again, or with --device cpu; nvidia-smi and "
                "dmesg say more"
            ) from error


class Turnstile:
    """Many go through at once, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = self._want_all = 0

    @contextmanager
    def entered(self, *, alone: bool) -> Iterator[None]:
        """Be inside: with others, who wait meanwhile for those that want to be alone, or when nobody else is."""
        with self._changed:
            self._want_all += alone
            self._changed.wait_for(lambda: not (self._inside if alone else self._want_all))
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._want_all -= alone
                self._changed.notify_all()


def open_device(name: str) -> Device:
    """The device of a name, `cuda` or `cuda:1`.

    Raises:
        ExpoError: it is not there, or torch cannot use it.
    """
    return Device(usable(name))


def is_full(error: RuntimeError) -> bool:
    """Whether a device has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _FULL)


def _library(place: torch.device) -> Library:
    if place.type == "cuda" and torch.cuda.get_device_capability(place) not in _GOOD_AT_DOUBLES:
        return ON_DEVICE
    return ON_DEVICE_DOUBLE
