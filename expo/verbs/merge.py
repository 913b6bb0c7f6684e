"""`expo extrapolate` and `expo merge`: run plans, each into its own OUT, verified before it appears."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from expo.checkpoint.checkpoint import hash_file
from expo.checkpoint.sidecars import CARD, is_apart
from expo.compute.inputs import fetch
from expo.compute.stream import Progress, Tuning, stream
from expo.errors import CheckpointError, OutputError, SpecError
from expo.output.claim import check_out
from expo.output.durable import copy_file, unwritable, write_file
from expo.output.folder import write_small_files
from expo.output.journal import Fingerprint, fingerprint, identities
from expo.output.manifest import Identities, Manifest
from expo.output.sink import FinishedShard
from expo.output.staging import Staging, claimed
from expo.planning.build import build_plan
from expo.planning.findings import room
from expo.planning.plan import Plan
from expo.publishing.card import card
from expo.results import MergeResult
from expo.spec.request import Request, Rounding, make_request
from expo.verbs.manifests import foreign_manifest, streamed_manifest, sums_by_tensor

if TYPE_CHECKING:  # YAML, schemas and checks are imported by those that need them
    from expo.spec.read import Spec
    from expo.verification.golden import Golden
    from expo.verification.run import Children


def extrapolate(
    sft: str | PathLike[str],
    aligned: str | PathLike[str],
    out: str | PathLike[str],
    *,
    alpha: float | None = None,
    paper_alpha: float | None = None,
    interpolate: bool = False,
    dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    stream_inputs: bool = False,
) -> MergeResult:
    """Write θ_sft + α(θ_aligned − θ_sft) to the directory `out` (ExPO, arXiv 2404.16792).

    Args:
        sft, aligned: a directory, a Hub id (`org/name@revision`), a prefix of an object store
            (`s3://bucket/prefix`), or `model+adapter`.
        alpha, paper_alpha: one of them. alpha 0 is SFT, 1 is aligned, 1.5 extrapolates; paper_alpha = alpha − 1
            is what the paper and most cards name.
        interpolate: allow 0 < alpha < 1, which is refused because a card's 0.3 is 1.3 here.
        dtype: of the output's floats; by default each tensor keeps the aligned model's.
        rounding: "nearest", or "stochastic" (seeded, unbiased).
        max_shard_bytes: re-shard; by default the shards are the aligned model's.
        overwrite: as in `merge`.
        verify: run the quick checks of `expo.verify` on the output before it appears; it appears
            either way, `verified` of the result says what they found.
        progress: called with (bytes written, bytes in all).
        stream_inputs: read weights on the Hub by range, without a download.

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    request = make_request(
        str(sft),
        str(aligned),
        alpha=alpha,
        paper_alpha=paper_alpha,
        interpolate=interpolate,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        max_shard_bytes=max_shard_bytes,
    )
    return merge(
        request,
        out,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        stream_inputs=stream_inputs,
    )


