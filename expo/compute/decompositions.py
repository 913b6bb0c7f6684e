"""Where matrices are taken apart: on this processor, or on a device that is lent them one by one."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from expo.compute.device import Device, is_full
from expo.operators import decompose
from expo.operators.decompose import Cut
from expo.operators.rules import Keep
from expo.operators.spectra import LAPACK, Library
from expo.threads import WhileInside

T = TypeVar("T")

Work = Callable[[Tensor, Library], T]
"""What to do with a matrix, by the library of the place where it is."""


@dataclass(frozen=True)
class Decompositions:
    """The operators of `decompose`, on `device` where there is one; matrices come from this machine's memory, and
    what is asked for comes back there, with whether the processor took the place of the device.

    A matrix for which the device has no room is tried again when no other one is there, and then goes to the
    processor, as does one that the device's library cannot take apart. Whoever asks has to say so: the last bits of a
    decomposition are its library's.
    """

    device: Device | None = None

    def cut(self, matrix: Tensor, keep: Keep, *, seed: int = 0, name: str = "") -> tuple[Cut, bool]:
        """As `decompose.cut`: where nothing goes, the very matrix."""

        def work(there: Tensor, library: Library) -> Cut:
            done = decompose.cut(there, keep, seed=seed, name=name, library=library)
            return replace(done, matrix=matrix if done.matrix is there else done.matrix.cpu())

        return self.of(matrix, work)

    def singular_values(self, matrix: Tensor) -> tuple[Tensor, bool]:
        return self.of(matrix, decompose.singular_values)

    def of(self, matrix: Tensor, work: Work[T]) -> tuple[T, bool]:
        """What `work` gives, which has to bring its results along, and whether a device could not."""
        if self.device is None:
            return work(matrix, LAPACK), False
        for alone in (False, True):
            try:
                inside = self.device.turnstile.entered(alone=alone)
                with inside, self.device.lane(), _full_precision:
                    _load_linear_algebra(self.device.place)
                    return work(matrix.to(self.device.place), self.device.library), False
            except RuntimeError as error:
                if not is_full(error):
                    if not _is_of_library(error):
                        raise
                    break
            self.device.make_room()
        return work(matrix, LAPACK), True


def _is_of_library(error: RuntimeError) -> bool:
    """Whether the device's library could not take a matrix apart: torch has a class for some of what it says only."""
    is_known = isinstance(error, torch.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]
    return is_known or "cusolver" in str(error).lower()


def _set_full_precision() -> Callable[[], None]:
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    return lambda: setattr(products, "fp32_precision", before)


_full_precision = WhileInside(_set_full_precision)
"""Products of float32 with all of its bits: a program may have set TensorFloat-32, whose ten bits no rule here allows
for."""

_loading, _loaded = threading.Lock(), set[torch.device]()


def _load_linear_algebra(place: torch.device) -> None:
    """torch loads that part of it at the first call, and fails where two threads come at once (pytorch #90613)."""
    with _loading:
        if place not in _loaded:
            torch.linalg.eigh(torch.eye(2, device=place))
            torch.linalg.qr(torch.eye(2, device=place))
            _loaded.add(place)
