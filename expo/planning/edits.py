"""Put the edits of matrices into the plan: which tensors they reach, and what becomes of their jobs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.headers import printable
from expo.operators.rules import Keep
from expo.planning.findings import Findings
from expo.planning.jobs import Blend, Copy, MatrixJob, TensorJob, Term
from expo.planning.matrices import Matrix, matrices
from expo.planning.modules import module_of
from expo.spec.request import MatrixEdit, Request


def with_edits(
    request: Request, donor: Checkpoint, jobs: dict[str, TensorJob], found: Findings
) -> dict[str, TensorJob]:
    """The jobs, those of edited tensors with their matrices.

    An edit that reaches nothing is warned of; where nothing else was to be done, it is refused.
    """
    edited: dict[str, dict[str, MatrixJob]] = {}
    missed: list[str] = []
    for edit in filter(None, (request.low_rank, *request.edits)):
        of_delta = edit is request.low_rank
        chosen = [
            m for m in _chosen(edit, donor) if not of_delta or _is_blended(jobs.get(m.tensor))
        ]
        for matrix in chosen:
            ours = edited.setdefault(matrix.tensor, {})
            known = ours.get(matrix.label, MatrixJob(matrix.label, matrix.begin, matrix.shape))
            result = known.result if of_delta else (*known.result, edit.keep)
            ours[matrix.label] = replace(
                known, delta=edit if of_delta else known.delta, result=result
            )
        if of_delta and edit.keep.is_automatic and not edit.force:
            found.refusals += _of_codes(edit.keep, [m for m in chosen if jobs[m.tensor].is_coded])
        missed += [] if chosen else [_nothing_found(edit, donor)]
        found.warnings += rank_above(edit.keep, [matrix.shape for matrix in chosen])
    is_copy = request.method == "passthrough" and not edited
    (found.refusals if is_copy else found.warnings).extend(missed)
    edits = {name: _edited(jobs[name], ours.values(), found) for name, ours in edited.items() if name in jobs}  # fmt: skip
    return jobs | edits


def rank_above(keep: Keep, shapes: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """A warning, where matrices have no rank above the one that is kept: they stay whole."""
    whole = [min(shape) for shape in shapes if keep.rule == "rank" and keep.amount >= min(shape)]
    if whole:
        yield (
            f"rank={keep.amount:g}: {len(whole)} of {len(shapes)} matrices have no higher rank (at most "
            f"{max(whole)}), nothing of them is cut"
        )


def _of_codes(keep: Keep, coded: Sequence[Matrix]) -> Iterator[str]:
    """A refusal, where a change would be cut at its noise and no rounding made that noise."""
    if coded:
        more = f" and {len(coded) - 1} more" if len(coded) > 1 else ""
        yield (
            f"keep {keep} would cut the change of {printable(coded[0].label)}{more} at its noise level, which is that of "
            "quantized inputs, not of rounding: say how much to keep (rank=R, energy=E), or go on with --force "
            "(force: true)"
        )


def _is_blended(job: TensorJob | None) -> bool:
    return job is not None and isinstance(job.rule, Blend)


def _chosen(edit: MatrixEdit, donor: Checkpoint) -> list[Matrix]:
    chosen = []
    for matrix in matrices(donor, edit.target):
        layer = module_of(matrix.tensor)[0]
        if edit.layers is None or (layer is not None and edit.layers[0] <= layer < edit.layers[1]):
            chosen.append(matrix)
    return chosen


def _nothing_found(edit: MatrixEdit, donor: Checkpoint) -> str:
    where = "" if edit.layers is None else f" in layers {edit.layers[0]} to {edit.layers[1]}"
    what = f"target {edit.target!r}" if edit.target is not None else "the edit"
    return (
        f"{printable(what)} finds no matrix{where} of {donor.label} that it could cut: "
        "`expo spectrum MODEL --target REGEX` shows what a pattern finds"
    )


def _edited(job: TensorJob, edits: Iterable[MatrixJob], found: Findings) -> TensorJob:
    if job.rows:
        found.refusals.append(
            f"{printable(job.name)} has other rows in SFT than in aligned: it cannot be edited"
        )
        return job
    rule = job.rule
    if isinstance(rule, Copy):
        rule = Blend("passthrough", (Term(job.donor, {"scale": 1.0}),), None, job.donor)
    ordered = tuple(sorted(edits, key=lambda matrix: matrix.begin))
    return replace(job, rule=rule, matrices=ordered)
