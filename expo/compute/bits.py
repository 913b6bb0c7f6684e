"""bfloat16 and float16 as bits: widened to float32, and rounded back to nearest or at random.

Elements of a checkpoint come as uint16 (BF16), int16 (F16) or float32 (F32): three types that the
compiler can tell apart. Everything is integer arithmetic or exact, and vectorizes on any processor.
numba computes with 64-bit integers unless told otherwise, hence the many `uint32`.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numba import types
from numba.extending import overload
from numpy import float32, int16, int32, uint16, uint32, uint64
from numpy.typing import NDArray

from expo.compute.jit import inlined
from expo.compute.lanes import STRIP

Stored = NDArray[np.generic]
Draws = tuple[np.uint64, int]
"""Where the draws of a tensor start, and the index of the block's first element in the tensor."""

_STORED = {"BF16": uint16, "F16": int16, "F32": float32}

_MAGNITUDE = uint32(0x7FFFFFFF)
_INFINITE = uint32(0x7F800000)
_LARGEST_BF16 = uint32(0x7F7F)
_LARGEST_F16 = uint32(0x7BFF)
_REBIAS = uint32(112 << 23)  # between the exponents of float32 and float16
_NORMAL_F16 = uint32(113 << 23)  # 2⁻¹⁴, the smallest normal float16, as float32
_OVERFLOW_F16 = uint32(143 << 23)  # 65536, likewise
_HALF = uint32(126 << 23)  # 0.5, whose last bit is worth 2⁻²⁴, like that of a small float16
_TWO_24 = float32(2.0**24)

PAIRS = STRIP // uint64(2) + uint64(1)  # the outputs that the draws of a strip take
_GAMMA = uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = uint64(0xBF58476D1CE4E5B9), uint64(0x94D049BB133111EB)
_BOTH_24 = uint64(0x00FFFFFF00FFFFFF)


def stored(buffer: NDArray[np.uint8], dtype: str) -> Stored:
    """The bytes of BF16, F16 or F32 elements as the kernels take them: a view, nothing is copied."""
    return buffer.view(_STORED[dtype])


def same_length(*blocks: np.ndarray) -> None:
    """Kernels read and write as far as their output is long, whatever lies there.

    Raises:
        ValueError: the blocks differ in length.
    """
    lengths = [block.shape[-1] for block in blocks]
    if len(set(lengths)) > 1:
        raise ValueError(f"blocks of {lengths} elements: all must be of one length")


def draws(seed: int, name: str, begin: int) -> Draws:
    """The draws of the tensor `name` from element `begin`, as `operators.rounding.uniform_draws`."""
    return _origin(seed, name), begin


@lru_cache(maxsize=1024)
def _origin(seed: int, name: str) -> np.uint64:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return uint64(int.from_bytes(digest[:8], "little"))


def up(bits) -> float32:
    """A stored element as float32: exact. For kernels only."""
    raise NotImplementedError


def nearest(value, like) -> np.generic:
    """float32 to the type of `like`, ties to even, once. For kernels only."""
    raise NotImplementedError


def at_random(value, draw, like) -> np.generic:
    """float32 to a neighbour in the type of `like`: up where fraction + draw·2⁻²⁴ ≥ 1.

    Bit for bit `operators.rounding.round_stochastic`. For kernels only.
    """
    raise NotImplementedError


@overload(up)
def _up(bits):
    return {types.uint16: _up_bf16, types.int16: _up_f16, types.float32: _as_it_is}[bits]


@overload(nearest)
def _nearest(value, like):
    return {types.uint16: _nearest_bf16, types.int16: _nearest_f16, types.float32: _same}[like]


@overload(at_random)
def _at_random(value, draw, like):
    return {types.uint16: _random_bf16, types.int16: _random_f16, types.float32: _undrawn}[like]


def _as_it_is(bits):
    return bits


def _same(value, like):
    return value


def _undrawn(value, draw, like):
    return value


def _up_bf16(bits):
    return uint32(uint32(bits) << uint32(16)).view(np.float32)


def _up_f16(bits):
    half = uint32(uint16(bits))
    magnitude = uint32(uint32(half & uint32(0x7FFF)) << uint32(13))
    small = float32(uint32(magnitude + _NORMAL_F16).view(np.float32) - float32(2.0**-14))
    value = uint32(magnitude + _REBIAS)
    value = small.view(np.uint32) if magnitude < uint32(0x400 << 13) else value
    value = uint32(value + _REBIAS) if magnitude >= uint32(0x7C00 << 13) else value
    return uint32(value | uint32(uint32(half & uint32(0x8000)) << uint32(16))).view(np.float32)


