"""`expo extrapolate` and `expo merge`: run plans, each into its own OUT, verified before it appears."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, overload

from expo.checkpoint.checkpoint import hash_file
from expo.compute.inputs import fetch
from expo.compute.stream import Progress, Tuning, stream
from expo.errors import CheckpointError, ExpoError, SpecError
from expo.output.claim import check_out
from expo.output.durable import is_of_the_process, unwritable
from expo.output.journal import Fingerprint, fingerprint, identities
from expo.output.manifest import Identities, Manifest
from expo.output.staging import Hold, claimed
from expo.planning.build import build_plan
from expo.planning.one_file import placed
from expo.planning.plan import Plan
from expo.results import MergeResult
from expo.spec.request import Request, Rounding, make_request
from expo.verbs.producing import Engine, Run, produce, with_card
from expo.verbs.several import plans_at

if TYPE_CHECKING:  # YAML, schemas and checks are imported by those that need them
    from expo.spec.read import Spec


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
    join: bool = False,
    device: str = "cpu",
    force: bool = False,
) -> MergeResult:
    """Write θ_sft + α(θ_aligned − θ_sft) to the directory `out` (ExPO, arXiv 2404.16792), or to the one file
    that a name like `out.safetensors` stands for.

    Args:
        sft, aligned: a directory, a safetensors file, a Hub id (`org/name@revision`), a prefix of an object store
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
        join: share the work with every other process that makes the same call, on this machine or another that sees
            `out`. All of them return when `out` is there.
        device: "cpu", "cuda" or "cuda:1". Tensors have the same bytes everywhere; edited matrices have those of the
            device's library.
        force: extrapolate quantized models whose noise outweighs the change.

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
        join=join,
        device=device,
        force=force,
    )


