"""Codes and scales to numbers: code · scale of its block, in float32. The reference of the compiled kernels."""

import torch
from torch import Tensor

from expo.operators.codes import e2m1


def dequantize_fp8(
    codes: Tensor, scales: Tensor, first: int, *, rows: int, columns: int, block: tuple[int, int]
) -> Tensor:
    """E4M3 codes with a scale for every block (DeepSeek-V3, arXiv 2412.19437, and per tensor or row): float32 [count].

    The scale is taken as it is: rounded to the output's dtype before, as some do, it moves a weight by 2⁻⁹ of itself.

    Args:
        codes: uint8 [count], elements `first` … of a stack of matrices of `rows` × `columns`.
        scales: float32, flat: ⌈rows/b₀⌉ × ⌈columns/b₁⌉ of every matrix, from the first of the stack.
        block: b₀ rows by b₁ columns; the last block of either direction may be cut short.
    """
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    line = torch.arange(first // columns, -(-(first + len(codes)) // columns))
    of_lines = scales.view(-1, wide)[line // rows * high + line % rows // block[0]]
    spread = of_lines.repeat_interleave(block[1], dim=1)[:, :columns].reshape(-1)
    begin = first % columns
    return codes.view(torch.float8_e4m3fn).float() * spread[begin : begin + len(codes)]


def dequantize_mxfp4(codes: Tensor, scales: Tensor, first: int, count: int) -> Tensor:
    """E2M1 codes, two a byte, the low half first, with a power of two for every 32: float32 [count].

    The numbers come transposed, as the models that are stored so multiply by them (gpt-oss, arXiv 2508.10925).

    Args:
        codes: uint8 [matrices, rows, columns / 2].
        scales: float32 [matrices, rows, columns / 32].
        first, count: which elements of [matrices, columns, rows].
    """
    _, rows, half = codes.shape
    line = torch.arange(first // rows, -(-(first + count) // rows))
    matrix, column = line // (2 * half), line % (2 * half)
    pair = codes[matrix, :, column // 2]
    code = torch.where((column % 2 == 0)[:, None], pair & 15, pair >> 4)
    numbers = torch.from_numpy(e2m1())[code.long()] * scales[matrix, :, column // 32]
    begin = first % rows
    return numbers.reshape(-1)[begin : begin + count]
