"""The operator and the roundings against float64, and against the three float32 steps in numpy."""

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo.operators.extrapolate import beyond, extrapolate, low_rank_product
from expo.operators.rounding import round_nearest, round_stochastic, uniform_draws

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]


def normals(count: int, seed: int, dtype: torch.dtype, scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * scale).to(dtype)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit dtype."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def reference(base: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    s, a = base.double(), aligned.double()
    return s + alpha * (a - s)


@pytest.mark.parametrize("alpha", [-0.5, 0.3, 1.3, 1.5, 2.7])
@pytest.mark.parametrize(("mine", "theirs"), list(itertools.product(DTYPES, DTYPES)))
def test_matches_the_float64_reference(
    mine: torch.dtype, theirs: torch.dtype, alpha: float
) -> None:
    base, aligned = normals(4096, 0, mine), normals(4096, 1, theirs)
    working = torch.float64 if torch.float64 in (mine, theirs) else torch.float32
    exact = extrapolate(base.to(working), aligned.to(working), alpha)
    expected = reference(base, aligned, alpha)
    tolerance = 4 * torch.finfo(working).eps
    assert torch.allclose(exact.double(), expected, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alpha", [1.1, 1.3, 1.5, 3.0])
def test_is_three_float32_operations_and_one_rounding(dtype: torch.dtype, alpha: float) -> None:
    base, aligned = normals(100_003, 0, dtype), normals(100_003, 1, dtype)
    s, a = base.float().numpy(), aligned.float().numpy()
    delta = np.subtract(a, s)
    expected = np.add(a, np.multiply(delta, np.float32(alpha - 1.0)))
    exact = extrapolate(base.float(), aligned.float(), alpha)
    assert np.array_equal(exact.numpy().view(np.uint32), expected.view(np.uint32))
    rounded = round_nearest(exact, dtype)
    if dtype == torch.float16:
        assert np.array_equal(
            rounded.view(torch.uint16).numpy(), expected.astype(np.float16).view(np.uint16)
        )
    else:
        bits = expected.view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        assert np.array_equal(rounded.view(torch.uint16).numpy(), nearest_even.astype(np.uint16))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_0_and_1_are_copies_bit_for_bit(dtype: torch.dtype, alpha: float) -> None:
    values = every_value(dtype)
    other = values.flip(0)
    result = round_nearest(extrapolate(values.float(), other.float(), alpha), dtype)
    expected = values if alpha == 0.0 else other
    assert torch.equal(result.view(torch.int16), expected.view(torch.int16))  # −0.0 included


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
def test_inputs_are_left_alone_and_delta_need_not_be_computed_again(alpha: float) -> None:
    base, aligned = normals(64, 0, torch.float32), normals(64, 1, torch.float32)
    before = base.clone(), aligned.clone()
    delta = aligned - base
    result = extrapolate(base, aligned, alpha)
    assert torch.equal(beyond(base, aligned, delta, alpha), result)
    result.zero_()
    assert torch.equal(delta, before[1] - before[0])
    assert torch.equal(base, before[0])
    assert torch.equal(aligned, before[1])


def test_low_rank_product_matches_float64() -> None:
    left, right = (
        normals(30 * 4, 0, torch.float32).view(30, 4),
        normals(4 * 50, 1, torch.float32).view(4, 50),
    )
    expected = 2.5 * (left.double() @ right.double())
    assert torch.allclose(
        low_rank_product(left, right, 2.5).double(), expected, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    # A value just above the midpoint of two neighbours: by way of float32 it would become the
    # midpoint itself, and then go to the even neighbour below.
    step = torch.finfo(dtype).eps
    midpoint = 1.0 + step / 2
    value = torch.tensor(
        [midpoint + 2.0**-40, -(midpoint + 2.0**-40), midpoint], dtype=torch.float64
    )
    expected = torch.tensor([1.0 + step, -(1.0 + step), 1.0], dtype=torch.float64)
    assert torch.equal(round_nearest(value, dtype).double(), expected)


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=40))
def test_float64_to_float16_agrees_with_numpy(values: list[float]) -> None:
    with np.errstate(over="ignore"):
        expected = np.array(values).astype(np.float16)  # numpy rounds once
    result = round_nearest(torch.tensor(values, dtype=torch.float64), torch.float16)
    assert np.array_equal(result.view(torch.uint16).numpy(), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("working", [torch.float32, torch.float64])
def test_stochastic_leaves_what_is_representable(dtype: torch.dtype, working: torch.dtype) -> None:
    values = every_value(dtype)
    for draw in (0, 2**24 - 1):
        draws = torch.full(values.shape, draw, dtype=torch.int32)
        result = round_stochastic(values.to(working), dtype, draws)
        assert torch.equal(result.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 0.02), (torch.float16, 0.02), (torch.float16, 1e-6)]
)
def test_stochastic_is_unbiased_and_takes_a_neighbour(dtype: torch.dtype, scale: float) -> None:
    value = normals(200, 3, torch.float32, scale)
    draws = torch.stack([uniform_draws(seed, "w", 0, 200) for seed in range(4000)])
    rounded = round_stochastic(value.expand(4000, 200).contiguous(), dtype, draws).double()
    nearest = value.to(dtype).double()
    spacing = (rounded.amax(0) - rounded.amin(0)).clamp(min=1e-300)
    assert torch.all((rounded - value.double()).abs() <= spacing * (1 + 1e-9))
    assert torch.all((nearest - value.double()).abs() <= spacing)
    error = (rounded.mean(0) - value.double()).abs() / spacing
    assert float(error.max()) < 0.5 * 5 / 4000**0.5  # five standard errors of the widest coin


