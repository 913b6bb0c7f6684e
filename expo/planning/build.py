"""Match two checkpoints by their headers and lay out the output."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch

from expo.checkpoint.checkpoint import Checkpoint, Weight, open_checkpoint
from expo.checkpoint.dtypes import BY_TORCH_NAME, COPIED, FLOATS
from expo.checkpoint.headers import printable
from expo.checkpoint.names import DERIVED, HEADS, INPUTS, is_embedding
from expo.checkpoint.sidecars import auto_map_files, is_model_sidecar, is_tokenizer_file
from expo.checkpoint.vocabulary import read_vocabulary
from expo.errors import SpecError
from expo.planning.plan import Plan, ShardPlan, Sidecar, TensorJob
from expo.planning.rows import RowMatch, match_rows
from expo.spec.request import Request

_LISTED = 5  # names in a message before "and N more"


@dataclass
class _Findings:
    """What the matching collects on its way."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def build_plan(request: Request) -> Plan:
    """Open both checkpoints (headers only) and plan the merge.

    Raises:
        CheckpointError, HubError, TokenizerError: an input cannot be used at all. What is wrong
            between the two is in the plan's `refusals` instead, all of it at once.
        SpecError: `allow_missing` is not a regular expression.
    """
    allowed = _compiled(request.allow_missing)
    base, aligned = open_checkpoint(request.base), open_checkpoint(request.aligned)
    found = _Findings(notes=[*base.notes, *aligned.notes])
    jobs = _match(request, base, aligned, allowed, found)
    sidecars, left_behind = _sidecars(aligned, request.include, found)
    _summarize(base, aligned, found)
    _remark(request, base, aligned, found)
    return Plan(
        request,
        base,
        aligned,
        _shards(aligned, jobs, request.max_shard_bytes),
        sidecars,
        left_behind,
        tuple(found.missing),
        tuple(found.extra),
        tuple(found.mismatched),
        tuple(found.refusals),
        tuple(found.warnings),
        tuple(found.notes),
    )


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise SpecError(f"--allow-missing {pattern}: not a regular expression: {error}") from error


def _match(
    request: Request,
    base: Checkpoint,
    aligned: Checkpoint,
    allowed: re.Pattern[str] | None,
    found: _Findings,
) -> dict[str, TensorJob]:
    jobs: dict[str, TensorJob] = {}
    rows = _RowMatcher(base, aligned, found)
    for name, weight in aligned.weights.items():
        partner = base.weights.get(name) or _tied_partner(base, name, found)
        dtype = _output_dtype(request, weight)
        if partner is not None:
            job = _pair(request, name, dtype, weight, partner, rows, found)
            if job:
                jobs[name] = job
        elif DERIVED.search(name) or (allowed and allowed.search(name)):
            found.notes.append(f"{printable(name)} is only in the aligned model: copied")
            jobs[name] = TensorJob(name, "copy", dtype, weight, None)
        else:
            found.missing.append(name)
    for name in base.weights.keys() - aligned.weights.keys():
        head_follows = name.endswith(HEADS) and base.ties_embeddings
        if DERIVED.search(name) or head_follows or (allowed and allowed.search(name)):
            found.notes.append(f"{printable(name)} is only in the SFT model: dropped")
        else:
            found.extra.append(name)
    found.extra.sort()
    return jobs


