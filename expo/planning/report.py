"""What a plan says to a person or a pipeline."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.reference import Reference
from expo.planning.chunks import DEFAULT_THREADS, memory_bytes
from expo.planning.plan import Plan
from expo.spec.request import paper_alpha


@dataclass(frozen=True)
class SourceReport:
    """One side: what was taken for it, at which Hub commit if any."""

    model: str
    kind: str
    commit: str | None
    adapter: str | None
    adapter_commit: str | None


@dataclass(frozen=True)
class TensorReport:
    """Counts of what is computed and copied, names of what does not fit."""

    matched: int
    copied: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]


@dataclass(frozen=True)
class PlanReport:
    """What a merge would do. It runs only where `refusals` is empty."""

    sft: SourceReport
    aligned: SourceReport
    alpha: float | None
    paper_alpha: float | None
    dtypes: tuple[str, ...]
    rounding: str
    seed: int
    tensors: TensorReport
    read_bytes: int
    write_bytes: int
    download_bytes: int
    memory_bytes: int
    free_disk_bytes: int
    shards: dict[str, int]
    tokenizer_donor: str | None
    sidecars: tuple[str, ...]
    left_behind: dict[str, int]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    refusals: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.refusals


def report(
    plan: Plan,
    *,
    out: Path | None = None,
    threads: int = DEFAULT_THREADS,
    refusals: tuple[str, ...] = (),
) -> PlanReport:
    """Describe a plan; `refusals` are reasons to add that lie outside of it (OUT is taken)."""
    request = plan.request
    free = shutil.disk_usage(_existing(out or Path.cwd())).free
    if plan.write_bytes > free:
        room = f"{plan.write_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        refusals = (*refusals, f"the disk of {out or 'this directory'} is too full: {room}")
    has_tokenizer = any(sidecar.name.startswith("tokenizer") for sidecar in plan.sidecars)
    actions = [job.action for job in plan.jobs]
    return PlanReport(
        sft=_source(request.base, plan.base),
        aligned=_source(request.aligned, plan.aligned),
        alpha=request.alpha,
        paper_alpha=None if request.alpha is None else paper_alpha(request.alpha),
        dtypes=tuple(sorted({job.dtype for job in plan.jobs})),
        rounding=request.rounding,
        seed=request.seed,
        tensors=TensorReport(
            matched=actions.count("extrapolate"),
            copied=len(actions) - actions.count("extrapolate"),
            missing=plan.missing,
            extra=plan.extra,
            mismatched=plan.mismatched,
        ),
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        download_bytes=plan.download_bytes,
        memory_bytes=memory_bytes(threads),
        free_disk_bytes=free,
        shards={shard.file: shard.file_bytes for shard in plan.shards},
        tokenizer_donor=plan.aligned.tokenizer_files.label if has_tokenizer else None,
        sidecars=tuple(sidecar.name for sidecar in plan.sidecars),
        left_behind=plan.left_behind,
        notes=plan.notes,
        warnings=plan.warnings,
        refusals=(*plan.refusals, *refusals),
    )


def _source(reference: Reference, checkpoint: Checkpoint) -> SourceReport:
    adapter = checkpoint.adapter
    return SourceReport(
        model=str(reference.model),
        kind="local directory" if reference.model.path is not None else "Hub repository",
        commit=checkpoint.files.commit,
        adapter=None if adapter is None else str(reference.adapter),
        adapter_commit=adapter.files.commit if adapter else None,
    )


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