def test_stochastic_never_makes_a_finite_value_infinite() -> None:
    draws = torch.full((2,), 2**24 - 1, dtype=torch.int32)
    near = torch.tensor([65_519.0, -65_519.0])  # float16 ends at 65504, the next step is 65536
    assert torch.equal(
        round_stochastic(near, torch.float16, draws).float(), torch.tensor([65_504.0, -65_504.0])
    )
    beyond = torch.tensor([65_536.0, -1e5])  # these overflow, as they do to nearest
    assert torch.equal(
        round_stochastic(beyond, torch.float16, draws).float(),
        torch.tensor([torch.inf, -torch.inf]),
    )


@settings(max_examples=50)
@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(0, 5), st.text(max_size=5))
def test_a_draw_depends_on_seed_name_and_element_alone(
    start: int, count: int, seed: int, name: str
) -> None:
    whole = uniform_draws(seed, name, start, count)
    parts = [uniform_draws(seed, name, start + i, 1) for i in (0, count // 2, count - 1)]
    assert [int(p) for p in parts] == [int(whole[i]) for i in (0, count // 2, count - 1)]
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 2**24


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = uniform_draws(0, "model.layers.0.weight", 0, 1_000_000).double() / 2**24
    counts = torch.histc(draws.float(), bins=256, min=0, max=1).double()
    expected = 1_000_000 / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 255 + 6 * (2 * 255) ** 0.5
    for lag in (1, 2, 3, 64):
        correlation = torch.corrcoef(torch.stack([draws[:-lag], draws[lag:]]))[0, 1]
        assert abs(float(correlation)) < 6 / 1000
    other = uniform_draws(0, "model.layers.1.weight", 0, 1_000_000).double() / 2**24
    assert abs(float(torch.corrcoef(torch.stack([draws, other]))[0, 1])) < 6 / 1000


def test_draws_are_splitmix64() -> None:
    origin = int.from_bytes(hashlib.sha256(b"7:layer.weight").digest()[:8], "little")
    mask = 2**64 - 1

    def output(index: int) -> int:  # as published, in Python's integers
        z = (origin + index * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    elements = range(2**33 + 1, 2**33 + 9)
    expected = [(output(i // 2) >> 32 * (i % 2) & 0xFFFFFFFF) >> 8 for i in elements]
    assert uniform_draws(7, "layer.weight", elements[0], 8).tolist() == expected


_DIGEST = """
import hashlib, numpy, torch
from expo.operators.extrapolate import extrapolate
from expo.operators.rounding import round_nearest, round_stochastic, uniform_draws
rng = numpy.random.default_rng(0)  # torch's own generator differs between instruction sets
s, a = torch.from_numpy(rng.standard_normal((2, 200_003), dtype="f4") * numpy.float32(0.02))
digest = hashlib.sha256()
for alpha in (0.3, 1.3, 1.5, 2.9):
    exact = extrapolate(s, a, alpha)
    digest.update(exact.numpy().tobytes())
    for dtype in (torch.bfloat16, torch.float16):
        digest.update(round_nearest(exact, dtype).view(torch.int16).numpy().tobytes())
        drawn = round_stochastic(exact, dtype, uniform_draws(1, "w", 5, 200_003))
        digest.update(drawn.view(torch.int16).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


def test_bytes_do_not_depend_on_the_instruction_set() -> None:
    seen = {}
    for capability in ("default", None):
        variable = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env=_environment(variable),
            capture_output=True,
            text=True,
            check=True,
        )
        used, digest = done.stdout.split()
        seen[used] = digest
    assert len(set(seen.values())) == 1, seen
    assert "DEFAULT" in seen


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"} | more
