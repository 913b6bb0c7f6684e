"""The compiled kernels against the torch operators, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from expo.compute import kernels
from expo.compute.kernels import Draws, Stored, draws, stored
from expo.operators.extrapolate import extrapolate
from expo.operators.rounding import round_into

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
COUNT = 20_011  # two rows and a part, not a multiple of sixteen


def array(tensor: Tensor) -> Stored:
    """A tensor as the kernels take it, over the same memory."""
    name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
    return stored(tensor.reshape(-1).view(torch.uint8).numpy(), name)


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits, but that any NaN is as good as another."""
    integer = {2: torch.int16, 4: torch.int32}[want.itemsize]
    equal = got.view(integer) == want.view(integer)
    return bool((equal | (got.isnan() & want.isnan())).all())


def awkward(dtype: torch.dtype, seed: int, *, finite: bool = True) -> Tensor:
    """Ordinary weights, and among them ±0, subnormals, values of every size and the largest."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(COUNT, generator=generator) * 0.02
    bits = torch.randint(0, 1 << 16, (COUNT // 4,), generator=generator, dtype=torch.int32)
    low = torch.randint(0, 1 << 16, (COUNT // 4,), generator=generator, dtype=torch.int32)
    values = values.to(dtype)
    if dtype == torch.float32:
        any_bits = ((bits << 16) | low).view(torch.float32)
    else:
        any_bits = bits.to(torch.int16).view(dtype)
    values[: any_bits.numel()] = any_bits
    values[-6:] = torch.tensor([0.0, -0.0, 1e-40, -6e-8, 65504.0, 1.0]).to(dtype)
    return torch.where(values.isfinite(), values, 1.0) if finite else values


def halfway(dtype: torch.dtype) -> Tensor:
    """float32 values at, just below and just above the middle of neighbours of a 16-bit `dtype`."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    here = every[every.isfinite()].float()
    above = torch.nextafter(here.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
    above = torch.where(above.isfinite(), above, here)
    middle = ((here.double() + above.double()) / 2).float()
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 65535.9, 65536.0,
                         3.3895e38, 3.3962e38, 3.4028e38, -0.0, 1e-45, 2.0**-25, 2.0**-24])  # fmt: skip
    up, down = (torch.nextafter(middle, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    return torch.cat([here, middle, up, down, ends])


@pytest.mark.parametrize("name", DTYPES)
def test_widening_is_exact(name: str) -> None:
    dtype = DTYPES[name]
    values = awkward(dtype, 0, finite=False)
    if dtype != torch.float32:
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(values.numel())
    kernels.widen(array(values), array(wide))
    assert same(wide, values.float())


@pytest.mark.parametrize("drawn", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_that_of_the_operators(name: str, drawn: bool) -> None:
    dtype = DTYPES[name]
    sixteen = dtype if dtype != torch.float32 else torch.bfloat16
    exact = torch.cat([halfway(sixteen), awkward(torch.float32, 1, finite=False)])
    if drawn:
        exact = torch.where(exact.isnan(), 1.0, exact)
    for begin in (0, 12_345):
        got, want = torch.empty(exact.numel(), dtype=dtype), torch.empty(exact.numel(), dtype=dtype)
        round_into(want, exact, "stochastic" if drawn else "nearest", 7, "a.weight", begin)
        finite = kernels.store(
            array(exact), array(got), draws=draws(7, "a.weight", begin) if drawn else None
        )
        assert same(got, want)
        assert not finite
    calm = torch.ones(COUNT)
    assert kernels.store(array(calm), array(torch.empty(COUNT, dtype=dtype)), draws=None)


PAIRS = [*itertools.product(DTYPES, DTYPES)]


@pytest.mark.parametrize("drawn", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("base", "aligned"), PAIRS)
def test_extrapolation_is_that_of_the_operators(base: str, aligned: str, drawn: bool) -> None:
    b, a = awkward(DTYPES[base], 2), awkward(DTYPES[aligned], 3)
    a[::3] = b[::3].to(a.dtype)
    for alpha in (0.0, 1.0, -0.5, 1.3, 8.0):
        check_extrapolation(b, a, alpha, a.dtype, draws(3, "b.weight", 5) if drawn else None)


@pytest.mark.parametrize("out", DTYPES)
def test_the_output_may_be_of_another_dtype(out: str) -> None:
    b, a = awkward(torch.float32, 4), awkward(torch.float32, 5)
    check_extrapolation(b, a, 1.5, DTYPES[out], None)


def check_extrapolation(
    base: Tensor, aligned: Tensor, alpha: float, dtype: torch.dtype, drawn: Draws | None
) -> None:
    got, want = torch.empty(COUNT, dtype=dtype), torch.empty(COUNT, dtype=dtype)
    b, a = base.float(), aligned.float()
    exact = extrapolate(b, a, alpha)
    if drawn is not None:
        exact = torch.where(exact.isnan(), 1.0, exact)
    round_into(want, exact, "nearest" if drawn is None else "stochastic", 3, "b.weight", 5)
    done = kernels.extrapolate(array(base), array(aligned), alpha, out=array(got), draws=drawn)
    valid = extrapolate(b, a, alpha).isfinite() if drawn is not None else slice(None)
    assert same(got[valid], want[valid])
    delta = a - b
    assert done.finite == bool(delta.isfinite().all() and got.isfinite().all())
    assert done.sums.zeros == int((delta == 0).sum())
    assert done.sums.unmoved == int((got.float() == a).sum())
    assert done.sums.elements == COUNT
