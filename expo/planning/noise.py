"""The noise of quantized inputs over what is extrapolated: estimated from a few tensors and a little of each, said always,
warned of from a ratio on, refused from another."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expo.checkpoint.codes import scale_numbers
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo, printable
from expo.checkpoint.weight import Weight
from expo.errors import CheckpointError
from expo.operators.codes import e2m1, e4m3
from expo.operators.noise import Grid, coding_noise, grid, was_not_rounded
from expo.planning.jobs import Blend, TensorJob
from expo.results import CodingNoise
from expo.threads import side_by_side

WARNED, REFUSED = 2.0, 5.0
"""Noise over change: pairs in bfloat16 that were published as ExPO models have up to about 3.2, FP8 pairs of the size
of a DPO run 13.5."""

_TENSORS = 16
_AT_ONCE = 4
_BYTES = 1 << 16  # of every side of a tensor
_COLUMNS = 16  # of experts whose other side lies transposed
_SOLVED = 1 << 14  # elements whose grids are looked at
_GAP = 4096  # bytes that are rather read than left out
_MOST = 100.0  # a larger ratio cannot be told from a sample
_BEYOND = 1.5  # what MXFP4 cuts down to 6 goes up to 8, and is denser below

Places = NDArray[np.int64]
Array = NDArray[np.float64]


class _Sampled(NamedTuple):
    """Elements of one side: their numbers, and where they are codes their scales and grid."""

    numbers: Array
    scales: Array | None
    grid: Grid | None
    format: str | None


class _Change(NamedTuple):
    """What a tensor's sample told: the mean squares of the change and of its noise."""

    change: float
    noise: float


def noise_of(jobs: Iterable[TensorJob]) -> CodingNoise | None:
    """Noise over change of what is blended from codes, of several models the worst; None where a sample tells nothing:
    no codes, or no difference.

    Raises:
        CheckpointError, HubError: an input cannot be read.
    """
    coded = [job for job in jobs if job.is_coded and job.count and not job.rows]
    chosen = _spread(coded, _TENSORS)
    found = [*side_by_side(_measured, chosen, _AT_ONCE)]
    terms = [_total(chosen, each) for each in zip(*found, strict=True)]
    return max((one for one in terms if one is not None), key=lambda n: n.ratio, default=None)


def noise_note(noise: CodingNoise) -> str:
    what = "a tensor" if noise.tensors == 1 else f"{noise.tensors} tensors"
    how = f"noise of {_times(noise)} the change" if noise.ratio else "no noise in the change"
    return f"the codes of quantized inputs leave {how}, by a sample of {what}"


def noise_warning(noise: CodingNoise) -> Iterator[str]:
    if noise.ratio > WARNED:
        yield (
            f"what SFT and aligned differ by is mostly noise of their codes ({_times(noise)} the change): name the "
            "unquantized originals where there are any"
        )


def noise_refusal(
    noise: CodingNoise | None, alphas: tuple[float, ...], *, force: bool
) -> tuple[str, ...]:
    """The refusal, if there is one.

    Args:
        alphas: of all tensors that are blended from codes.
    """
    beyond = any(not 0.0 <= alpha <= 1.0 for alpha in alphas)
    if noise is None or force or not beyond or noise.ratio <= REFUSED:
        return ()
    return (
        f"the codes of the quantized inputs leave noise of {_times(noise)} the change, and extrapolating multiplies it "
        f"too: more than {REFUSED:g} times is refused; name the unquantized originals, or go on with --force (force: true)",
    )


def _times(noise: CodingNoise) -> str:
    more = "100 or more" if noise.ratio >= 100 else f"about {noise.ratio:.2g}"
    return f"{more} times"


