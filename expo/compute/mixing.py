"""Combinations of several models, block by block: `operators.merging` bit for bit, in float32."""

import math
from collections.abc import Sequence

import numpy as np
from numpy import float32, uint64
from numpy.typing import NDArray

from expo.compute.bits import PAIRS, same_length
from expo.compute.jit import compiled, inlined
from expo.compute.lanes import STRIP
from expo.compute.masks import Masks, fill, keep_strip

Block = NDArray[np.float32]

_ZERO = float32(0)
_PLAIN, _ELECTED, _ELECTED_MEAN = 0, 1, 2


def add_terms(
    start: Block,
    base: Block,
    thetas: Block,
    weights: Sequence[float],
    masks: Masks,
    *,
    begin: int,
    elect_sign: bool,
    normalize: bool,
    scale: float,
    exact_out: Block,
    delta_out: Block | None,
) -> None:
    """exact_out = start + λ·Σ wᵢ·maskᵢ(Δᵢ) with Δᵢ = θᵢ − base, as `operators.merging.add_task_vectors`.

    Args:
        thetas: (k, n), the others (n,), float32.
        begin: the index of the block's first element in the tensor, for the masks.
        delta_out: takes ΣΔᵢ, of all elements, where wanted.
    """
    delta_out = exact_out if delta_out is None else delta_out
    same_length(start, base, thetas, exact_out, delta_out)
    divisor = math.fsum(weights)
    divisor = divisor if normalize and not elect_sign and abs(divisor) >= 1e-8 else 1.0
    mode = (_ELECTED_MEAN if normalize else _ELECTED) if elect_sign else _PLAIN
    _add_terms(
        start, base, thetas, np.array(weights, np.float32), masks, uint64(begin), mode,
        float32(divisor), float32(scale), exact_out, delta_out,
    )  # fmt: skip


@compiled
def _add_terms(
    start, base, thetas, weights, masks, begin, mode, divisor, scale, exact_out, delta_out
):
    count = uint64(len(start))
    terms = np.empty((len(thetas), STRIP), np.float32)
    kept, mixed = np.empty(STRIP, np.float32), np.empty(STRIP, np.float32)
    shares = np.empty(STRIP, np.float32)
    room = np.empty(PAIRS, np.uint64)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        for term in range(uint64(len(thetas))):
            for i in range(size):
                terms[term, i] = thetas[term, at + i] - base[at + i]
            _add(delta_out, at, terms, term, size)
            keep_strip(masks, term, begin + at, terms, size, room, kept)
            ratio, weight = masks.ratios[term], weights[term]
            for i in range(size):
                terms[term, i] = terms[term, i] * kept[i] * ratio * weight
            _add(mixed, uint64(0), terms, term, size)
        if mode != _PLAIN:
            _elect(terms, weights, mixed, shares, size)
        if mode != _ELECTED_MEAN:
            fill(shares, size, divisor)
        for i in range(size):
            exact_out[at + i] = start[at + i] + mixed[i] / shares[i] * scale


@inlined
def _add(total, at, terms, term, size):
    # The first is copied, not added to 0: −0.0 stays.
    if term == uint64(0):
        for i in range(size):
            total[at + i] = terms[term, i]
    else:
        for i in range(size):
            total[at + i] += terms[term, i]


@inlined
def _elect(terms, weights, mixed, shares, size):
    """Keep in `mixed` only the terms whose sign is that of their sum; `shares` takes their weights."""
    fill(shares, size, _ZERO)
    for term in range(uint64(len(terms))):
        weight = weights[term]
        for i in range(size):
            value, is_up = terms[term, i], mixed[i] >= _ZERO
            agrees = float32(((value > _ZERO) & is_up) | ((value < _ZERO) & (not is_up)))
            terms[term, i] = value * agrees
            shares[i] += agrees * weight
    for term in range(uint64(len(terms))):
        _add(mixed, uint64(0), terms, term, size)
    for i in range(size):
        shares[i] += float32(shares[i] == _ZERO)
