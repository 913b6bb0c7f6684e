"""One rounding from the working precision to the output dtype, to nearest or at random."""

import hashlib

import torch
from torch import Tensor

_DRAW_BITS = 24  # x/ulp(x) + u stays exact in float64 with no more than this

# SplitMix64 counts modulo 2⁶⁴, and torch's int64 wraps around just so: its constants as signed numbers.
_GAMMA, _MIX_1, _MIX_2 = (
    factor - (1 << 64) for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def round_nearest(value: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Round to the nearest value of `dtype`, ties to even, once.

    torch converts float64 to the 16-bit dtypes by way of float32, which rounds twice; going through
    round-to-odd makes the second rounding see what the first one dropped (Boldo & Melquiond, 2008).
    """
    if value.dtype == torch.float64 and dtype in (torch.bfloat16, torch.float16):
        value = _round_to_odd(value)
    return value.to(dtype) if out is None else out.copy_(value)


def round_stochastic(
    value: Tensor, dtype: torch.dtype, draws: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Round down or up with the probability that makes the mean exact (Gupta et al., 1502.02551).

    A value that `dtype` can represent stays as it is, and no finite value becomes infinite.

    Args:
        value: float32 or float64, finite.
        draws: int32 of the same shape, uniform on [0, 2²⁴), see `uniform_draws`.
    """
    info = torch.finfo(dtype)
    # floor(|x|/s + u)·s with s = ulp(x) in `dtype`: every step is exact in float64.
    exact = value.double()
    magnitude = exact.abs()
    power_of_two = (exact.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    spacing = power_of_two.clamp_(min=info.tiny).mul_(info.eps)
    steps = (magnitude / spacing).add_(draws.double().mul_(2.0**-_DRAW_BITS)).floor_()
    rounded = steps.mul_(spacing).clamp_(max=info.max)
    # What lies a whole step beyond the largest value overflows, as it does to nearest.
    rounded.masked_fill_(magnitude >= info.max / (1 - info.eps / 2), torch.inf)
    rounded.copysign_(exact)
    return rounded.to(dtype) if out is None else out.copy_(rounded)


def round_into(
    out: Tensor, exact: Tensor, rounding: str, seed: int, name: str, begin: int
) -> Tensor:
    """Round elements begin … of the tensor `name`, "nearest" or "stochastic", into `out`."""
    if rounding == "nearest" or out.dtype == exact.dtype:
        return round_nearest(exact, out.dtype, out=out)
    draws = uniform_draws(seed, name, begin, out.numel(), out.device)
    return round_stochastic(exact, out.dtype, draws, out=out)


def uniform_draws(
    seed: int, name: str, start: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The draws of elements start … start+count of the tensor `name`: int32 on [0, 2²⁴), the same on any device.

    A function of (seed, name, element) alone: SplitMix64 (Steele, Lea & Flood, 2014), which is a
    hash of a counter, started at the SHA-256 of seed and name; element i takes half of output i//2.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    origin = int.from_bytes(digest[:8], "little", signed=True)
    first, skipped = divmod(start, 2)
    last = first + (skipped + count + 1) // 2
    z = torch.arange(first, last, dtype=torch.int64, device=device).mul_(_GAMMA).add_(origin)
    room = torch.empty_like(z)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        _xor_shifted(z, shift, room).mul_(factor)
    halves = _xor_shifted(z, 31, room).view(torch.int32)[skipped : skipped + count]
    return (halves >> (32 - _DRAW_BITS)).bitwise_and_((1 << _DRAW_BITS) - 1)


def _xor_shifted(z: Tensor, shift: int, room: Tensor) -> Tensor:
    """z ^= z >> shift, with zeros coming in, where int64 itself would bring in its sign."""
    torch.bitwise_right_shift(z, shift, out=room)
    return z.bitwise_xor_(room.bitwise_and_((1 << (64 - shift)) - 1))


def _round_to_odd(value: Tensor) -> Tensor:
    """float64 → float32, truncated, with the last bit set where anything was dropped."""
    nearest = value.float()
    bits = nearest.view(torch.int32)
    bits = bits - (nearest.double().abs() > value.abs()).int()
    inexact = bits.view(torch.float32).double() != value
    return (bits | (inexact & value.isfinite()).int()).view(torch.float32)