def _spread(jobs: Sequence[TensorJob], count: int) -> list[TensorJob]:
    """Some of them, from the first to the last."""
    count = min(count, len(jobs))
    return [jobs[(2 * n + 1) * len(jobs) // (2 * count)] for n in range(count)]


def _total(jobs: Sequence[TensorJob], found: Sequence[_Change | None]) -> CodingNoise | None:
    told = [(job.count, one) for job, one in zip(jobs, found, strict=True) if one is not None]
    elements = sum(count for count, _ in told)
    change = sum(count * one.change for count, one in told)
    noise = sum(count * one.noise for count, one in told)
    if not change + noise:
        return None
    ratio = math.sqrt(noise / change) if change else _MOST
    noise_rms, delta_rms = (math.sqrt(total / elements) for total in (noise, change))
    return CodingNoise(min(ratio, _MOST), noise_rms, delta_rms, len(told))


def _measured(job: TensorJob) -> list[_Change | None]:
    """What a sample of every model's tensor told of its change from the base's."""
    assert isinstance(job.rule, Blend)
    assert job.rule.base is not None
    return [_change(job.rule.base, term.weight) for term in job.rule.terms]


def _change(base: Weight, aligned: Weight) -> _Change | None:
    if base.codes is None and aligned.codes is None:
        return None
    elements = _elements(base, aligned)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked at
        b, a = (_sampled(weight, elements) for weight in (base, aligned))
        delta = a.numbers - b.numbers
        grids, apart = _grids(b, a)
        observed = float(np.mean(delta * delta))
    if not (math.isfinite(observed) and np.isfinite(grids).all()):
        return None  # damaged, which the run will say
    if not observed:
        return _Change(0.0, 0.0)
    if (b.grid is None or a.grid is None) and was_not_rounded(delta, grids.width):
        return _Change(observed, 0.0)
    few = slice(None, None, -(-len(delta) // _SOLVED))
    return _Change(*coding_noise(observed, Grid(*(part[few] for part in grids)), apart[few]))


def _grids(b: _Sampled, a: _Sampled) -> tuple[Grid, Array]:
    """The grid of both sides together, and how far they lie apart."""
    sides = [side.grid for side in (b, a) if side.grid is not None]
    square = np.sum([side.square for side in sides], axis=0) / 2
    width = np.mean([side.width for side in sides], axis=0)
    if b.format != a.format or b.scales is None or a.scales is None:
        return Grid(square, width), np.full(len(b.numbers), np.inf)
    size = (np.abs(b.numbers) + np.abs(a.numbers)) / 2
    return Grid(square, width), size * np.abs(a.scales - b.scales) / ((a.scales + b.scales) / 2)


def _elements(base: Weight, aligned: Weight) -> Places:
    """Those of a tensor that are looked at: a run in its middle, or of experts that lie transposed some rows there."""
    turned = [w.codes for w in (base, aligned) if w.codes is not None and w.codes.whole_bytes]
    if not turned:
        widest = max(weight.stored.item_bytes for weight in (base, aligned))
        count = min(base.count, _BYTES // widest)
        return (base.count - count) // 2 + np.arange(count)
    codes = turned[0]
    high = min(codes.rows, max(1, _BYTES // (codes.columns // 2)))
    wide = codes.columns if len(turned) == 2 else min(_COLUMNS, codes.columns)
    columns = (2 * np.arange(wide) + 1) * codes.columns // (2 * wide)
    line = base.shape[0] // 2 * codes.columns + columns[:, None]
    return (line * codes.rows + (codes.rows - high) // 2 + np.arange(high)).reshape(-1)


def _sampled(weight: Weight, elements: Places) -> _Sampled:
    codes = weight.codes
    if codes is None:
        raw = _gather(weight.files, weight.stored, elements)
        return _Sampled(_plain(raw, weight.stored.dtype), None, None, None)
    place, scale = codes.places(elements)
    stored = _gather(weight.files, weight.stored, place // codes.codes_each)
    code = stored if codes.codes_each == 1 else stored >> (4 * (place % 2)).astype(np.uint8) & 15
    scales = scale_numbers(_gather(weight.files, codes.scale, scale), codes.scale.dtype)
    scales = np.where(np.isfinite(scales) & (scales > 0), scales, np.nan).astype(np.float64)
    numbers, of_codes = _of_format(codes.format)
    points = Grid(of_codes.square[code] * scales**2, of_codes.width[code] * scales)
    return _Sampled(numbers[code] * scales, scales, points, codes.format)


@cache
def _of_format(name: str) -> tuple[NDArray[np.float32], Grid]:
    """The number of every code of a format, and the grid that they are."""
    return (e4m3(), grid(e4m3())) if name == "fp8" else (e2m1(), grid(e2m1(), _BEYOND))


def _gather(files: Files, info: TensorInfo, places: Places) -> NDArray[np.uint8]:
    """The bytes of a tensor's elements at these places, in their order, flat: what lies near is read at once."""
    unique, order = np.unique(places, return_inverse=True)
    cuts = np.flatnonzero(np.diff(unique) * info.item_bytes > _GAP) + 1
    parts = [_range(files, info, part) for part in np.split(unique, cuts)]
    return np.concatenate(parts)[order].reshape(-1)


def _range(files: Files, info: TensorInfo, places: Places) -> NDArray[np.uint8]:
    """Bytes [places, of an element], from one read."""
    first, end = int(places[0]), int(places[-1]) + 1
    size = info.item_bytes
    raw = files.read(info.file, info.begin + first * size, info.begin + end * size)
    if len(raw) != (end - first) * size:
        raise CheckpointError(
            f"{files.label}/{printable(info.file)} was cut short while it was read: download it again"
        )
    return np.frombuffer(raw, np.uint8).reshape(-1, size)[places - first]


def _plain(raw: NDArray[np.uint8], dtype: str) -> Array:
    if dtype == "F64":
        return raw.view(np.float64)
    return scale_numbers(raw, dtype).astype(np.float64)
