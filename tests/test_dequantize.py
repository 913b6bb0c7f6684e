"""Codes to numbers: the table, the operators, the compiled kernels and transformers agree."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expo.checkpoint.codes import Codes, scale_numbers
from expo.checkpoint.headers import TensorInfo
from expo.compute.arithmetic import Arithmetic, Coded
from expo.compute.compiled import Compiled
from expo.compute.plain import Plain
from expo.operators.codes import e2m1, e4m3, e8m0

from .quantized import fp8, mxfp4, numbers

ARITHMETICS: tuple[Arithmetic, ...] = (Compiled(), Plain())


def scale_info(scales: Tensor) -> TensorInfo:
    return TensorInfo("s", "F32", tuple(scales.shape), "f", 0)


def bits(tensor: Tensor) -> np.ndarray:
    """Flat bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_every_code_is_the_number_that_torch_reads() -> None:
    codes = torch.arange(256).to(torch.uint8)
    want = codes.view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3(), want, equal_nan=True)
    assert np.array_equal(np.signbit(e4m3()), np.signbit(want))
    powers = codes.view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(e8m0(), powers, equal_nan=True)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu]
)
def test_scales_are_widened_exactly(dtype: torch.dtype) -> None:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    scales = torch.tensor([1.5, 2.0**-20, 3e-5, 448.0]).to(dtype)
    got = scale_numbers(bits(scales), names.get(dtype, "F8_E8M0"))
    assert np.array_equal(got, scales.float().numpy())


@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    data=st.data(),
)
def test_any_range_of_any_blocks_is_the_product_in_float64(
    experts: int, rows: int, columns: int, block: tuple[int, int], data: st.DataObject
) -> None:
    """Ragged blocks, stacks of matrices, ranges that begin and end anywhere."""
    coded = [fp8(random(rows, columns, seed=n), block) for n in range(experts)]
    want = torch.stack([numbers(*one, block) for one in coded]).reshape(-1)
    codes = bits(torch.stack([one for one, _ in coded]))
    scales = torch.stack([one for _, one in coded])
    layout = Codes("fp8", scale_info(scales), rows, columns, block)
    first = data.draw(st.integers(0, want.numel() - 1))
    count = data.draw(st.integers(1, want.numel() - first))
    begin, number = layout.scale_span(first, count)
    place, nbytes = layout.span(first, count)
    part = scales.reshape(-1).numpy()[begin : begin + number]
    for arithmetic in ARITHMETICS:
        out = np.empty(count, np.float32)
        coded_part = Coded(codes[place : place + nbytes], part, layout)
        arithmetic.decode(coded_part, layout.within(first), out)
        assert np.array_equal(out, want[first : first + count].numpy())


def test_every_code_times_every_scale_is_one_rounding() -> None:
    scales = torch.tensor([1.0, 1 / 3, 3e38, 1e-40, 2.0**-127])
    codes = torch.arange(256).to(torch.uint8).repeat(len(scales))
    layout = Codes("fp8", scale_info(scales), len(scales), 256, (1, 256))
    want = codes.view(torch.float8_e4m3fn).double() * scales.double().repeat_interleave(256)
    for arithmetic in ARITHMETICS:
        out = np.empty(len(codes), np.float32)
        arithmetic.decode(Coded(codes.numpy(), scales.numpy(), layout), 0, out)
        assert np.array_equal(out, want.float().numpy(), equal_nan=True)


def test_blocks_are_those_of_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for dtype in (torch.float32, torch.float8_e8m0fnu):
        codes, scales = fp8(random(64, 96), (16, 32), dtype)
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
        layout = Codes("fp8", scale_info(scales), 64, 96, (16, 32))
        mine = torch.empty(codes.numel())
        for arithmetic in ARITHMETICS:
            coded = Coded(bits(codes), scales.float().reshape(-1).numpy(), layout)
            arithmetic.decode(coded, 0, mine.numpy())
            assert torch.equal(mine.view(64, 96).bfloat16(), theirs)


@given(experts=st.integers(1, 3), rows=st.integers(1, 9), groups=st.integers(1, 3), data=st.data())
def test_experts_are_those_of_transformers(
    experts: int, rows: int, groups: int, data: st.DataObject
) -> None:
    """Every code, the powers that bfloat16 has, and any range of the transposed numbers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = (experts, rows, groups)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(3, 240, shape, generator=generator).to(torch.uint8)
    want = convert_moe_packed_tensors(blocks, scales).float().reshape(-1)
    layout = Codes("mxfp4", scale_info(scales), rows, groups * 32, (1, 32))
    first = data.draw(st.integers(0, want.numel() - 1))
    count = data.draw(st.integers(1, want.numel() - first))
    (place, nbytes), (begin, number) = layout.span(first, count), layout.scale_span(first, count)
    part = scale_numbers(bits(scales)[begin : begin + number], "U8")
    for arithmetic in ARITHMETICS:
        out = np.empty(count, np.float32)
        coded = Coded(bits(blocks)[place : place + nbytes], part, layout)
        arithmetic.decode(coded, layout.within(first), out)
        assert np.array_equal(out, want[first : first + count].numpy())


def test_places_are_where_the_kernels_look() -> None:
    codes, scales = fp8(random(30, 20), (8, 16))
    blocks, powers = mxfp4(random(2, 5, 64))
    for layout, stored, each in (
        (Codes("fp8", scale_info(scales), 30, 20, (8, 16)), bits(codes), scales.reshape(-1).numpy()),
        (Codes("mxfp4", scale_info(powers), 5, 64, (1, 32)), bits(blocks), scale_numbers(bits(powers), "U8")),
    ):  # fmt: skip
        count = stored.size * layout.codes_each
        place, scale = layout.places(np.arange(count))
        code = stored[place // layout.codes_each]
        if layout.codes_each == 2:
            code = np.where(place % 2, code >> 4, code & 15)
        table = e4m3() if layout.format == "fp8" else e2m1()
        out = np.empty(count, np.float32)
        Compiled().decode(Coded(stored, each, layout), 0, out)
        assert np.array_equal(table[code] * each[scale], out)


def test_a_code_that_is_no_number_is_none() -> None:
    out = np.empty(2, np.float32)
    layout = Codes("fp8", scale_info(torch.ones(1)), 1, 2, (1, 2))
    for arithmetic in ARITHMETICS:
        arithmetic.decode(Coded(np.array([0x7F, 0xFF], np.uint8), np.ones(1, np.float32), layout), 0, out)  # fmt: skip
        assert all(map(math.isnan, out))


def test_float64_takes_the_numbers_of_float32() -> None:
    codes, scales = fp8(random(4, 6), (2, 3))
    layout = Codes("fp8", scale_info(scales), 4, 6, (2, 3))
    out = np.empty(24)
    Plain().decode(Coded(bits(codes), scales.reshape(-1).numpy(), layout), 0, out)
    assert np.array_equal(out, numbers(codes, scales, (2, 3)).double().reshape(-1).numpy())
