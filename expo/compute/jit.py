"""How every kernel is compiled: when first called, for the dtypes of that call, without the GIL."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from numba import njit
from numba.np import linalg
from numba.core.caching import FunctionCache, IndexDataCacheFile

Function = TypeVar("Function", bound=Callable)

# No fastmath: it would contract products and sums into one rounding on some processors, not on others.
_OPTIONS = {"nogil": True, "error_model": "numpy"}

_SHARED = (
    "jit.py",
    "bits.py",
    "lanes.py",
    "masks.py",
)  # what is inlined into kernels of other files


def compiled(function: Function) -> Function:
    """`function` as machine code, kept between processes where a cache directory can be written."""
    dispatcher = njit(**_OPTIONS)(function)
    try:
        dispatcher._cache = _Cache(function)  # as `njit(cache=True)` does with its own
    except (RuntimeError, OSError):  # neither the package nor the home can be written
        pass
    return dispatcher


def inlined(function: Function) -> Function:
    """`function` as a part of the kernels that call it."""
    return njit(**_OPTIONS)(function)


def _without_blas() -> None:
    """numba's array functions import scipy's linear algebra to see whether it is there: 0.2 s and 20 MB
    for nothing, as no kernel calls it. Those that do look again."""
    look, linalg.ensure_blas = linalg.ensure_blas, lambda: None
    try:
        from numba.np import arraymath  # noqa: F401
    finally:
        linalg.ensure_blas = look


_without_blas()


class _Cache(FunctionCache):
    """numba's cache, which knows of changes in the shared files, and in which nothing can fail:
    what it cannot read or keep is compiled again."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        stamp = [self._impl.locator.get_source_stamp()]
        stamp += [Path(__file__).with_name(name).read_bytes() for name in _SHARED]
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=hashlib.sha256(b"".join(stamp)).digest(),
        )

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except (OSError, EOFError, pickle.UnpicklingError):
            return None

    def save_overload(self, sig, data) -> None:
        try:
            super().save_overload(sig, data)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.disable()
