"""What a run's manifest says: of what streamed through expo, and of what mergekit computed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from expo.checkpoint.checkpoint import read_shard
from expo.checkpoint.files import open_directory
from expo.compute.summary import alternative, by_module, statistics, total
from expo.operators.statistics import Sums
from expo.output.manifest import Identities, Manifest, source_entry, versions
from expo.output.sink import FinishedShard
from expo.planning.configuration import most_common_dtype
from expo.planning.findings import fell_back
from expo.planning.plan import Plan
from expo.planning.sides import same_weights
from expo.spec.request import Request, paper_alpha
from expo.spec.resolved import mergekit_spec, resolved


def streamed_manifest(
    plan: Plan,
    digest: str,
    known: Identities,
    finished: Sequence[FinishedShard],
    files: dict[str, str],
    backend: str = "cpu",
) -> Manifest:
    """Of an output of expo's engine, computed on `backend`; `files` are the hashes of the small files."""
    request, sums = plan.request, sums_by_tensor(finished)
    samples = {name: value for shard in finished for name, value in shard.samples.items()}
    labels = dict(zip(request.references(), plan.labels, strict=True))
    whole = total(sums.values())
    edits = tuple(edit for shard in finished for edit in shard.edits)
    remarks = (*_no_change(plan, whole), *fell_back(e.matrix for e in edits if e.fell_back))
    return replace(
        _begun(plan, digest, known),
        warnings=tuple(dict.fromkeys((*plan.warnings, *remarks))),
        spec=resolved(request, labels.__getitem__),
        mergekit_spec=mergekit_spec(request, most_common_dtype(plan), labels.__getitem__),
        alpha=request.alpha,
        paper_alpha=None if request.alpha is None else paper_alpha(request.alpha),
        alpha_range=plan.alpha_range,
        donor=plan.donor.label,
        dtypes=tuple(sorted({job.dtype for job in plan.jobs})),
        rounding=request.rounding,
        statistics=statistics(whole),
        alternative=alternative(sums, samples, request.rounding) if samples else None,
        modules={name: statistics(value) for name, value in by_module(sums).items()},
        tensors={name: statistics(value) for name, value in sums.items()},
        edits=edits,
        versions=versions("torch", "numba", "safetensors"),
        files=files | {shard.file: shard.sha256 for shard in finished},
        flags=(*_flags(request), *(device_flags(backend) if edits else ())),
        backend=backend,
    )


def foreign_manifest(
    plan: Plan, digest: str, known: Identities, folder: Path, files: dict[str, str]
) -> Manifest:
    """Of an output of mergekit's engine: what it did to each tensor is not known."""
    from expo.spec.surgery import renamed

    request, foreign = plan.request, plan.request.foreign
    assert foreign is not None
    labels = dict(zip(request.references(), plan.labels, strict=True))
    names = {text: labels[model] for text, model in foreign.models.items()}
    spec = renamed(foreign.spec, names)
    return replace(
        _begun(plan, digest, known),
        spec=spec,
        mergekit_spec=spec,
        donor=None if foreign.changes_tokenizer else plan.donor.label,
        dtypes=_dtypes(folder),
        versions=versions("mergekit"),
        files=files,
        engine="mergekit",
        reasons=foreign.reasons,
    )


def _no_change(plan: Plan, whole: Sums) -> Iterator[str]:
    """A warning where a run has found that SFT and aligned do not differ anywhere."""
    request = plan.request
    one = request.method == "expo" and len(request.operands) == 1
    if one and whole.elements and not whole.delta_square:
        models = {model.reference: model for model in plan.sources.values()}
        yield same_weights(plan.sources["sft"], models[request.operands[0].reference])


def sums_by_tensor(finished: Sequence[FinishedShard]) -> dict[str, Sums]:
    return {name: value for shard in finished for name, value in shard.sums.items()}


def _begun(plan: Plan, digest: str, known: Identities) -> Manifest:
    """What is known before anything is computed."""
    return Manifest(
        plan=digest,
        method=plan.request.method,
        sources={role: source_entry(checkpoint) for role, checkpoint in plan.sources.items()},
        inputs=known,
        seed=plan.request.seed,
        statistics=statistics(Sums()),
        notes=plan.notes,
        warnings=plan.warnings,
        files={},
        flags=_flags(plan.request),
        is_of_transformers=plan.donor.is_of_transformers,
        noise=plan.noise,
    )


def _flags(request: Request) -> tuple[str, ...]:
    """What decides the output and has no place in a spec."""
    flags: list[str] = []
    if request.allow_missing is not None:
        flags += ["--allow-missing", request.allow_missing]
    for pattern in request.include:
        flags += ["--include", pattern]
    if request.max_shard_bytes is not None:
        flags += ["--max-shard-size", str(request.max_shard_bytes)]
    return tuple(flags)


def device_flags(backend: str) -> tuple[str, ...]:
    """Those that have matrices taken apart by the library that a backend names."""
    device = backend.partition(":")[0]
    return () if device == "cpu" else ("--device", device)


def _dtypes(folder: Path) -> tuple[str, ...]:
    """The dtypes that are in an output."""
    opened = open_directory(folder)
    shards = [read_shard(opened, name) for name in opened.sizes if name.endswith(".safetensors")]
    return tuple(sorted({tensor.dtype for shard in shards for tensor in shard.tensors}))
