"""`expo spectrum`: spectra of a model's matrices, or of their change, a few at once."""

from collections.abc import Callable, Iterator
from os import PathLike

import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoint.headers import printable
from expo.checkpoint.reference import parse_reference
from expo.checkpoint.weight import Weight
from expo.compute.choice import plain_arithmetic
from expo.compute.cuts import one_rounding
from expo.compute.decompositions import Decompositions
from expo.compute.inputs import Inputs, Readers, fetch_weights, read_tensor
from expo.compute.stream import Tuning
from expo.errors import CheckpointError
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
from expo.planning.findings import listing
from expo.planning.matrices import Matrix, matrices
from expo.planning.modules import module_of
from expo.planning.reads import FileRange, weight_ranges
from expo.results import ChangeSpectrum, MatrixSpectrum
from expo.threads import side_by_side

Progress = Callable[[int, int], None]


def spectrum(
    model: str | PathLike[str],
    *,
    minus: str | PathLike[str] | None = None,
    target: str | None = None,
    threads: int = 2,
    stream_inputs: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    values: dict[str, Tensor] | None = None,
) -> tuple[MatrixSpectrum, ...]:
    """Singular values of every matrix, summed up; of the change since `minus`, if that is given.

    Args:
        target: only matrices in whose label (the tensor's full name, and the part of a fused one) this
            regular expression is found; by default those of the layers, without embeddings, head, norms and router gates.
        threads: matrices at a time, each on one core, or on a stream of the device.
        stream_inputs: read weights on the Hub by range, without a download.
        device: "cpu", "cuda" or "cuda:1": where they are taken apart.
        progress: called with (matrices done, matrices in all).
        say: called with each remark about the models.
        values: where to leave the singular values, float64 in descending order, by tensor.

    Raises:
        SpecError: `target` is not a regular expression.
        CheckpointError, HubError: an input cannot be used.
        ExpoError: the device is not there.
    """
    tuning = Tuning.on(device, threads)
    references = (parse_reference(str(model), role="MODEL"),) + (
        () if minus is None else (parse_reference(str(minus), role="BASE"),)
    )
    checkpoint, *others = (open_checkpoint(one, streams=stream_inputs) for one in references)
    base = others[0] if others else None
    for remark in (note for one in (checkpoint, *others) for note in one.coding.notes):
        if say:
            say(f"note: {remark}")
    chosen = list(matrices(checkpoint, target))
    if not chosen:
        raise CheckpointError(_nothing(checkpoint, target))
    for matrix in chosen if base is not None else ():
        _check_pair(matrix, checkpoint, base)
    fetch_weights(checkpoint, *([base] if base is not None else []))
    readers, by = Readers(), Decompositions(tuning.device)

    def one(numbered: tuple[int, Matrix]) -> MatrixSpectrum:
        number, matrix = numbered
        inputs = Inputs(readers, buffer_bytes(CHUNK_BYTES))
        loaded = _load(matrix, matrix.weight, inputs)
        if base is None:
            found, fell_back = by.singular_values(loaded)
            result = _summary(matrix, found, fell_back=fell_back)
        else:
            before = base.weights[matrix.tensor]
            noise = one_rounding(loaded.reshape(-1).numpy(), matrix.weight, before)
            change = loaded.sub_(_load(matrix, before, inputs))
            found, fell_back = by.singular_values(change)
            sums = _summary(matrix, found, fell_back=fell_back)
            result = ChangeSpectrum(**vars(sums), ulp_ratio=noise and sums.noise_sigma / noise)
        if values is not None:
            values[matrix.label] = found
        readers.done(number)
        return result

    with readers:
        readers.expect(_ranges(matrix, base) for matrix in chosen)
        return tuple(side_by_side(one, enumerate(chosen), threads, progress))


def _ranges(matrix: Matrix, base: Checkpoint | None) -> Iterator[FileRange]:
    weights = (matrix.weight,) if base is None else (matrix.weight, base.weights[matrix.tensor])
    for weight in weights:
        yield from weight_ranges(weight, matrix.begin, matrix.shape[0] * matrix.shape[1])


def _nothing(checkpoint: Checkpoint, target: str | None) -> str:
    if target is None:
        cure = "--target REGEX names others"
        return f"{checkpoint.label} has no matrix in its layers: {cure}"
    known = sorted({module_of(matrix.label)[1] for matrix in matrices(checkpoint, "")})
    names = f"it has {listing(known)}" if known else "it has no matrix at all"
    return f"--target {target!r} finds no matrix of {checkpoint.label}: {names}"


def _check_pair(matrix: Matrix, checkpoint: Checkpoint, base: Checkpoint | None) -> None:
    assert base is not None
    other = base.weights.get(matrix.tensor)
    if other is None or other.shape != matrix.weight.shape:
        found = "is missing" if other is None else f"has shape {list(other.shape)}"
        raise CheckpointError(
            f"{printable(matrix.tensor)} {found} in {base.label}, it has {list(matrix.weight.shape)} "
            f"in {checkpoint.label}: is this the model that it was trained from?"
        )


def _summary(matrix: Matrix, values: Tensor, *, fell_back: bool) -> MatrixSpectrum:
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
        fell_back=fell_back,
    )


def _load(matrix: Matrix, weight: Weight, inputs: Inputs) -> Tensor:
    """Where the matrix lies in a weight, in float32."""
    rows, columns = matrix.shape
    flat = read_tensor(inputs, weight, rows * columns, plain_arithmetic(), first=matrix.begin)
    values = torch.from_numpy(flat).view(matrix.shape)
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"{printable(matrix.tensor)} holds NaN or Inf in {weight.files.label}: it is damaged"
        )
    return values
