"""Three routines of scipy's BLAS and LAPACK, called in a way that lets other threads go on.

scipy's own wrappers of them hold Python's lock while they compute, so matrices could not be decomposed
side by side. Arrays are Fortran-ordered, float32 or float64.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np

from expo.threads import WhileInside

Array = np.ndarray


def gram(a: Array) -> Array:
    """aᵀa of (k, n), its lower triangle."""
    k, n = a.shape
    out = np.zeros((n, n), dtype=a.dtype, order="F")
    one, zero = (_scalar(a.dtype, value) for value in (1.0, 0.0))
    _call("syrk", a.dtype, b"L", b"T", n, k, one, a, k, zero, out, n)
    return out


def tridiagonal(symmetric: Array) -> tuple[Array, Array, Array]:
    """Q T Qᵀ from the lower triangle, which the reflectors of Q replace: T's diagonal, what is beside it,
    and the reflectors' scales."""
    n, dtype = len(symmetric), symmetric.dtype
    diagonal, beside, scales = (np.empty(max(m, 1), dtype=dtype) for m in (n, n - 1, n - 1))
    work = np.empty(64 * n, dtype=dtype)
    _call(
        "sytrd", dtype, b"L", n, symmetric, n, diagonal, beside, scales, work, len(work), info=True
    )
    return diagonal, beside[: n - 1], scales[: n - 1]


def apply_reflectors(reduced: Array, scales: Array, vectors: Array) -> None:
    """vectors ← Q·vectors, for what `tridiagonal` left in `reduced`."""
    n, count = vectors.shape
    if n < 2:
        return
    reflectors = np.asfortranarray(reduced[1:, :-1])
    below = np.asfortranarray(vectors[1:])
    work = np.empty(64 * max(count, 1), dtype=vectors.dtype)
    sizes = (n - 1, count, n - 1)
    _call(
        "ormqr", vectors.dtype, b"L", b"N", *sizes, reflectors, n - 1, scales, below, n - 1,
        work, len(work), info=True,
    )  # fmt: skip
    vectors[1:] = below


def _limit_threads() -> Callable[[], None]:
    from threadpoolctl import threadpool_limits

    _modules()  # what is not loaded cannot be limited
    _let_anybody_limit()
    limits = threadpool_limits(1, "blas")

    def undo() -> None:
        _let_anybody_limit()
        limits.restore_original_limits()
        _let_anybody_limit()

    return undo


one_thread = WhileInside(_limit_threads)
"""BLAS on one thread: two contend for the same cores, and its threads decide the last bits."""


def _let_anybody_limit() -> None:
    """From 3.8 on threadpoolctl ignores every thread but the first that has set OpenBLAS's limit. Here the last that
    leaves takes back what the first that came has set, whichever threads they are."""
    from threadpoolctl import OpenBLASController

    if clear := getattr(OpenBLASController, "clear_controlling_thread", None):
        clear(force=True)


def _call(name: str, dtype: np.dtype, *arguments: object, info: bool = False) -> None:
    """Fortran takes everything by reference: letters, sizes, scalars, arrays."""
    status = ctypes.c_int(0)
    passed = [_reference(argument) for argument in (*arguments, *([status] if info else []))]
    with one_thread:
        _routine(("s" if dtype == np.float32 else "d") + name)(*passed)
    if status.value:
        raise ArithmeticError(f"{name}: LAPACK says {status.value}")


def _reference(argument: object) -> object:
    match argument:
        case bytes():
            return ctypes.c_char_p(argument)
        case int():
            return ctypes.byref(ctypes.c_int(argument))
        case np.ndarray():
            return ctypes.c_void_p(argument.ctypes.data)
        case _:
            return ctypes.byref(argument)  # type: ignore[arg-type]


def _scalar(dtype: np.dtype, value: float) -> ctypes.c_float | ctypes.c_double:
    return ctypes.c_float(value) if dtype == np.float32 else ctypes.c_double(value)


@cache
def _modules() -> list[ModuleType]:
    return [import_module(f"scipy.linalg.cython_{kind}") for kind in ("blas", "lapack")]


@cache
def _routine(name: str) -> Callable[..., None]:
    """A function of scipy.linalg.cython_blas or cython_lapack, by its address."""
    blas, lapack = _modules()
    known = blas.__pyx_capi__ | lapack.__pyx_capi__
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(known[name], api.PyCapsule_GetName(known[name]))
    return ctypes.CFUNCTYPE(None)(address)
