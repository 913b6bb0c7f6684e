"""Spectra of a model's matrices, or of their change: one matrix at a time, a few at once."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoint.headers import printable
from expo.checkpoint.reference import Reference
from expo.engine.sources import OpenFiles, Sources, read_tensor
from expo.errors import CheckpointError
from expo.operators.decompose import singular_values
from expo.operators.low_rank import (
    bulk_fit,
    effective_rank,
    gavish_donoho,
    laser_rmt_threshold,
    mp_edge,
    noise_level,
    rank_above,
    snr_compat,
    snr_mp,
)
from expo.planning.chunks import CHUNK_BYTES, buffer_bytes
from expo.planning.matrices import Matrix, matrices

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MatrixSpectrum:
    """One matrix: noise level and edge in its units, ranks by each rule, signal against noise.

    `snr_compat` is Spectrum's (None where that is infinite), `bulk_fit` the Kolmogorov–Smirnov distance
    of what lies below the edge to pure noise.
    """

    tensor: str
    shape: tuple[int, int]
    noise_sigma: float
    mp_edge: float
    rank_mp: int
    rank_gavish_donoho: int
    rank_laser_rmt: int
    snr_mp: float | None
    snr_compat: float | None
    effective_rank: float
    bulk_fit: float | None


def run_spectrum(
    model: Reference,
    *,
    minus: Reference | None = None,
    pattern: str | None = None,
    threads: int = 2,
    progress: Progress | None = None,
    values: dict[str, Tensor] | None = None,
) -> tuple[MatrixSpectrum, ...]:
    """The spectra of `model`, or of `model` − `minus`, in the order of its files.

    Args:
        pattern: only tensors whose name it finds; by default the matrices of the layers.
        progress: called with (matrices done, matrices in all).
        values: where to leave the singular values themselves, by label.

    Raises:
        CheckpointError: the models do not fit, a value is not finite, or no matrix is chosen.
        HubError: a model cannot be fetched.
    """
    checkpoint = open_checkpoint(model)
    base = None if minus is None else open_checkpoint(minus)
    chosen = list(matrices(checkpoint, pattern))
    if not chosen:
        raise CheckpointError(f"{checkpoint.label} has no matrix that is asked for: try --target")
    for matrix in chosen if base is not None else ():
        _check_pair(matrix, checkpoint, base)
    done, lock = 0, threading.Lock()
    files = OpenFiles()

    def one(matrix: Matrix) -> MatrixSpectrum:
        nonlocal done
        torch.set_num_threads(1)  # of this thread: matrices run side by side instead
        found = singular_values(_load(matrix, base, Sources(files, buffer_bytes(CHUNK_BYTES))))
        result = _summary(matrix, found)
        with lock:
            if values is not None:
                values[matrix.label] = found
            done += 1
            if progress:
                progress(done, len(chosen))
        return result

    try:
        with ThreadPoolExecutor(threads) as pool:
            return tuple(_in_order(pool, one, chosen))
    finally:
        files.close()


def _in_order(
    pool: ThreadPoolExecutor, one: Callable[[Matrix], MatrixSpectrum], chosen: list[Matrix]
) -> Iterator[MatrixSpectrum]:
    futures = [pool.submit(one, matrix) for matrix in chosen]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _check_pair(matrix: Matrix, checkpoint: Checkpoint, base: Checkpoint | None) -> None:
    assert base is not None
    other = base.weights.get(matrix.tensor)
    if other is None or other.shape != matrix.weight.shape:
        found = "is missing" if other is None else f"has shape {list(other.shape)}"
        raise CheckpointError(
            f"{printable(matrix.tensor)} {found} in {base.label}, it has {list(matrix.weight.shape)} "
            f"in {checkpoint.label}: is this the model that it was trained from?"
        )


def _summary(matrix: Matrix, values: Tensor) -> MatrixSpectrum:
    m, n = sorted(matrix.shape)
    sigma = noise_level(values, m, n)
    edge = mp_edge(sigma, m, n)
    return MatrixSpectrum(
        tensor=matrix.label,
        shape=matrix.shape,
        noise_sigma=sigma,
        mp_edge=edge,
        rank_mp=rank_above(values, edge),
        rank_gavish_donoho=rank_above(values, gavish_donoho(sigma, m, n)),
        rank_laser_rmt=rank_above(values, laser_rmt_threshold(values, m, n)),
        snr_mp=snr_mp(values, edge),
        snr_compat=snr_compat(values, m, n),
        effective_rank=effective_rank(values),
        bulk_fit=bulk_fit(values, sigma, m, n),
    )


def _load(matrix: Matrix, base: Checkpoint | None, sources: Sources) -> Tensor:
    """The matrix, or its change, in float32."""
    values = read_tensor(sources, matrix.weight, matrix.shape, first=matrix.begin)
    if base is not None:
        other = base.weights[matrix.tensor]
        values -= read_tensor(sources, other, matrix.shape, first=matrix.begin)
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{printable(matrix.tensor)} holds NaN or Inf: it is damaged")
    return values
