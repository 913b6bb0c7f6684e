"""What a plan says to a person or a pipeline."""

import shutil
from pathlib import Path

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.reference import Location
from expo.planning.chunks import CHUNK_BYTES, memory_bytes
from expo.planning.findings import room
from expo.planning.jobs import Blend
from expo.planning.plan import Plan
from expo.planning.reads import AHEAD_BYTES
from expo.results import PlanReport, SourceReport, TensorReport
from expo.spec.request import paper_alpha
from expo.threads import DEFAULT_THREADS


def report(
    plan: Plan,
    *,
    out: Path | None = None,
    threads: int = DEFAULT_THREADS,
    chunk_bytes: int = CHUNK_BYTES,
    refusals: tuple[str, ...] = (),
    outputs: int = 1,
    shards_at_once: int | None = None,
) -> PlanReport:
    """Describe a plan; `refusals` are reasons to add that lie outside of it (OUT is taken), `outputs` how many
    of this size, itself among them, are written to one disk. No more than `shards_at_once` of each are there at a
    time, None for all of them."""
    request = plan.request
    free = shutil.disk_usage(_existing(out or Path.cwd())).free
    if (needed := outputs * plan.held_on_disk(shards_at_once)) > free:
        what = f"the disk of {out or 'this directory'} is too full"
        refusals = (*refusals, f"{what}: {room(needed, free)}")
    sources = {role: _source(checkpoint) for role, checkpoint in plan.sources.items()}
    rules = [job.rule for job in plan.jobs]
    models = max((len(job.inputs) for job in plan.jobs), default=2)
    blends = [rule for rule in rules if isinstance(rule, Blend)]
    return PlanReport(
        method=request.method,
        engine="mergekit" if request.foreign else "expo",
        sft=sources.get("sft"),
        aligned=sources.get("aligned"),
        sources=sources,
        alpha=request.alpha,
        paper_alpha=None if request.alpha is None else paper_alpha(request.alpha),
        alpha_range=plan.alpha_range,
        dtypes=tuple(sorted({job.dtype for job in plan.jobs})),
        rounding=request.rounding,
        seed=request.seed,
        tensors=TensorReport(
            matched=len(blends),
            copied=len(rules) - len(blends),
            missing=plan.missing,
            extra=plan.extra,
            mismatched=plan.mismatched,
            edited_matrices=sum(len(job.matrices) for job in plan.jobs),
        ),
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        download_bytes=plan.download_bytes,
        stream_bytes=plan.stream_bytes,
        memory_bytes=memory_bytes(threads, chunk_bytes, models=models, outputs=outputs)
        + plan.preparation_bytes(threads)
        + plan.codes_bytes(threads)
        + (AHEAD_BYTES + plan.held_bytes(threads) if plan.stream_bytes else 0),
        free_disk_bytes=free,
        shards={shard.file: shard.file_bytes for shard in plan.shards},
        tokenizer_donor=_tokenizer_donor(plan),
        sidecars=tuple(sidecar.name for sidecar in plan.sidecars),
        left_behind=plan.left_behind,
        notes=plan.notes,
        warnings=plan.warnings,
        noise=plan.noise,
        refusals=(*plan.refusals, *refusals),
        out=out,
    )


def _tokenizer_donor(plan: Plan) -> str | None:
    if plan.request.foreign is not None and plan.request.foreign.changes_tokenizer:
        return "mergekit, as the spec asks"
    has_tokenizer = any(sidecar.name.startswith("tokenizer") for sidecar in plan.sidecars)
    return plan.donor.tokenizer_files.label if has_tokenizer else None


def _source(checkpoint: Checkpoint) -> SourceReport:
    reference = checkpoint.reference
    adapter = checkpoint.adapter
    return SourceReport(
        model=str(reference.model),
        kind=_kind(reference.model),
        commit=checkpoint.files.commit,
        adapter=None if adapter is None else str(reference.adapter),
        adapter_commit=adapter.files.commit if adapter else None,
    )


def _kind(location: Location) -> str:
    if location.url is not None:
        return "object store"
    if location.path is not None:
        return "local directory" if location.path.is_dir() else "local file"
    return "Hub repository"


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
