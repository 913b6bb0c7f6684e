"""What the codes of quantized weights stand for: E4M3 (arXiv 2209.05433), E2M1 and E8M0 (OCP Microscaling, 2023)."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


@cache
def e4m3() -> Values:
    """The number of each of the 256 codes: sign, 4 bits of exponent, 3 of mantissa; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    size = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    size[code & 127 == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


@cache
def e2m1() -> Values:
    """The number of each of the 16 codes of four bits: sign, 2 bits of exponent, 1 of mantissa."""
    size = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return np.array([*size, *(-x for x in size)], np.float32)


@cache
def e8m0() -> Values:
    """2^(code − 127), of which 2⁻¹²⁷ is subnormal in float32; 255 is NaN."""
    powers = 2.0 ** (np.arange(256) - 127.0)
    powers[255] = np.nan
    return powers.astype(np.float32)
