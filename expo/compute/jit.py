"""How every kernel is compiled: when first called, for the dtypes of that call, without the GIL."""

from collections.abc import Callable
from typing import TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable)

# No fastmath: it would contract products and sums into one rounding on some processors, not on others.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def compiled(function: Function) -> Function:
    """`function` as machine code, kept between processes where a cache directory can be written."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package nor the home can be written: compile in each process
        return njit(**_OPTIONS)(function)


def inlined(function: Function) -> Function:
    """`function` as a part of the kernels that call it."""
    return njit(**_OPTIONS)(function)
