"""Randomness that is a function of what it is for, never of how the work was cut."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_WORD = (1 << 64) - 1


def origin(seed: int, name: str) -> int:
    """Where the draws of `name` start: 64 bits of the SHA-256 of seed and name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def gumbel(origins: Sequence[int], position: int, count: int, device: "torch.device") -> "Tensor":
    """Gumbel noise, float32 of shape (len(origins), count): of every token at one position of samples.

    argmax(log p + noise) draws from p (Gumbel, 1954; Maddison, 1408.0030). The noise of a token is
    SplitMix64 of (origin, position, token) alone, so two models that nearly agree draw the same.
    """
    starts = [_signed(_mixed(o + _GAMMA * (position + 1) & _WORD)) for o in origins]
    z = torch.arange(count, device=device) * _signed(_GAMMA)
    z = z + torch.tensor(starts, device=device)[:, None]
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    uniform = (_shifted(z, 11).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_().float()


def _shifted(z: "Tensor", by: int) -> "Tensor":
    """The logical shift to the right, which int64 has not."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _mixed(z: int) -> int:
    for shift, factor in _MIX:
        z = (z ^ z >> shift) * factor & _WORD
    return z


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
