"""How every kernel is compiled: when first called, for the dtypes of that call, without the GIL."""

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.np import linalg

# No fastmath: it would contract products and sums into one rounding on some processors, not on others.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_PART_OF_OTHERS: dict[str, Any] = _OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

# What is inlined into kernels of other files.
_SHARED = ("jit.py", "bits.py", "lanes.py", "masks.py")


def compiled(function: Callable) -> Callable:
    """`function` as machine code, kept between processes where a cache directory can be written."""
    dispatcher: Any = njit(**_OPTIONS)(function)
    with suppress(RuntimeError, OSError):  # neither the package nor the home can be written
        dispatcher._cache = _Cache(function)  # as `njit(cache=True)` does with its own
    return dispatcher


def inlined(function: Callable) -> Callable:
    """`function` as a part of the kernels that call it."""
    return njit(**_PART_OF_OTHERS)(function)


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
        sources = [Path(__file__).with_name(name).read_bytes() for name in _SHARED]
        stamp = repr([self._impl.locator.get_source_stamp(), *sources])
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=hashlib.sha256(stamp.encode()).digest(),
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