@overload
def merge(
    spec: "Spec",
    out: str | PathLike[str],
    *,
    alphas: None = None,
    interpolate: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    stream_inputs: bool = False,
    join: bool = False,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult: ...


@overload
def merge(
    spec: "Spec",
    out: str | PathLike[str],
    *,
    alphas: Sequence[float],
    interpolate: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    stream_inputs: bool = False,
    join: bool = False,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[MergeResult, ...]: ...


def merge(
    spec: "Spec",
    out: str | PathLike[str],
    *,
    alphas: Sequence[float] | None = None,
    interpolate: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    stream_inputs: bool = False,
    join: bool = False,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult | tuple[MergeResult, ...]:
    """Run a merge spec (a YAML file, or a mapping of the same form) into the directory `out`.

    Args:
        alphas: of an ExPO spec, in place of its own: an output for each, `out`-alpha-1.2 and so on, from one
            read of the models. The results come in a tuple, with rising α.
        interpolate: allow 0 < alpha < 1 among them, as in `extrapolate`.
        overwrite: replace the model that `out` holds, once the new one is whole; an `out` with anything else
            in it is refused.
        verify, stream_inputs, join, device: as in `extrapolate`.
        force: go on where a gate refuses, as `force: true` in the spec.
        progress: called with (bytes written, bytes in all).

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """

    from expo.planning.preview import check_all
    from expo.spec.read import read_request
    from expo.spec.stages import read_stages
    from expo.verbs.join import join_plans
    from expo.verbs.stages import run_stages

    tuning = Tuning.on(device)

    def final(request: Request) -> Request:
        request = replace(request, stream_inputs=stream_inputs)
        return request.forced() if force else request

    def run_all(
        plans: Sequence[Plan], outs: Sequence[Path], *, overwrite: bool, verify: bool
    ) -> tuple[MergeResult, ...]:
        how = {"overwrite": overwrite, "verify": verify, "tuning": tuning, "progress": progress}
        done = join_plans(plans, outs, **how) if join else run_plans(plans, outs, **how)
        assert isinstance(done, tuple)  # no share was given
        return done

    def run(request: Request, place: Path, is_part: bool) -> MergeResult:
        replaces, checks = overwrite or is_part, verify and not is_part
        (result,) = run_all(
            [build_plan(final(request))], [place], overwrite=replaces, verify=checks
        )
        return result

    if alphas is not None:
        plans, outs = plans_at(
            final(read_request(spec)), alphas, Path(out), interpolate=interpolate
        )
        return run_all(plans, outs, overwrite=overwrite, verify=verify)
    if isinstance(spec, str | PathLike):
        stages = read_stages(Path(spec))
        if len(stages) > 1:
            if join:
                raise SpecError(
                    "join: not with a spec of several documents, which are made one after the other"
                )
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
    hold: Hold = Hold.ALONE,
    engine: Engine = stream,
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
        hold: how the staging directories are held, which others may share.
        engine: what computes the shards.

    Raises:
        SpecError: a plan has no alpha, or a device is named for what mergekit computes.
        CheckpointError: a plan refuses, an input holds NaN or Inf, or changed under way.
        OutputError: an `out` is taken, or the disk is full.
    """
    started = time.monotonic()
    plans = [placed(plan, out.resolve()) for plan, out in zip(plans, outs, strict=True)]
    there = {} if overwrite else _there(plans, outs, tuning.backend, hash_inputs=hash_inputs)
    left = [one for one in zip(plans, outs, strict=True) if one[1] not in there]
    for plan, out in left:
        check_plan(plan, hash_inputs=hash_inputs)
        if tuning.device is not None:
            check_engine(plan)
        check_out(out, plan.request, overwrite=overwrite)
    if say and there:
        say(f"there already, of this very merge: {', '.join(out.name for out in there)}")
    fetch(plans[0])
    known = known_identities(plans[0], hash_inputs=hash_inputs)
    with ExitStack() as claims:
        claim = partial(_claimed_run, claims, known, tuning.backend, overwrite=overwrite, hold=hold)
        runs = [claim(plan, out) for plan, out in left]
        try:
            manifests = produce(
                runs,
                tuning,
                verify=verify,
                progress=progress,
                checking=checking,
                say=say,
                engine=engine,
            )
            for run, manifest in zip(runs, manifests, strict=True):
                run.staging.commit(with_card(run, manifest))
        except (CheckpointError, SpecError) as error:
            raise _given_up(runs, error) from error.__cause__
        except OSError as error:
            if is_of_the_process(error):
                raise
            raise unwritable(error, runs[0].staging.out, kept="finished shards") from error
    seconds = time.monotonic() - started
    made = there | {out: m for (_, out), m in zip(left, manifests, strict=True)}
    return tuple(
        merge_result(plan, out.resolve(), made[out], seconds)
        for plan, out in zip(plans, outs, strict=True)
    )


def _there(
    plans: Sequence[Plan], outs: Sequence[Path], backend: str, *, hash_inputs: bool
) -> dict[Path, Manifest]:
    """Of several outputs those that this very merge has placed before it was killed between two of them."""
    if len(plans) == 1 or hash_inputs or not any(map(Path.exists, outs)):
        return {}
    known = identities(plans[0])
    prints = [fingerprint(plan, known, backend) for plan in plans]
    found = {out: placed_manifest(out, print_) for out, print_ in zip(outs, prints, strict=True)}
    there = {out: manifest for out, manifest in found.items() if manifest is not None}
    return there if len(there) < len(plans) else {}


def placed_manifest(out: Path, print_: Fingerprint) -> Manifest | None:
    """OUT's manifest, where OUT is the output of this very plan."""
    manifest = Manifest.of_folder(out) if out.exists() else None
    return manifest if manifest is not None and manifest.plan == print_.digest else None


def _claimed_run(
    claims: ExitStack,
    known: Identities,
    backend: str,
    plan: Plan,
    out: Path,
    *,
    overwrite: bool,
    hold: Hold,
) -> Run:
    print_ = fingerprint(plan, known, backend)
    staging = claimed(out, plan.request, overwrite=overwrite, print_=print_, hold=hold)
    return Run(plan, claims.enter_context(staging), print_, known)


def _given_up(runs: Sequence[Run], error: ExpoError) -> ExpoError:
    """A refused run leaves nothing. One that the system stopped (no more open files, a disk that fails) keeps the
    shards that it has finished: they are no worse for it."""
    of_system = isinstance(error.__cause__, OSError)
    if of_system and any(run.staging.has_shards for run in runs):
        kept = "finished shards are kept, run the same command again"
        return type(error)(f"{error}; {kept}")
    for run in runs:
        run.staging.discard()
    return error


def merge_result(plan: Plan, out: Path, manifest: Manifest, seconds: float) -> MergeResult:
    """What is told of a run that is done."""
    written = plan.write_bytes
    if manifest.engine == "mergekit":  # only now it is known
        written = sum((out / name).stat().st_size for name in manifest.files)
    return MergeResult(
        out=out,
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


def check_plan(plan: Plan, *, hash_inputs: bool = False) -> None:
    """That a plan can be run.

    Raises:
        CheckpointError: it refuses.
        SpecError: it has no alpha, or a streamed input would have to be read twice to be hashed.
    """
    if hash_inputs and plan.stream_bytes:
        raise SpecError(
            "--hash-inputs reads inputs whole, and streamed ones are read once: leave out --hash-inputs, or "
            "bring the models to this disk first"
        )
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    if not plan.request.gives_alpha:
        raise SpecError(
            "give alpha (θ_sft + α·Δ) or paper alpha (= alpha − 1); neither has a default"
        )


def check_engine(plan: Plan) -> None:
    """Of a plan for which a device is named. Raises SpecError: mergekit would not hear of it."""
    if plan.request.foreign is not None:
        raise SpecError(
            f"--device: not with mergekit's engine ({plan.request.foreign.reasons[0]}), which computes on the CPU: "
            "leave it out"
        )


def known_identities(plan: Plan, *, hash_inputs: bool) -> Identities:
    """Every input with what tells it from a changed one; `hash_inputs` adds the SHA-256 of whole files."""
    known = identities(plan)
    if hash_inputs:
        for side, checkpoint in plan.sources.items():
            for files, shard in checkpoint.inputs():
                known[f"{side} {files.label}/{shard.file}"]["sha256"] = hash_file(files, shard.file)
    return known
