"""Put the edits of matrices into the plan: which tensors they reach, and what becomes of their jobs."""

from collections.abc import Iterable
from dataclasses import replace

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.headers import printable
from expo.planning.findings import Findings
from expo.planning.jobs import Blend, Copy, MatrixJob, TensorJob, Term
from expo.planning.matrices import Matrix, matrices
from expo.planning.modules import module_of
from expo.spec.request import MatrixEdit, Request


def with_edits(
    request: Request, donor: Checkpoint, jobs: dict[str, TensorJob], found: Findings
) -> dict[str, TensorJob]:
    """The jobs, those of edited tensors with their matrices."""
    edited: dict[str, dict[str, MatrixJob]] = {}
    for matrix in _chosen(request.low_rank, donor, found) if request.low_rank else ():
        job = jobs.get(matrix.tensor)
        if job is not None and isinstance(job.rule, Blend):
            known = MatrixJob(matrix.label, matrix.begin, matrix.shape, request.low_rank)
            edited.setdefault(matrix.tensor, {})[matrix.label] = known
    for edit in request.edits:
        for matrix in _chosen(edit, donor, found):
            ours = edited.setdefault(matrix.tensor, {})
            known = ours.get(matrix.label, MatrixJob(matrix.label, matrix.begin, matrix.shape))
            ours[matrix.label] = replace(known, result=(*known.result, edit.keep))
    edits = {name: _edited(jobs[name], ours.values(), found) for name, ours in edited.items() if name in jobs}  # fmt: skip
    return jobs | edits


def _chosen(edit: MatrixEdit, donor: Checkpoint, found: Findings) -> list[Matrix]:
    chosen = []
    for matrix in matrices(donor, edit.target):
        layer = module_of(matrix.tensor)[0]
        if edit.layers is None or (layer is not None and edit.layers[0] <= layer < edit.layers[1]):
            chosen.append(matrix)
    if not chosen:
        where = "" if edit.layers is None else f" in layers {edit.layers[0]} to {edit.layers[1]}"
        what = f"target {edit.target!r}" if edit.target is not None else "the edit"
        found.refusals.append(
            f"{printable(what)} finds no matrix{where} of {donor.label}: "
            "`expo spectrum MODEL --target REGEX` shows what a pattern finds"
        )
    return chosen


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
