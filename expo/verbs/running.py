"""Plans into their own OUTs: computed into staging directories, verified, and placed."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from expo.checkpoint.checkpoint import hash_file
from expo.checkpoint.sidecars import is_one_file
from expo.compute.inputs import fetch
from expo.compute.stream import Progress, Tuning, stream
from expo.errors import CheckpointError, ExpoError, SpecError
from expo.output.claim import check_out, staging_of
from expo.output.durable import is_of_the_process, unwritable
from expo.output.journal import Fingerprint, fingerprint, identities
from expo.output.manifest import Identities, Manifest, is_whole
from expo.output.staging import Hold, claimed
from expo.planning.one_file import placed
from expo.planning.plan import Plan
from expo.results import MergeResult
from expo.verbs.producing import Engine, Run, produce, with_card


def run_plans(
    plans: Sequence[Plan],
    outs: Sequence[Path],
    *,
    overwrite: bool = False,
    hash_inputs: bool = False,
    known: Identities | None = None,
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
        known: what tells the inputs from changed ones, where it has been looked at already.
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
    if known is None:
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
    """OUT's manifest, where OUT is the output of this very plan, and whole."""
    manifest = Manifest.of_folder(out) if out.exists() else None
    if manifest is None or manifest.plan != print_.digest or not is_whole(out, manifest):
        return None
    work = staging_of(out) if is_one_file(out) else None
    return manifest if work is None or not (work / out.name).exists() else None  # which goes last


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
