"""How fast this machine and a device do what a run is made of: each measured for a tenth of a second or a little more."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.dtypes import ITEM_BYTES, TORCH_NAMES
from expo.checkpoint.reader import FileReader, read_buffer
from expo.compute.arithmetic import Coded, Stored
from expo.compute.choice import arithmetic_for
from expo.planning.chunks import BLOCK_ELEMENTS
from expo.planning.jobs import Blend, TensorJob
from expo.threads import PerThread, side_by_side

if TYPE_CHECKING:
    from expo.compute.device import Device

_SECONDS = 0.1
_DISK_SECONDS = 0.3
_READ_BYTES, _READS = 8 << 20, 64
_COPY_BYTES = 64 << 20
_ELEMENTS = 1 << 22  # of a pair on a device
_SIDE = 1024  # of the square matrix that stands for all

SMALL_RANK = 64  # of that matrix, as far as it goes the randomized way


def disk_rate(files: Sequence[Path], threads: int) -> float:
    """Bytes a second, read around the page cache at places all over the files, so many at once.

    Raises:
        CheckpointError: a file cannot be read.
    """
    places = [(f, begin) for f in files for begin in range(0, f.stat().st_size, _READ_BYTES)]
    buffer = PerThread(lambda: read_buffer(_READ_BYTES))
    started = time.perf_counter()
    ends = [started]

    def read(place: tuple[Path, int]) -> int:
        if ends[-1] - started > _DISK_SECONDS:
            return 0
        file, begin = place
        count = min(_READ_BYTES, file.stat().st_size - begin)
        with closing(FileReader(file, file.name)) as reader:
            reader.read_around(begin, count, buffer())
        ends.append(time.perf_counter())
        return count

    sample = places[:: max(len(places) // _READS, 1)]
    total = sum(side_by_side(read, sample, threads))
    return total / (max(ends) - started)


def hash_rate() -> float:
    """Bytes a second of SHA-256, by one core."""
    data = np.zeros(_READ_BYTES, np.uint8)
    return _rate(lambda: hashlib.sha256(data.data), data.size)


def pair_rate(job: TensorJob) -> float:
    """Elements a second of the pair's formula over a block that stays in the cache, codes decoded, by one core."""
    assert isinstance(job.rule, Blend)
    weights = (job.rule.start, job.rule.terms[-1].weight)
    codes = [weight.codes for weight in weights if weight.codes is not None]
    count = min([BLOCK_ELEMENTS, *(one.rows * one.columns for one in codes)])
    dtypes = [weight.stored.dtype if weight.codes is None else "F32" for weight in weights]
    base, aligned, out = (
        Stored(np.zeros(count * ITEM_BYTES[dtype], np.uint8), dtype)
        for dtype in (*dtypes, job.dtype)
    )
    arithmetic, decoded = arithmetic_for(job), np.empty(count, np.float32)
    coded = [
        Coded(
            np.zeros(max(one.whole_bytes, count), np.uint8),
            np.ones(one.scales_each, np.float32),
            one,
        )
        for one in codes
    ]

    def once() -> None:
        for one in coded:
            arithmetic.decode(one, 0, decoded)
        arithmetic.extrapolate(base, aligned, 1.5, out, None)

    return _rate(once, count)


def pair_rate_on(device: "Device", job: TensorJob) -> float:
    """Elements a second of the pair's formula over what is on the device already."""
    import torch

    from expo.compute.pairs import extrapolated, pair_of, working
    from expo.operators.rounding import round_nearest

    dtype = getattr(torch, TORCH_NAMES[job.dtype])
    with device.lane():
        side = torch.zeros(_ELEMENTS, dtype=dtype, device=device.place)

    def once() -> None:
        with device.lane():
            pair = pair_of(side, side, working(job), BLOCK_ELEMENTS)
            extrapolated(pair, 1.5, lambda exact: round_nearest(exact, dtype), BLOCK_ELEMENTS)

    return _rate(once, _ELEMENTS)


def copy_rate(device: "Device", *, to_device: bool) -> float:
    """Bytes a second over the bus, between page-locked memory and the device."""
    import torch

    here = torch.from_numpy(device.buffer(_COPY_BYTES))
    with device.lane():
        there = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device.place)
    source, target = (here, there) if to_device else (there, here)

    def once() -> None:
        with device.lane():
            target.copy_(source, non_blocking=True)

    return _rate(once, _COPY_BYTES)


def matrix_rate(device: "Device | None", *, small: bool) -> float:
    """m²n a second of cutting a matrix by its spectrum, or m·n·rank of the `small` way: one at a time, on one core
    where it is no device."""
    import torch

    from expo.compute.decompositions import Decompositions
    from expo.operators.rules import Keep

    keep = Keep("rank", SMALL_RANK) if small else Keep("mp")
    matrix = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    work = _SIDE * _SIDE * (SMALL_RANK if small else _SIDE)

    def measure(_: None) -> float:
        return _rate(lambda: Decompositions(device).cut(matrix, keep), work)

    (rate,) = side_by_side(measure, [None], 1)  # whose thread has one core, as a worker's
    return rate


def _rate(once: Callable[[], object], amount: float) -> float:
    """So much, over the seconds that it takes once all is loaded and compiled."""
    once()
    started, times, took = time.perf_counter(), 0, 0.0
    while took < _SECONDS:
        once()
        times, took = times + 1, time.perf_counter() - started
    return times * amount / took