def merge(
    spec: "Spec",
    out: str | PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    stream_inputs: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Run a merge spec (a YAML file, or a mapping of the same form) into the directory `out`.

    Args:
        overwrite: replace the model that `out` holds, once the new one is whole; an `out` with anything else
            in it is refused.
        verify, stream_inputs: as in `extrapolate`.
        progress: called with (bytes written, bytes in all).

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """

    from expo.planning.preview import check_all
    from expo.spec.read import read_request
    from expo.spec.stages import read_stages
    from expo.verbs.stages import run_stages

    def final(request: Request) -> Request:
        return replace(request, stream_inputs=stream_inputs)

    def run(request: Request, place: Path, is_part: bool) -> MergeResult:
        replaces, checks = overwrite or is_part, verify and not is_part
        plan = build_plan(final(request))
        return run_plan(plan, place, overwrite=replaces, verify=checks, progress=progress)

    if isinstance(spec, str | PathLike):
        stages = read_stages(Path(spec))
        if len(stages) > 1:
            check_all(stages, final)
        return run_stages(stages, Path(out), run, overwrite=overwrite)
    return run(read_request(spec), Path(out), False)


def run_plan(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    hash_inputs: bool = False,
    verify: bool = False,
    tuning: Tuning = Tuning(),
    progress: Progress | None = None,
    checking: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> MergeResult:
    """Write the merged model to `out`: `run_plans` of one."""
    (result,) = run_plans(
        [plan],
        [out],
        overwrite=overwrite,
        hash_inputs=hash_inputs,
        verify=verify,
        tuning=tuning,
        progress=progress,
        checking=checking,
        say=say,
    )
    return result


def run_plans(
    plans: Sequence[Plan],
    outs: Sequence[Path],
    *,
    overwrite: bool = False,
    hash_inputs: bool = False,
    verify: bool = False,
    tuning: Tuning = Tuning(),
    progress: Progress | None = None,
    checking: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[MergeResult, ...]:
    """Write one merge at several α (`Plan.at`), each to its own place, from one read of the inputs.

    An interrupted run (KeyboardInterrupt and the like, a full disk) leaves its staging directories
    and the same call resumes it. A refused one leaves nothing.

    Args:
        verify: run the quick checks on every output before it is placed. What they find is in the
            result and in the manifest; the output is placed either way.
        progress: called with (bytes written, bytes in all) a few times a second.
        checking: called with (steps done, steps in all) when the verification goes on.
        say: called with each remark about resuming.

    Raises:
        SpecError: a plan has no alpha.
        CheckpointError: a plan refuses, an input holds NaN or Inf, or changed under way.
        OutputError: an `out` is taken, or the disk is full.
    """
    started = time.monotonic()
    for plan, out in zip(plans, outs, strict=True):
        _check_plan(plan)
        check_out(out, plan.request, overwrite=overwrite)
    fetch(plans[0])
    known = _identities(plans[0], hash_inputs=hash_inputs)
    with ExitStack() as claims:
        runs = [_Run(plan, claims.enter_context(claimed(out, plan.request, overwrite=overwrite)),
                     fingerprint(plan, known), known)
                for plan, out in zip(plans, outs, strict=True)]  # fmt: skip
        try:
            manifests = _produce(
                runs, tuning, verify=verify, progress=progress, checking=checking, say=say
            )
            for run, manifest in zip(runs, manifests, strict=True):
                run.staging.commit(_with_card(run, manifest))
        except (CheckpointError, SpecError):
            for run in runs:
                run.staging.discard()
            raise
        except OSError as error:
            raise unwritable(error, runs[0].staging.out, kept="finished shards") from error
    seconds = time.monotonic() - started
    return tuple(_result(r, m, seconds) for r, m in zip(runs, manifests, strict=True))


@dataclass(frozen=True)
class _Run:
    """One plan on its way to its OUT."""

    plan: Plan
    staging: Staging
    print_: Fingerprint
    known: Identities


def _produce(
    runs: Sequence[_Run],
    tuning: Tuning,
    *,
    verify: bool,
    progress: Progress | None,
    checking: Progress | None,
    say: Callable[[str], None] | None,
) -> list[Manifest]:
    """Everything up to the placement: the manifests, which are written last."""
    manifests = [run.staging.complete_manifest(run.print_) for run in runs]
    left = [run for run, known in zip(runs, manifests, strict=True) if known is None]
    if not left:
        made = []
    elif left[0].plan.request.foreign is not None:
        made = [_foreign(run, verify=verify) for run in left]
    else:
        made = _streamed(left, tuning, verify=verify, progress=progress, checking=checking, say=say)
    following = iter(made)
    return [known if known is not None else next(following) for known in manifests]


def _streamed(
    runs: Sequence[_Run],
    tuning: Tuning,
    *,
    verify: bool,
    progress: Progress | None,
    checking: Progress | None,
    say: Callable[[str], None] | None,
) -> list[Manifest]:
    finished = [_resumed(run, say) for run in runs]
    hashes = [write_small_files(run.plan, run.staging.folder) for run in runs]
    with ExitStack() as stack:
        # They need no weights, so they work while the weights stream; all outputs have the same files.
        children = stack.enter_context(_children(runs[0])) if verify else None
        done = stream(
            [run.plan for run in runs],
            [run.staging for run in runs],
            finished=finished,
            tuning=tuning,
            progress=progress,
        )
        if changed := _changed(runs[0].known, identities(runs[0].plan)):
            raise CheckpointError(f"{changed} changed while it was read: run again")
        manifests = [
            streamed_manifest(run.plan, run.print_.digest, run.known, shards, files)
            for run, shards, files in zip(runs, done, hashes, strict=True)
        ]
        if children is None:
            return manifests
        together = zip(runs, manifests, done, strict=True)
        return [_verified(*one, children, checking) for one in together]


def _resumed(run: _Run, say: Callable[[str], None] | None) -> list[FinishedShard]:
    """The shards that an earlier run left, and whether the rest has room."""
    plan, staging = run.plan, run.staging
    finished, reason = staging.resume(run.print_)
    if say and (reason or finished):
        say(reason or f"resuming: {len(finished)} of {len(plan.shards)} shards done")
    _check_space(plan, staging, finished)
    return finished


def _verified(
    run: _Run,
    manifest: Manifest,
    finished: Sequence[FinishedShard],
    children: "Children",
    checking: Progress | None,
) -> Manifest:
    """The checks, with what the stream knows: it wrote no NaN, and zeros only where both had them."""
    from expo.verification.run import verify_stream
    from expo.verification.subject import TensorFacts

    plan = run.plan
    sums = sums_by_tensor(finished)
    zero = {
        name for name, s in sums.items() if s.elements and not (s.base_square or s.delta_square)
    }
    sft = plan.sources.get("sft")
    found = verify_stream(
        run.staging.folder,
        children,
        TensorFacts({shard.file: shard.sha256 for shard in finished}, zero=frozenset(zero)),
        aligned=plan.donor,
        sft=None if sft is None else sft.tokenizer_files,
        asked_dtype=plan.request.dtype,
        golden=_golden(plan),
        stop_at=plan.request.stop_at,
        checking=checking,
    )
    return replace(
        manifest, verified=found.ok, verification=found.checks, example=children.example()
    )


def _foreign(run: _Run, *, verify: bool) -> Manifest:
    """Everything up to the placement by mergekit's engine.

    There is no resume: an interrupted run starts afresh.
    """
    from expo.compute.foreign import merge_with_mergekit
    from expo.verification.run import children_of, verify_folder

    plan, folder = run.plan, run.staging.folder
    run.staging.start_afresh(run.print_)
    merge_with_mergekit(plan, folder)
    for sidecar in plan.sidecars:
        copy_file(sidecar.files.local_path(sidecar.name), folder / sidecar.name)
    files = run.staging.seal()
    manifest = foreign_manifest(plan, run.print_.digest, run.known, folder, files)
    if not verify:
        return manifest
    # without the donor: layers and vocabulary may differ from every model's on purpose
    golden, stop_at = _golden(plan), plan.request.stop_at
    with children_of(folder, golden=golden) as children:
        found = verify_folder(folder, golden=golden, quick=True, stop_at=stop_at, children=children)
        example = children.example()
    return replace(manifest, verified=found.ok, verification=found.checks, example=example)


def _with_card(run: _Run, manifest: Manifest) -> Manifest:
    """The manifest with the model card, written unless an earlier run came as far."""
    if CARD in manifest.beside:
        return manifest
    written = write_file(run.staging.folder / CARD, card(manifest).encode())
    known = sorted((manifest.files | {CARD: written}).items())
    files, beside = (
        {name: sha256 for name, sha256 in known if is_apart(name) is apart}
        for apart in (False, True)
    )
    return replace(manifest, files=files, beside=beside)


def _children(run: _Run) -> "Children":
    from expo.verification.run import Children

    plan = run.plan
    headers = {shard.file: (shard.header, shard.file_bytes) for shard in plan.shards}
    known = headers if (run.staging.folder / "config.json").exists() else None
    return Children(run.staging.folder, plan.donor, _golden(plan), known)


def _golden(plan: Plan) -> "Golden | None":
    from expo.verification.golden import read_golden

    return None if plan.request.vectors is None else read_golden(plan.request.vectors)


def _result(run: _Run, manifest: Manifest, seconds: float) -> MergeResult:
    written = run.plan.write_bytes
    if manifest.engine == "mergekit":  # only now it is known
        written = sum((run.staging.out / name).stat().st_size for name in manifest.files)
    return MergeResult(
        out=run.staging.out,
        method=manifest.method,
        alpha=manifest.alpha,
        paper_alpha=manifest.paper_alpha,
        statistics=manifest.statistics,
        alternative=manifest.alternative,
        modules=manifest.modules,
        edits=manifest.edits,
        written_bytes=written,
        seconds=seconds,
        warnings=manifest.warnings,
        verified=manifest.verified,
        checks=manifest.verification or (),
        engine=manifest.engine,
        alpha_range=manifest.alpha_range,
        notes=manifest.notes,
    )


def _check_plan(plan: Plan) -> None:
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    if not plan.request.gives_alpha:
        raise SpecError(
            "give alpha (θ_sft + α·Δ) or paper alpha (= alpha − 1); neither has a default"
        )


def _identities(plan: Plan, *, hash_inputs: bool) -> Identities:
    known = identities(plan)
    if hash_inputs and plan.stream_bytes:
        cure = "leave out --hash-inputs, or bring the models to this disk first"
        raise SpecError(
            f"--hash-inputs reads inputs whole, and streamed ones are read once: {cure}"
        )
    if hash_inputs:
        for side, checkpoint in plan.sources.items():
            for files, shard in checkpoint.inputs():
                known[f"{side} {files.label}/{shard.file}"]["sha256"] = hash_file(files, shard.file)
    return known


def _changed(before: Identities, after: Identities) -> str | None:
    """The first input whose identity is no longer what it was."""
    for name, identity in after.items():
        if any(before[name].get(key) != value for key, value in identity.items()):
            return name
    return None


def _check_space(plan: Plan, staging: Staging, finished: list[FinishedShard]) -> None:
    beside = sum(sidecar.files.sizes[sidecar.name] for sidecar in plan.sidecars)
    needed = plan.write_bytes - sum(shard.file_bytes for shard in finished) + beside
    free = staging.free_bytes()
    if needed > free:
        if not finished:
            staging.discard()
        raise OutputError(
            f"the disk of {staging.out} is too full: {room(needed, free)}; "
            "make room, or name an OUT on another disk"
        )