def _pair(
    request: Request,
    name: str,
    dtype: str,
    aligned: Weight,
    base: Weight,
    rows: "_RowMatcher",
    found: _Findings,
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
    alpha = 1.0 if request.alpha is None else request.alpha
    return TensorJob(name, "extrapolate", dtype, aligned, base, alpha, match.runs)


def _output_dtype(request: Request, weight: Weight) -> str:
    if request.dtype is None or weight.dtype not in FLOATS:
        return weight.dtype
    return BY_TORCH_NAME[request.dtype]


def _tied_partner(base: Checkpoint, name: str, found: _Findings) -> Weight | None:
    """A head that the SFT model ties to its embedding is that embedding, and the other way round."""
    if not base.ties_embeddings:
        return None
    for mine, theirs in ((HEADS, INPUTS), (INPUTS, HEADS)):
        if name.endswith(mine):
            partners = [w for n, w in base.weights.items() if n.endswith(theirs)]
            if len(partners) == 1:
                stored = printable(partners[0].stored.name)
                found.notes.append(f"{printable(name)} is tied to {stored} in the SFT model")
                return partners[0]
    return None


class _RowMatcher:
    """Matches embedding rows once per pair of row counts, reading the vocabularies when needed."""

    def __init__(self, base: Checkpoint, aligned: Checkpoint, found: _Findings) -> None:
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
                self._found.notes.append(f"{len(rows)} embedding rows {what}: {_listing(labels)}")


def _sidecars(
    aligned: Checkpoint, include: Iterable[str], found: _Findings
) -> tuple[tuple[Sidecar, ...], dict[str, int]]:
    """Split the donor's files into those that travel and those that stay, named with their size."""
    weights = {shard.file for shard in aligned.shards}
    code = auto_map_files(aligned.config)
    tokenizer = aligned.tokenizer_files
    chosen: dict[str, Sidecar] = {}
    left_behind: dict[str, int] = {}
    folders = [aligned.files] + ([aligned.adapter.files] if aligned.adapter else [])
    for files in folders:
        for name, size in files.sizes.items():
            wanted = (
                (files is tokenizer and is_tokenizer_file(name))
                or (files is aligned.files and (is_model_sidecar(name) or name in code))
                or any(fnmatch(name, pattern) for pattern in include)
            )
            if wanted and name not in chosen:
                chosen[name] = Sidecar(name, files)
            elif name not in weights and not name.endswith(".index.json"):
                label = name if files is aligned.files else f"{files.label}/{name}"
                left_behind[label] = size
    for name in sorted(code & chosen.keys()):
        found.warnings.append(f"{printable(name)} is model code (auto_map): copied, read it first")
    return tuple(chosen[name] for name in sorted(chosen)), left_behind


def _summarize(base: Checkpoint, aligned: Checkpoint, found: _Findings) -> None:
    """Turn what does not match into refusals with a cure."""
    pair = f"({base.label} → {aligned.label})"
    if found.missing:
        found.refusals.append(
            f"{_tensors(found.missing)} only in the aligned model {pair}: "
            f"{_listing(map(printable, found.missing))}; --allow-missing REGEX copies them"
        )
    if found.extra:
        found.refusals.append(
            f"{_tensors(found.extra)} only in the SFT model {pair}: "
            f"{_listing(map(printable, found.extra))}; --allow-missing REGEX drops them"
        )
    if found.mismatched:
        found.refusals.append(
            f"{_tensors(found.mismatched)} of another shape or kind {pair}: "
            f"{_listing(found.mismatched)}; is this the model that the aligned one was trained from?"
        )


def _remark(request: Request, base: Checkpoint, aligned: Checkpoint, found: _Findings) -> None:
    if request.alpha is not None and request.alpha < 0:
        found.warnings.append(
            f"alpha {request.alpha:g} is negative: it walks away from the aligned model"
        )
    types = (base.config.get("model_type"), aligned.config.get("model_type"))
    if None not in types and types[0] != types[1]:
        found.warnings.append(f"model_type differs: {types[0]} in SFT, {types[1]} in aligned")
    if not any(map(is_tokenizer_file, aligned.tokenizer_files.sizes)):
        found.warnings.append(f"{aligned.label} has no tokenizer: the output will have none either")


def _shards(
    aligned: Checkpoint, jobs: dict[str, TensorJob], max_shard_bytes: int | None
) -> tuple[ShardPlan, ...]:
    """The aligned model's files in its order; other names where it is a `.bin`, or re-sharded."""
    groups = [
        (s.file, s.metadata, [jobs[t.name] for t in s.tensors if t.name in jobs])
        for s in aligned.shards
    ]
    if max_shard_bytes is not None:
        metadata = aligned.shards[0].metadata
        packed = _pack([job for *_, group in groups for job in group], max_shard_bytes)
        groups = [("", metadata, group) for group in packed]
    elif all(file.endswith(".safetensors") for file, *_ in groups):
        return tuple(ShardPlan(file, metadata, tuple(group)) for file, metadata, group in groups)
    total = len(groups)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    if total == 1:
        names = ["model.safetensors"]
    return tuple(
        ShardPlan(name, metadata, tuple(group))
        for name, (_, metadata, group) in zip(names, groups, strict=True)
    )


def _pack(jobs: list[TensorJob], limit_bytes: int) -> list[list[TensorJob]]:
    groups: list[list[TensorJob]] = [[]]
    room = limit_bytes
    for job in jobs:
        if groups[-1] and job.nbytes > room:
            groups.append([])
            room = limit_bytes
        groups[-1].append(job)
        room -= job.nbytes
    return groups


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _listing(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
