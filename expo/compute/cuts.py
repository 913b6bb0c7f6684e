"""The edit of one matrix: cut every Δ, blend, cut the result; and the gate that a cut has to pass."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from expo.checkpoint.headers import printable
from expo.checkpoint.weight import Weight
from expo.compute.choice import arithmetic_of, plain_arithmetic
from expo.compute.decompositions import Decompositions
from expo.errors import CheckpointError
from expo.operators.decompose import Cut
from expo.operators.methods import Array
from expo.operators.rules import Keep
from expo.planning.jobs import Blend, MatrixJob, TensorJob
from expo.results import EditReport
from expo.spec.request import MatrixEdit

GATE = (0.8, 1.15)
"""Where σ̂ of a Δ over σ_ulp has to lie for a cut by noise to be safe: .99 to 1.02 was measured where it
is, 1.35 to 4.3 where it harms."""

_TWO_ROUNDINGS = 2**0.5
_COARSENESS = ("F64", "F32", "F16", "BF16")
_EMPTY = 0.05  # of σ_ulp: there is no bulk to mistake for noise, as in the Δ of an adapter

Load = Callable[[Weight], Array]
Exact = Callable[[list[Array] | None], Array]


@dataclass(frozen=True)
class EditedMatrix:
    """What blocks take where the matrix reaches, its elements from `begin` on: the exact result; None where
    the edit removed nothing."""

    begin: int
    result: Array | None


def edit_matrix(
    job: TensorJob,
    matrix: MatrixJob,
    seed: int,
    load: Load,
    exact: Exact,
    by: Decompositions,
) -> tuple[EditedMatrix, tuple[EditReport, ...]]:
    """Cut what the plan says.

    Args:
        load: gives the matrix's elements of a weight in the working precision, flat.
        exact: the exact result of the matrix, given the edited Δ of every term (None: as they are).
        by: takes it apart.

    Raises:
        CheckpointError: an input holds NaN or Inf, the gate refuses, or nothing is kept of a weight.
    """
    assert isinstance(job.rule, Blend)
    for weight in job.rule.weights:
        if not bool(np.isfinite(load(weight)).all()):
            raise CheckpointError(
                f"{printable(job.name)} holds NaN or Inf in {weight.files.label}: it is damaged"
            )
    deltas, reports = _cut_deltas(job.rule, matrix, seed, load, by)
    result = exact(deltas)
    is_edited = deltas is not None
    for number, keep in enumerate(matrix.result):
        whole = torch.from_numpy(result).view(matrix.shape)
        done, fell_back = by.cut(whole, keep, seed=seed, name=f"{matrix.label}/{number}")
        if not done.rank and bool(whole.any()):
            raise CheckpointError(
                f"keep {keep} keeps nothing of {printable(matrix.label)}: all of it lies below the edge "
                "of its noise. Leave it out with --target (target:), or choose rank=R or energy=E"
            )
        is_edited = is_edited or done.matrix is not whole
        result = done.matrix.reshape(-1).numpy()
        reports.append(_report(matrix, "result", keep, done, fell_back=fell_back))
    return EditedMatrix(matrix.begin, result if is_edited else None), tuple(reports)


def _cut_deltas(
    rule: Blend, matrix: MatrixJob, seed: int, load: Load, by: Decompositions
) -> tuple[list[Array] | None, list[EditReport]]:
    """Every Δ with only a part kept; None where nothing was removed of any."""
    if matrix.delta is None:
        return None, []
    numbers = range(len(rule.terms))
    cuts = [_cut_delta(rule, n, matrix, matrix.delta, seed, load, by) for n in numbers]
    reports = [report for *_, report in cuts]
    if not any(is_edited for _, is_edited, _ in cuts):
        return None, reports
    return [delta for delta, *_ in cuts], reports


def _cut_delta(
    rule: Blend,
    number: int,
    matrix: MatrixJob,
    edit: MatrixEdit,
    seed: int,
    load: Load,
    by: Decompositions,
) -> tuple[Array, bool, EditReport]:
    """What is kept of one Δ, and whether that is not all of it."""
    base, term = rule.base, rule.terms[number]
    label = term.weight.files.label
    assert base is not None
    theta = load(term.weight)
    delta = torch.from_numpy(theta - load(base)).view(matrix.shape)
    done, fell_back = by.cut(delta, edit.keep, seed=seed, name=f"{matrix.label}#{number}")
    ratio = None
    if done.noise_sigma is not None:
        noise = one_rounding(theta, term.weight, base)
        ratio = noise and done.noise_sigma / noise
    if ratio is not None and edit.keep.is_automatic and not edit.force:
        _gate(matrix, edit.keep, ratio)
    report = _report(matrix, label, edit.keep, done, ratio, fell_back=fell_back)
    return done.matrix.reshape(-1).numpy(), done.matrix is not delta, report


def one_rounding(values: Array, weight: Weight, base: Weight) -> float | None:
    """σ_ulp = √(mean(ulp²)/12) of the noise in Δ = weight − base that one rounding to the coarser of their dtypes
    makes. None where it is not known: an adapter's Δ was never rounded, codes have other steps.

    Args:
        values: those of `weight`, flat.
    """
    if weight.update is not None or weight.codes is not None or base.codes is not None:
        return None
    coarser = max(weight.stored.dtype, base.stored.dtype, key=_COARSENESS.index)
    arithmetic = plain_arithmetic() if coarser == "F64" else arithmetic_of(values)
    total = arithmetic.ulp_square_sum(values, coarser)
    return math.sqrt(total / values.size / 12.0)


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
    matrix: MatrixJob,
    on: str,
    keep: Keep,
    done: Cut,
    ratio: float | None = None,
    *,
    fell_back: bool,
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
        fell_back=fell_back,
    )
