"""Which elements of a delta stay, as a few numbers: no mask of a whole tensor but DELLA's is kept.

The same elements as `operators.sparsify` chooses, bit for bit. A delta is flat and float32, and what is
drawn for its elements counts from the tensor's first.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy import float32, int64, uint8, uint32, uint64
from numpy.typing import NDArray

from expo.compute.bits import PAIRS, Draws, magnitude, strip_draws
from expo.compute.jit import compiled, inlined
from expo.compute.lanes import LANES, STRIP, end_row, products, whole_groups

Deltas = NDArray[np.float32]

_DRAW_STEPS = 1 << 24
_ALL, _BETWEEN, _RANDOM, _BITS = 0, 1, 2, 3
_UPPER = 1 << 16


class Limit(NamedTuple):
    """A magnitude that parts a tensor in two.

    Larger are the elements above it, and of those that equal it the ones before element `tie`.
    """

    bits: int  # of the magnitude, as float32
    tie: int


BELOW_ALL = Limit(0, 1 << 62)
ABOVE_ALL = Limit(0xFFFFFFFF, 0)


class Mask(NamedTuple):
    """What stays of one delta, and what that is multiplied by."""

    kind: int = _ALL
    lower: Limit = BELOW_ALL
    upper: Limit = ABOVE_ALL
    origin: np.uint64 = uint64(0)
    drawn_below: int = 0
    bits: NDArray[np.uint8] = np.zeros(0, np.uint8)
    ratio: float = 1.0


class Masks(NamedTuple):
    """The masks of several deltas of one shape, as the kernels take them."""

    kinds: NDArray[np.int64]  # (k,)
    limits: NDArray[np.int64]  # (k, 5): lower, its tie, upper, its tie, drawn below
    origins: NDArray[np.uint64]  # (k,)
    ratios: NDArray[np.float32]  # (k,)
    bits: NDArray[np.uint8]  # (k, bytes)


def masks(each: Sequence[Mask]) -> Masks:
    """Several masks as arrays."""
    limits = [(*mask.lower, *mask.upper, mask.drawn_below) for mask in each]
    bits = np.zeros((len(each), max(len(mask.bits) for mask in each)), np.uint8)
    for row, mask in zip(bits, each, strict=True):
        row[: len(mask.bits)] = mask.bits
    return Masks(
        np.array([mask.kind for mask in each]),
        np.array(limits),
        np.array([mask.origin for mask in each], np.uint64),
        np.array([mask.ratio for mask in each], np.float32),
        bits,
    )


def magnitude_mask(delta: Deltas, density: float) -> Mask:
    """The `density` share of the elements with the largest magnitude (TIES, arXiv 2306.01708)."""
    if density >= 1:
        return Mask()
    kept = 0 if density <= 0 else max(1, int(density * len(delta)))
    return Mask(_BETWEEN, magnitude_limit(delta, kept))


def outlier_mask(delta: Deltas, density: float, gamma: float) -> Mask:
    """As many, without the `gamma` share of the very largest (breadcrumbs, arXiv 2312.06795)."""
    if density >= 1:
        return Mask()
    kept, top = int(density * len(delta)), int(gamma * len(delta))
    bottom = max(0, len(delta) - kept - top)
    lower = magnitude_limit(delta, len(delta) - bottom)
    return Mask(_BETWEEN, lower, magnitude_limit(delta, len(delta) - bottom - kept))


def random_mask(drawn: Draws, density: float) -> Mask:
    """Each element with probability `density` (DARE, arXiv 2311.03099), by the draws of its tensor."""
    # The operator compares in float32.
    return Mask(_RANDOM, origin=drawn[0], drawn_below=math.ceil(float32(density) * _DRAW_STEPS))


def ranked_mask(delta: Deltas, width: int, *, drawn: Draws, density: float, epsilon: float) -> Mask:
    """Each element with a probability that grows with its rank in its row of `width` elements, from
    density − ε to density + ε (DELLA's MagPrune, arXiv 2406.11617): one bit an element."""
    if density >= 1:
        return Mask()
    bits = np.zeros(-(-len(delta) // 8), np.uint8)
    if density > 0 and len(delta):
        shares = np.arange(width, dtype=np.float32) / float32(max(width - 1, 1))
        least = float32(density - epsilon) + float32(2 * epsilon) * shares
        _keep_ranked(delta, least, drawn[0], bits)
    return Mask(_BITS, bits=bits)


def bit_mask(kept: NDArray[np.bool_]) -> Mask:
    """What stays, by a mask made elsewhere: one bit an element."""
    return Mask(_BITS, bits=np.packbits(kept.reshape(-1), bitorder="little"))


def norm_ratio(before: float, after: float) -> float:
    """What the kept elements are multiplied by, so that ‖Δ‖₁ stays; 1 where nothing is left."""
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


def magnitude_limit(delta: Deltas, keep_count: int) -> Limit:
    """What parts the `keep_count` elements of largest magnitude from the rest; of equal ones the first
    count as larger.

    The bits of magnitudes sort like the magnitudes: one histogram of the upper half of the bits, one of
    the lower half of those in the bucket found.
    """
    smaller = len(delta) - keep_count
    if smaller <= 0 or keep_count <= 0:
        return BELOW_ALL if smaller <= 0 else ABOVE_ALL
    counts = np.zeros(_UPPER, np.int64)
    _count_upper(delta, counts)
    bucket, rank = _bucket(counts, smaller)
    counts[:] = 0
    _count_lower(delta, uint32(bucket), counts)
    low, rank = _bucket(counts, rank)
    bits = bucket << 16 | low
    excess = int(counts[low]) - rank
    return Limit(bits, _after_equal(delta, uint32(bits), excess))


def _bucket(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bucket that holds the element of `rank`, from 1, and its rank there."""
    below = counts.cumsum()
    bucket = int(np.searchsorted(below, rank))
    return bucket, rank - int(below[bucket] - counts[bucket])


@compiled
def _count_upper(delta, counts):
    for i in range(uint64(len(delta))):
        m = magnitude(delta[i])
        counts[uint64(m >> uint32(16))] += 1


@compiled
def _count_lower(delta, bucket, counts):
    for i in range(uint64(len(delta))):
        m = magnitude(delta[i])
        if uint32(m >> uint32(16)) == bucket:
            counts[uint64(m & uint32(0xFFFF))] += 1


@compiled
def _after_equal(delta, bits, number):
    """The index after the element that is the `number`-th, from 1, of that magnitude; 0 for none."""
    for i in range(uint64(len(delta)) if number > 0 else uint64(0)):
        if magnitude(delta[i]) == bits:
            number -= 1
            if number == 0:
                return int64(i) + 1
    return 0


@compiled
def _keep_ranked(delta, least, origin, bits):
    """Set the bit of every element whose draw is below what belongs to its rank in its row."""
    width = uint64(len(least))
    keys, spare = np.empty(width, np.uint64), np.empty(width, np.uint64)
    room = np.empty(width // uint64(2) + uint64(1), np.uint64)
    for begin in range(uint64(0), uint64(len(delta)), width):
        for i in range(width):
            keys[i] = uint64(uint64(magnitude(delta[begin + i])) << uint64(32)) | i
        by_rank = _sorted(keys, spare)
        drawn = strip_draws((origin, begin), uint64(0), room)
        for rank in range(width):
            i = uint64(by_rank[rank] & uint64(0xFFFFFFFF))
            stays = uint64(float32(drawn[i]) * float32(2.0**-24) < least[rank])
            bits[(begin + i) >> uint64(3)] |= uint8(stays << ((begin + i) & uint64(7)))


@inlined
def _sorted(keys, spare):
    """The keys by their upper half, equal ones in order: a radix sort that leaves both arrays changed."""
    for shift in (uint64(32), uint64(43), uint64(54)):
        ends = np.zeros(2048, np.int64)
        for i in range(uint64(len(keys))):
            ends[uint64(keys[i] >> shift) & uint64(2047)] += 1
        total = 0
        for digit in range(uint64(2048)):
            total, ends[digit] = total + ends[digit], total
        for i in range(uint64(len(keys))):
            digit = uint64(keys[i] >> shift) & uint64(2047)
            spare[uint64(ends[digit])] = keys[i]
            ends[digit] += 1
        keys, spare = spare, keys
    return keys


@inlined
def keep_strip(masks, term, begin, deltas, size, room, kept):
    """1 in `kept` (float32) for each element of strip `term` of `deltas` that stays, else 0.

    It has `size` elements, from element `begin` of the tensor.
    """
    kind = masks.kinds[term]
    if kind == _BETWEEN:
        _keep_between(masks.limits, term, int64(begin), deltas, size, kept)
    elif kind == _RANDOM:
        drawn = strip_draws((masks.origins[term], begin), uint64(0), room)
        below = uint32(masks.limits[term, 4])
        for i in range(size):
            kept[i] = float32(drawn[i] < below)
    elif kind == _BITS:
        for i in range(size):
            place = begin + i
            byte = masks.bits[term, place >> uint64(3)]
            kept[i] = float32((byte >> (place & uint64(7))) & uint8(1))
    else:
        fill(kept, size, float32(1))


@inlined
def fill(strip, size, value):
    for i in range(size):
        strip[i] = value


@inlined
def _keep_between(limits, term, begin, deltas, size, kept):
    lower, upper = uint32(limits[term, 0]), uint32(limits[term, 2])
    # The ties as counted from this strip.
    first = uint32(min(max(limits[term, 1] - begin, 0), int64(size)))
    second = uint32(min(max(limits[term, 3] - begin, 0), int64(size)))
    for i in range(size):
        m, place = magnitude(deltas[term, i]), uint32(i)
        above = (m > lower) | ((m == lower) & (place < first))
        far = (m > upper) | ((m == upper) & (place < second))
        kept[i] = float32(above & (not far))


def kept_elements(delta: Deltas, mask: Mask, *, begin: int) -> NDArray[np.float32]:
    """1 for each of the elements `begin` … of a tensor that the mask keeps, 0 elsewhere."""
    return _kept_elements(delta, masks([mask]), uint64(begin))


@compiled
def _kept_elements(delta, masks, begin):
    count = uint64(len(delta))
    kept, room = np.empty(count, np.float32), np.empty(PAIRS, np.uint64)
    strip = np.empty((1, STRIP), np.float32)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        for i in range(size):
            strip[0, i] = delta[at + i]
        keep_strip(masks, uint64(0), begin + at, strip, size, room, kept[at : at + size])
    return kept


_magnitude_products = products((0, 1), (0, 2))


def magnitude_sums(delta: Deltas, mask: Mask, *, begin: int) -> tuple[float, float]:
    """Σ|Δ| and Σ|Δ| of what the mask keeps, of elements `begin` … of a tensor.

    In float64 throughout: sixteen lanes a row of 8,192, lanes and rows added in order.
    """
    before, after = _magnitude_sums(delta, masks([mask]), uint64(begin)).tolist()
    return before, after


@compiled
def _magnitude_sums(delta, masks, begin):
    count = uint64(len(delta))
    scratch = np.ones((3, STRIP), np.float64)
    strip, kept, room = (
        np.empty((1, STRIP), np.float32),
        np.empty(STRIP, np.float32),
        np.empty(PAIRS, np.uint64),
    )
    lanes, totals = np.zeros((2, LANES), np.float64), np.zeros(2)
    for at in range(uint64(0), count, STRIP):
        size = min(STRIP, count - at)
        for i in range(size):
            strip[0, i] = delta[at + i]
        keep_strip(masks, uint64(0), begin + at, strip, size, room, kept)
        for i in range(size):
            scratch[0, i], scratch[2, i] = abs(strip[0, i]), kept[i]
        _magnitude_products(lanes, scratch, whole_groups(scratch, size))
        end_row(lanes, totals, at + STRIP, count)
    return totals
