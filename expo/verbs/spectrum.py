"""Spectra of a model's matrices, or of their change: one matrix at a time, a few at once."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from expo.checkpoint.checkpoint import Checkpoint, Weight, open_checkpoint
from expo.checkpoint.headers import printable
from expo.checkpoint.reference import Reference
from expo.compute.cuts import one_rounding
from expo.compute.inputs import OpenFiles, Sources, read_tensor
from expo.compute.threads import side_by_side
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


@dataclass(frozen=True)
class ChangeSpectrum(MatrixSpectrum):
    """The same of a change; `ulp_ratio` = noise_sigma over the noise of one rounding of the weights.

    Near 1 the bulk is rounding noise; √2 is what two independent roundings give. None where an
    adapter's change was never rounded.
    """

    ulp_ratio: float | None


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
        pattern: only matrices in whose label it is found; by default the matrices of the layers.
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
    files = OpenFiles()

    def one(matrix: Matrix) -> MatrixSpectrum:
        sources = Sources(files, buffer_bytes(CHUNK_BYTES))
        loaded = _load(matrix, matrix.weight, sources)
        if base is None:
            found = singular_values(loaded)
            result = _summary(matrix, found)
        else:
            before = base.weights[matrix.tensor]
            noise = one_rounding(loaded, matrix.weight, before)
            found = singular_values(loaded.sub_(_load(matrix, before, sources)))
            sums = _summary(matrix, found)
            result = ChangeSpectrum(**vars(sums), ulp_ratio=noise and sums.noise_sigma / noise)
        if values is not None:
            values[matrix.label] = found
        return result

    try:
        return tuple(side_by_side(one, chosen, threads, progress))
    finally:
        files.close()


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


def _load(matrix: Matrix, weight: Weight, sources: Sources) -> Tensor:
    """Where the matrix lies in a weight, in float32."""
    values = read_tensor(sources, weight, matrix.shape, first=matrix.begin)
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"{printable(matrix.tensor)} holds NaN or Inf in {weight.files.label}: it is damaged"
        )
    return values