def _nearest_bf16(value, like):
    bits = float32(value).view(np.uint32)
    odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
    rounded = uint32(uint32(bits + uint32(0x7FFF) + odd) >> uint32(16))
    return uint16(uint32(0x7FC0) if uint32(bits & _MAGNITUDE) > _INFINITE else rounded)


def _nearest_f16(value, like):
    bits = float32(value).view(np.uint32)
    magnitude = uint32(bits & _MAGNITUDE)
    odd = uint32(uint32(magnitude >> uint32(13)) & uint32(1))
    half = uint32(uint32(magnitude - _REBIAS + uint32(0xFFF) + odd) >> uint32(13))
    small = float32(magnitude.view(np.float32) + float32(0.5)).view(np.uint32)
    half = uint32(small - _HALF) if magnitude < _NORMAL_F16 else half
    half = uint32(0x7C00) if magnitude >= _OVERFLOW_F16 else half
    half = uint32(0x7E00) if magnitude > _INFINITE else half
    return int16(uint16(half | uint32(uint32(bits >> uint32(16)) & uint32(0x8000))))


def _random_bf16(value, draw, like):
    bits = float32(value).view(np.uint32)
    magnitude = uint32(bits & _MAGNITUDE)
    rounded = uint32(uint32(magnitude + uint32(draw >> uint32(8))) >> uint32(16))
    rounded = min(rounded, _LARGEST_BF16)
    signed = uint32(rounded | uint32(uint32(bits >> uint32(16)) & uint32(0x8000)))
    return nearest(value, like) if magnitude >= _INFINITE else uint16(signed)


def _random_f16(value, draw, like):
    bits = float32(value).view(np.uint32)
    magnitude = uint32(bits & _MAGNITUDE)
    half = uint32(uint32(magnitude - _REBIAS + uint32(draw >> uint32(11))) >> uint32(13))
    # Below 2⁻¹⁴ the steps are 2⁻²⁴ wide: their count and the first 24 bits of what is left over.
    steps = float32(uint32(min(magnitude, _NORMAL_F16)).view(np.float32) * _TWO_24)
    whole = int32(steps)
    left = int32(float32(steps - float32(whole)) * _TWO_24)
    small = uint32(whole + int32(int32(left + int32(draw)) >> int32(24)))
    half = min(small if magnitude < _NORMAL_F16 else half, _LARGEST_F16)
    signed = int16(uint16(half | uint32(uint32(bits >> uint32(16)) & uint32(0x8000))))
    return nearest(value, like) if magnitude >= _OVERFLOW_F16 else signed


@inlined
def rounded(value, drawn, i, like):
    """float32 in the type of `like`, by element i of what `strip_draws` gave."""
    if drawn is None:
        return nearest(value, like)
    return at_random(value, drawn[i], like)


@inlined
def strip_draws(draws, at, room):
    """The draws, uint32 on [0, 2²⁴), of a strip that begins at element `at` of the block.

    SplitMix64 of a counter: two elements of the tensor share an output, the even one has its lower
    half. `room` is uint64, for one pair more than the strip has.
    """
    if draws is None:
        return None
    begin = uint64(draws[1]) + at
    first = begin >> uint64(1)
    for pair in range(uint64(len(room))):
        z = uint64(uint64(first + pair) * _GAMMA + draws[0])
        z = uint64(uint64(z ^ uint64(z >> uint64(30))) * _MIX_1)
        z = uint64(uint64(z ^ uint64(z >> uint64(27))) * _MIX_2)
        z = uint64(z ^ uint64(z >> uint64(31)))
        room[pair] = uint64(z >> uint64(8)) & _BOTH_24
    return room.view(np.uint32)[begin & uint64(1) :]


@inlined
def magnitude(value):
    """The bits of |value|, a float32: they sort like the magnitudes."""
    return uint32(float32(value).view(np.uint32) & _MAGNITUDE)


@inlined
def unbounded(value):
    """Bit 31 is set where a float32 is NaN or Inf; the other bits mean nothing."""
    return uint32(magnitude(value) + uint32(1 << 23))
