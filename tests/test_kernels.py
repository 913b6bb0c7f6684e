"""The compiled kernels against the torch operators, bit for bit."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from expo.compute import kernels, measures
from expo.compute.kernels import Draws, Stored, draws, stored
from expo.operators.decompose import square_sum
from expo.operators.extrapolate import extrapolate
from expo.operators.keep import unit_in_last_place
from expo.operators.rounding import round_into
from expo.operators.statistics import Summing

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
COUNT = 20_011  # two rows and a part, not a multiple of sixteen
COUNTS = [0, 1, 15, 16, 17, 511, 513, 8191, 8192, 8193, COUNT, 131_072]


def array(tensor: Tensor) -> Stored:
    """A tensor as the kernels take it, over the same memory."""
    name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
    return stored(tensor.reshape(-1).view(torch.uint8).numpy(), name)


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits, but that any NaN is as good as another."""
    integer = {2: torch.int16, 4: torch.int32}[want.itemsize]
    equal = got.view(integer) == want.view(integer)
    return bool((equal | (got.isnan() & want.isnan())).all())


def awkward(dtype: torch.dtype, seed: int) -> Tensor:
    """Ordinary weights, and among them ±0, subnormals and finite values of every size."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(COUNT, generator=generator) * 0.02).to(dtype)
    bits = torch.randint(-(1 << 31), 1 << 31, (COUNT // 4,), generator=generator).int()
    some = bits.view(dtype)[: len(bits)]
    values[: len(some)] = torch.where(some.isfinite(), some, 1.0)
    values[-6:] = torch.tensor([0.0, -0.0, 1e-40, -6e-8, 65504.0, 1.0]).to(dtype)
    return values


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def every(dtype: torch.dtype) -> Tensor:
    """All values of a 16-bit dtype, NaN and Inf too."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def halfway(dtype: torch.dtype) -> Tensor:
    """float32 values at, just below and just above the middle of all neighbours of a 16-bit dtype, and
    where it overflows."""
    here = every(dtype)[every(dtype).isfinite()]
    above = torch.nextafter(here, torch.tensor(torch.inf, dtype=dtype))
    middle = ((here.double() + torch.where(above.isfinite(), above, here).double()) / 2).float()
    up, down = (torch.nextafter(middle, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    ends = torch.tensor([65519.9, 65520.0, 65535.9, 65536.0, 3.3895e38, 3.3962e38, 3.4028e38, 1e-45,
                         -0.0, 2.0**-25, 2.0**-24, torch.inf, -torch.inf])  # fmt: skip
    return torch.cat([here.float(), middle, up, down, ends, -ends])


@pytest.mark.parametrize("name", DTYPES)
def test_widening_is_exact(name: str) -> None:
    dtype = DTYPES[name]
    values = awkward(dtype, 0) if name == "F32" else every(dtype)
    wide = torch.empty(values.numel())
    kernels.widen(array(values), array(wide))
    assert same(wide, values.float())


@pytest.mark.parametrize("drawn", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_that_of_the_operators(name: str, drawn: bool) -> None:
    dtype = DTYPES[name]
    exact = torch.cat(
        [halfway(DTYPES["F16" if name == "F16" else "BF16"]), awkward(torch.float32, 1)]
    )
    if not drawn:
        exact[0] = torch.nan
    for begin in (0, 12_345):
        got, want = torch.empty(exact.numel(), dtype=dtype), torch.empty(exact.numel(), dtype=dtype)
        round_into(want, exact, "stochastic" if drawn else "nearest", 7, "a.weight", begin)
        at = draws(7, "a.weight", begin) if drawn else None
        finite = kernels.store(array(exact), array(got), draws=at)
        assert same(got, want)
        assert not finite
    assert kernels.store(weights(COUNT), array(torch.empty(COUNT, dtype=dtype)), draws=None)


@pytest.mark.parametrize(("base", "aligned"), [*itertools.product(DTYPES, DTYPES)])
def test_extrapolation_is_that_of_the_operators(base: str, aligned: str) -> None:
    b, a = awkward(DTYPES[base], 2), awkward(DTYPES[aligned], 3)
    a[::3] = b[::3].to(a.dtype)
    for alpha in (0.0, 1.0, -0.5, 1.3, 8.0):
        check_extrapolation(b, a, alpha, a.dtype, None)
        if base == aligned:
            check_extrapolation(b, a, alpha, a.dtype, draws(3, "b.weight", 5))


@pytest.mark.parametrize("out", DTYPES)
def test_the_output_may_be_of_another_dtype(out: str) -> None:
    b, a = awkward(torch.float32, 4), awkward(torch.float32, 5)
    check_extrapolation(b, a, 1.5, DTYPES[out], None)


def check_extrapolation(
    base: Tensor, aligned: Tensor, alpha: float, dtype: torch.dtype, drawn: Draws | None
) -> None:
    got, want = torch.empty(COUNT, dtype=dtype), torch.empty(COUNT, dtype=dtype)
    b, a = base.float(), aligned.float()
    delta, exact = a - b, extrapolate(b, a, alpha)
    round_into(want, exact, "stochastic" if drawn else "nearest", 3, "b.weight", 5)
    done = kernels.extrapolate(array(base), array(aligned), alpha, out=array(got), draws=drawn)
    known = exact.isfinite() if drawn else torch.ones(COUNT, dtype=torch.bool)
    assert same(got[known], want[known])
    assert done.finite == bool(delta.isfinite().all() and got.isfinite().all())
    assert done.sums.elements == COUNT
    assert done.sums.zeros == int((delta == 0).sum())
    assert done.sums.unmoved == int((got.float() == a).sum())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_copies_keep_the_bits_of_every_value(alpha: float) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        here = every(dtype)[every(dtype).isfinite()]
        there, out = here.flip(0), torch.empty_like(here)
        kernels.extrapolate(array(here), array(there), alpha, out=array(out), draws=None)
        assert same(out, there if alpha else here)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["base", "aligned"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
def test_one_bad_element_is_seen(bad: float, where: str, alpha: float) -> None:
    sides = {"base": torch.ones(COUNT).bfloat16(), "aligned": torch.ones(COUNT).bfloat16()}
    out = torch.empty(COUNT, dtype=torch.bfloat16)
    for place in (0, 9000, COUNT - 1):
        sides[where][place] = bad
        b, a = array(sides["base"]), array(sides["aligned"])
        assert not kernels.extrapolate(b, a, alpha, out=array(out), draws=None).finite
        assert not kernels.compare(b, a).finite
        sides[where][place] = 1.0
        assert kernels.extrapolate(b, a, alpha, out=array(out), draws=None).finite


def test_a_result_that_overflows_is_seen() -> None:
    b, a = np.zeros(COUNT, np.float32), np.full(COUNT, 60_000.0, np.float32)
    half, single = np.empty(COUNT, np.int16), np.empty(COUNT, np.float32)
    assert not kernels.extrapolate(b, a, 1.5, out=half, draws=None).finite
    assert kernels.extrapolate(b, a, 1.5, out=single, draws=None).finite


def test_sums_that_leave_float32_are_seen() -> None:
    b, a = np.full(COUNT, 1e30, np.float32), np.full(COUNT, 2e30, np.float32)
    done = kernels.extrapolate(b, a, 1.5, out=np.empty(COUNT, np.float32), draws=None)
    assert done.finite
    assert not done.is_summed


def dots(size: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    summing = Summing(size, pairs[0][0].dtype)
    return [summing.dot(x, y) for x, y in pairs]


@pytest.mark.parametrize("size", COUNTS)
def test_sums_have_the_bits_of_the_numpy_lanes(size: int) -> None:
    exact, start, delta, still = weights(4, size)
    delta[::7], out = 0, np.empty(size, np.uint16)
    done = kernels.finish(exact, start, delta=delta, still=still, out=out, draws=None)
    wide, increment = np.empty(size, np.float32), exact - start
    kernels.widen(out, wide)
    error = wide - exact
    b2, d2, e2, ed, asked_delta, asked_square, a2, i2 = dots(
        size,
        [(start, start), (delta, delta), (error, error), (error, delta), (increment, delta),
         (increment, increment), (exact, exact), (exact - start, exact - start)],
    )  # fmt: skip
    zeros, unmoved = np.count_nonzero(delta == 0), np.count_nonzero(wide == still)
    assert done.sums == (size, b2, d2, zeros, e2, ed, unmoved, 0.0, asked_delta, asked_square)
    same = np.count_nonzero(increment == 0)
    assert kernels.compare(start, exact).sums == (size, b2, i2, same, 0, 0, 0, a2, 0, 0)
    done = kernels.extrapolate(start, exact, 1.0, out=out, draws=None)
    kernels.widen(out, wide)
    e2, ed = dots(size, [(wide - exact, wide - exact), (wide - exact, increment)])
    unmoved = np.count_nonzero(wide == exact)
    assert done.sums == (size, b2, i2, same, e2, ed, unmoved, 0, i2, i2)
    assert measures.arc_sums(exact, start) == tuple(
        dots(size, [(exact, exact), (start, start), (exact, start)])
    )


def test_sums_are_those_of_float64() -> None:
    b, a = (x.astype(np.float64) for x in weights(2, COUNT))
    out = np.empty(COUNT, np.uint16)
    single = b.astype(np.float32), a.astype(np.float32)
    sums = kernels.extrapolate(*single, 1.5, out=out, draws=None).sums
    exact, rounded = a + 0.5 * (a - b), np.empty(COUNT, np.float32)
    kernels.widen(out, rounded)
    error, delta = rounded - exact, a - b
    for got, one, two in (
        (sums.base_square, b, b), (sums.delta_square, delta, delta), (sums.error_square, error, error),
        (sums.error_delta, error, delta), (sums.asked_delta, 1.5 * delta, delta),
    ):  # fmt: skip
        assert abs(got - one @ two) <= 2e-6 * math.sqrt((one @ one) * (two @ two))


def test_blocks_may_begin_anywhere_in_memory_and_may_be_read_only() -> None:
    b, a = (torch.from_numpy(x).bfloat16() for x in weights(2, COUNT))
    want = np.empty(COUNT, np.uint16)
    kernels.extrapolate(array(b), array(a), 1.5, out=want, draws=None)
    shifted = [np.empty(2 * COUNT + 1, np.uint8)[1:] for _ in range(3)]
    for room, values in zip(shifted, (b, a), strict=False):
        room[:] = values.view(torch.uint8).numpy()
        room.flags.writeable = False
    base, aligned, out = (stored(room, "BF16") for room in shifted)
    kernels.extrapolate(base, aligned, 1.5, out=out, draws=None)
    assert np.array_equal(out, want)


def test_blocks_of_other_lengths_are_refused() -> None:
    short, long = np.zeros(3, np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"blocks of \[3, 4\] elements: all must be of one length"):
        kernels.widen(short, long)


@pytest.mark.parametrize("size", [1, 513, COUNT])
def test_squares_and_spacings_are_summed_in_float64(size: int) -> None:
    values = torch.from_numpy(weights(size)) * torch.logspace(-38, 3, size)
    wide = values.double().numpy()
    assert square_sum(values) == pytest.approx(dots(size, [(wide, wide)])[0], rel=1e-12)
    for name, dtype in DTYPES.items():
        ulp = unit_in_last_place(values, dtype).double().numpy()
        assert measures.ulp_square_sum(values.numpy(), name) == dots(size, [(ulp, ulp)])[0]
