"""Which implementation serves a tensor. Two give the same bits: `compiled` (one pass over a block, no torch) for
float32, bfloat16 and float16, and `plain` (torch's operators) for float64, and where numba does not load."""

from functools import cache
from importlib import import_module

import numpy as np

from expo.compute.arithmetic import Arithmetic
from expo.operators.methods import Array
from expo.planning.jobs import Blend, TensorJob

_COMPILED_DTYPES = frozenset({"BF16", "F16", "F32"})


def arithmetic_for(job: TensorJob) -> Arithmetic:
    """The implementation that serves a tensor."""
    dtypes = {job.dtype, *(weight.read_dtype for weight in job.inputs)}
    # DELLA ranks stacks of matrices along their second axis, as mergekit does.
    odd = isinstance(job.rule, Blend) and job.rule.sparsifier == "ranked" and len(job.shape) > 2
    compiled = _compiled() if dtypes <= _COMPILED_DTYPES and not odd else None
    return compiled or plain_arithmetic()


def needs_torch(job: TensorJob) -> bool:
    """Whether computing the tensor takes torch: for its arithmetic, an adapter's products or its edits."""
    adapted = any(weight.update is not None for weight in job.inputs)
    return adapted or bool(job.matrices) or arithmetic_for(job) is not _compiled()


def working_dtype(job: TensorJob) -> type[np.floating]:
    double = any(weight.read_dtype == "F64" for weight in job.inputs)
    return np.float64 if double else np.float32


def arithmetic_of(*arrays: Array) -> Arithmetic:
    """The implementation that serves arrays in the working precision."""
    is_single = all(array.dtype == np.float32 for array in arrays)
    return (_compiled() if is_single else None) or plain_arithmetic()


@cache
def _compiled() -> Arithmetic | None:
    """None where numba cannot be loaded: a platform without it, or a version that does not know NumPy's."""
    try:
        return import_module("expo.compute.compiled").Compiled()
    except ImportError:
        return None


@cache
def plain_arithmetic() -> Arithmetic:
    """torch's operators."""
    return import_module("expo.compute.plain").Plain()
