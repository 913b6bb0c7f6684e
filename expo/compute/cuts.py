"""The edit of one matrix: cut every Δ, combine, cut the result; and the gate that a cut has to pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Weight
from expo.checkpoint.headers import printable
from expo.compute.combine import EditedMatrix, Load, Prepared, combine
from expo.compute.inputs import torch_dtype
from expo.errors import CheckpointError
from expo.operators.decompose import Cut, cut
from expo.operators.keep import rounding_sigma
from expo.operators.rules import Keep
from expo.planning.plan import Combination, MatrixJob, TensorJob, Term
from expo.spec.request import MatrixEdit

GATE = (0.8, 1.15)
"""Where σ̂ of a Δ over σ_ulp has to lie for a cut by noise to be safe: .99 to 1.02 was measured where it
is, 1.35 to 4.3 where it harms."""

_TWO_ROUNDINGS = 2**0.5
_EMPTY = 0.05  # of σ_ulp: there is no bulk to mistake for noise, as in the Δ of an adapter


@dataclass(frozen=True)
class EditReport:
    """What an edit did to a matrix: rank kept of how many, share of ΣS² removed.

    `on` is "result", or the model whose Δ it was. The noise level and how well the bulk fits (0 is pure
    noise) are known where the whole spectrum was computed, `ulp_ratio` = σ̂/σ_ulp of a Δ as well.
    `gain` says of a randomized SVD by how much its last iteration still lowered the residual.
    """

    matrix: str
    on: str
    keep: str
    rank: int
    full_rank: int
    removed_energy: float
    noise_sigma: float | None
    bulk_fit: float | None
    ulp_ratio: float | None = None
    gain: float | None = None


def edit_matrix(
    job: TensorJob, matrix: MatrixJob, seed: int, load: Load, prepared: Prepared | None
) -> tuple[EditedMatrix, tuple[EditReport, ...]]:
    """What blocks of the matrix take in place of their Δ or result.

    Args:
        load: gives the matrix's elements of a weight in the working precision, flat.

    Raises:
        CheckpointError: an input holds NaN or Inf, the gate refuses, or nothing is kept of a weight.
    """
    combination = job.combination
    assert combination is not None
    for weight in combination.weights:
        if not bool(load(weight).isfinite().all()):
            raise CheckpointError(
                f"{printable(job.name)} holds NaN or Inf in {weight.files.label}: it is damaged"
            )
    reports: list[EditReport] = []
    deltas: list[Tensor] = []
    if matrix.delta is not None:
        for term in combination.terms:
            done, report = _cut_delta(combination, term, matrix, matrix.delta, seed, load)
            deltas.append(done)
            reports.append(report)
    edited = EditedMatrix(matrix.begin, tuple(deltas))
    if not matrix.result:
        return edited, tuple(reports)
    width = job.shape[-1]
    result = combine(combination, load, prepared, matrix.begin, width, (edited,)).exact
    for number, keep in enumerate(matrix.result):
        done = cut(result.view(matrix.shape), keep, seed=seed, name=f"{matrix.label}/{number}")
        if not done.rank and bool(result.any()):
            raise CheckpointError(
                f"keep {keep} keeps nothing of {printable(matrix.label)}: all of it lies below the edge "
                "of its noise. Leave it out with --target (target:), or choose rank=R or energy=E"
            )
        result = done.matrix.view(-1)
        reports.append(_report(matrix, "result", keep, done))
    return EditedMatrix(matrix.begin, (), result), tuple(reports)


def _cut_delta(
    combination: Combination,
    term: Term,
    matrix: MatrixJob,
    edit: MatrixEdit,
    seed: int,
    load: Load,
) -> tuple[Tensor, EditReport]:
    base, label = combination.base, term.weight.files.label
    assert base is not None
    theta = load(term.weight)
    delta = (theta - load(base)).view(matrix.shape)
    done = cut(delta, edit.keep, seed=seed, name=f"{matrix.label} {label}")
    ratio = None
    if done.noise_sigma is not None:
        noise = one_rounding(theta, term.weight, base)
        ratio = noise and done.noise_sigma / noise
    if ratio is not None and edit.keep.is_automatic and not edit.force:
        _gate(matrix, edit.keep, ratio)
    return done.matrix.reshape(-1), _report(matrix, label, edit.keep, done, ratio)


def one_rounding(values: Tensor, weight: Weight, base: Weight) -> float | None:
    """σ_ulp of the noise in Δ = weight − base that one rounding to the coarser of their dtypes makes.

    None where it is not known: an adapter's Δ was never rounded.

    Args:
        values: those of `weight`.
    """
    if weight.update is not None:
        return None
    dtypes = (torch_dtype(weight.stored.dtype), torch_dtype(base.stored.dtype))
    return rounding_sigma(values, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))


def _gate(matrix: MatrixJob, keep: Keep, ratio: float) -> None:
    low, high = GATE
    if low <= ratio <= high or ratio < _EMPTY:
        return
    hint = ""
    if low <= ratio / _TWO_ROUNDINGS <= high:
        hint = (
            " 1.41 is what SFT and aligned give that were each rounded from float32, but also a change of "
            "full rank can; the numbers do not tell which."
        )
    raise CheckpointError(
        f"keep {keep} would cut the change of {printable(matrix.label)} at its noise level, which is "
        f"{ratio:.3g} times the noise of rounding its weights; from {low} to {high} the bulk is rounding noise "
        f"and can go, outside of that a cut may take what was learned.{hint} See "
        "`expo spectrum ALIGNED --minus SFT`; cut it anyway with --force (force: true), or say how much "
        "to keep: rank=R, energy=E"
    )


def _report(
    matrix: MatrixJob, on: str, keep: Keep, done: Cut, ratio: float | None = None
) -> EditReport:
    return EditReport(
        matrix=matrix.label,
        on=on,
        keep=str(keep),
        rank=done.rank,
        full_rank=min(matrix.shape),
        removed_energy=done.removed_energy,
        noise_sigma=done.noise_sigma,
        bulk_fit=done.bulk_fit,
        ulp_ratio=ratio,
        gain=done.gain,
    )
