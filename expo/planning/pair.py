"""Match the two sides of plain ExPO, tensor by tensor and row by row."""

import re
from dataclasses import replace

from expo.checkpoint.checkpoint import Checkpoint, Weight
from expo.checkpoint.dtypes import BY_TORCH_NAME, COPIED, FLOATS
from expo.checkpoint.headers import printable
from expo.checkpoint.names import DERIVED, HEADS, INPUTS, is_embedding
from expo.checkpoint.vocabulary import read_vocabulary
from expo.planning.findings import Findings, listing
from expo.planning.plan import TensorJob
from expo.planning.rows import RowMatch, match_rows
from expo.planning.values import Values
from expo.spec.request import Request


def match_pair(
    request: Request,
    base: Checkpoint,
    aligned: Checkpoint,
    allowed: re.Pattern[str] | None,
    found: Findings,
) -> dict[str, TensorJob]:
    jobs: dict[str, TensorJob] = {}
    rows = _RowMatcher(base, aligned, found)
    values = Values(request, aligned)
    for name, weight in aligned.weights.items():
        partner = base.weights.get(name) or tied_partner(base, name, found)
        dtype = output_dtype(request, weight)
        if partner is not None:
            job = _pair(name, dtype, weight, partner, rows, found)
            if job is not None and job.action == "extrapolate":
                job = _with_alpha(job, request, values, found)
            if job is not None:
                jobs[name] = job
        elif DERIVED.search(name) or (allowed and allowed.search(name)):
            found.notes.append(f"{printable(name)} is only in the aligned model: copied")
            jobs[name] = TensorJob(name, "copy", dtype, weight, None)
        else:
            found.missing.append(name)
    for name in base.weights.keys() - aligned.weights.keys():
        head_follows = name.endswith(HEADS) and (base.ties_embeddings or aligned.ties_embeddings)
        if DERIVED.search(name) or head_follows or (allowed and allowed.search(name)):
            found.notes.append(f"{printable(name)} is only in the SFT model: dropped")
        else:
            found.extra.append(name)
    found.extra.sort()
    return jobs


def _with_alpha(
    job: TensorJob, request: Request, values: Values, found: Findings
) -> TensorJob | None:
    alpha = values.alpha(0, job.name)
    if alpha is None and "alpha" in {*request.operands[0].settings, *request.settings}:
        refusal = f"no alpha for {printable(job.name)}: add a value without a filter"
        if not any(known.startswith("no alpha for") for known in found.refusals):
            found.refusals.append(refusal)
        return None
    return replace(job, alpha=1.0 if alpha is None else alpha)


def _pair(
    name: str,
    dtype: str,
    aligned: Weight,
    base: Weight,
    rows: "_RowMatcher",
    found: Findings,
) -> TensorJob | None:
    kinds = {aligned.stored.dtype, base.stored.dtype}
    if aligned.shape != base.shape:
        same_width = aligned.shape[1:] == base.shape[1:] and len(aligned.shape) == len(base.shape)
        if not (is_embedding(name) and same_width):
            shapes = f"{list(base.shape)} in SFT, {list(aligned.shape)} in aligned"
            found.mismatched.append(f"{printable(name)} ({shapes})")
            return None
    if kinds <= COPIED and len(kinds) == 1:
        return TensorJob(name, "copy_if_equal", aligned.dtype, aligned, base)
    if not kinds <= FLOATS:
        dtypes = f"{base.stored.dtype} in SFT, {aligned.stored.dtype} in aligned"
        found.mismatched.append(f"{printable(name)} ({dtypes})")
        return None
    match = rows.match(name, base, aligned) if is_embedding(name) else RowMatch()
    if match is None:
        return None
    return TensorJob(name, "extrapolate", dtype, aligned, base, rows=match.runs)


def output_dtype(request: Request, weight: Weight) -> str:
    if request.dtype is None or weight.dtype not in FLOATS:
        return weight.dtype
    return BY_TORCH_NAME[request.dtype]


def tied_partner(base: Checkpoint, name: str, found: Findings) -> Weight | None:
    """A head that a model ties to its embedding is that embedding, and the other way round."""
    if not base.ties_embeddings:
        return None
    for mine, theirs in ((HEADS, INPUTS), (INPUTS, HEADS)):
        if name.endswith(mine):
            partners = [w for n, w in base.weights.items() if n.endswith(theirs)]
            if len(partners) == 1:
                stored = printable(partners[0].stored.name)
                found.notes.append(f"{printable(name)} is tied to {stored} in {base.label}")
                return partners[0]
    return None


class _RowMatcher:
    """Matches embedding rows once per pair of row counts, reading the vocabularies when needed."""

    def __init__(self, base: Checkpoint, aligned: Checkpoint, found: Findings) -> None:
        self._base, self._aligned, self._found = base, aligned, found
        self._matches: dict[tuple[int, int], RowMatch | None] = {}
        self._vocabularies: tuple[dict[int, str] | None, dict[int, str] | None] | None = None

    def match(self, name: str, base: Weight, aligned: Weight) -> RowMatch | None:
        counts = (base.shape[0], aligned.shape[0])
        if counts not in self._matches:
            self._matches[counts] = self._read(name, *counts)
        return self._matches[counts]

    def _read(self, name: str, base_rows: int, aligned_rows: int) -> RowMatch | None:
        if base_rows == aligned_rows and self._same_tokenizer():
            return RowMatch()
        if self._vocabularies is None:
            mine, theirs = self._base.tokenizer_files, self._aligned.tokenizer_files
            self._vocabularies = (read_vocabulary(mine), read_vocabulary(theirs))
        base, aligned = self._vocabularies
        match = match_rows(base, aligned, base_rows, aligned_rows)
        if match is None:
            side = "SFT" if base is None else "aligned"
            self._found.refusals.append(
                f"{printable(name)} has {base_rows} rows in SFT and {aligned_rows} in aligned, and "
                f"the {side} model has no tokenizer that says which row is which token: add its "
                "tokenizer.json"
            )
        elif match.copied or match.dropped:
            self._note(match, aligned or {}, base or {})
        elif match.runs:
            self._found.warnings.append("token ids differ: embedding rows are matched by token")
        return match

    def _same_tokenizer(self) -> bool:
        mine, theirs = self._base.tokenizer_files, self._aligned.tokenizer_files
        names = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")
        if any(mine.sizes.get(name) != theirs.sizes.get(name) for name in names):
            return False
        present = [name for name in names if name in mine.sizes]
        return names[0] in present and all(mine.read(n) == theirs.read(n) for n in present)

    def _note(self, match: RowMatch, aligned: dict[int, str], base: dict[int, str]) -> None:
        for rows, tokens, what in (
            (match.copied, aligned, "only in the aligned model: copied"),
            (match.dropped, base, "only in the SFT model: dropped"),
        ):
            if rows:
                labels = [f"{row} {printable(tokens.get(row, '(padding)'))}" for row in rows]
                self._found.notes.append(f"{len(rows)} embedding rows {what}: {listing(labels)}")
