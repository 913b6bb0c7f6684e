"""What `extrapolate`, `merge` and `plan` share: plan, show it or run it, report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli.options import RunOptions
from expo.cli.output import STEPS, WRITTEN, Output, speed, to_json
from expo.cli.result_text import details, result_text, worker_text
from expo.cli.stopping import RESUMABLE
from expo.cli.verify import FOUND_AN_ERROR
from expo.cli.verify_text import findings
from expo.errors import ExpoError, SpecError
from expo.planning.findings import gigabytes
from expo.results import VerifyResult, WorkerResult
from expo.spec.request import Request

if TYPE_CHECKING:
    from expo.planning.plan import Plan
    from expo.results import MergeResult
    from expo.spec.stages import Stage

_NOTES = 8  # shown before a run


def run_merge(
    request: Request,
    out: Path,
    options: RunOptions,
    output: Output,
    *,
    alphas: Sequence[float] = (),
) -> None:
    """Plan, and unless it is a dry run, merge: into OUT, or at every one of `alphas` into a place beside it."""
    if options.dry_run:
        show_outputs(request, out, alphas, options, output)
        return
    from expo.compute.stream import Tuning

    tuning = Tuning.on(options.device, options.threads)
    plans, outs = _planned(request, out, alphas)
    if not plans[0].refusals:
        remark(plans, output)
    RESUMABLE.extend(outs)
    with (
        output.progress(out.name) as progress,
        output.progress("verifying", unit=STEPS) as checking,
        _runner(options, output) as run,
    ):
        results = run(
            plans,
            outs,
            overwrite=options.overwrite,
            hash_inputs=options.hash_inputs,
            verify=options.verify,
            tuning=tuning,
            progress=progress,
            checking=checking,
            say=output.say,
        )
    for place in outs:
        RESUMABLE.remove(place)
    if isinstance(results, WorkerResult):
        output.result(results, lambda: worker_text(results))
        return
    warn(results, plans, output)
    WRITTEN.extend(outs)
    if progress.done and not options.shared_by:  # else others wrote some of it
        took = f"{progress.seconds:.1f} s, {speed(progress.rate)}"
        output.say(f"wrote {gigabytes(progress.done)} in {took}")
    if output.json and alphas:
        output.data(to_json(results))
    else:
        for number, one in enumerate(zip(results, plans, outs, strict=True)):
            if number:
                output.data("")
            report(*one, output, is_one=not alphas)
    if any(result.verified is False for result in results):
        raise click.exceptions.Exit(FOUND_AN_ERROR)


@contextmanager
def _runner(
    options: RunOptions, output: Output
) -> "Iterator[Callable[..., tuple[MergeResult, ...] | WorkerResult]]":
    """What makes the outputs: this process alone, or together with others."""
    if options.join or options.share:
        from expo.verbs.join import join_plans

        yield partial(join_plans, share=options.share)
        return
    from expo.verbs.running import run_plans

    if options.engine is None:
        yield run_plans
        return
    try:
        from expo.distribution.ray_engine import RayEngine
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ExpoError("--engine ray needs Ray: pip install 'expo-merge[ray]'") from None
    with RayEngine(options.address, output.say) as engine:
        yield partial(run_plans, engine=engine)


def check_one(stages: "Sequence[Stage]", alphas: Sequence[float]) -> None:
    """Refuse several α of a spec of several documents."""
    if alphas and len(stages) > 1:
        raise SpecError(
            f"--alphas: the spec has {len(stages)} documents, and several outputs are made of one: make the "
            "others first, and name what they gave in a spec of one document"
        )


def _planned(
    request: Request, out: Path, alphas: Sequence[float]
) -> "tuple[list[Plan], list[Path]]":
    """The plan of every output, and its place."""
    from expo.planning.build import build_plan
    from expo.verbs.several import plans_at

    if alphas:
        return plans_at(request, alphas, out, interpolate=True)
    return [build_plan(request)], [out]


def remark(plans: "Sequence[Plan]", output: Output) -> None:
    """Every warning, and what is copied and dropped, as far as it fits a screen."""
    plan = plans[0]
    for warning in dict.fromkeys(warning for one in plans for warning in one.warnings):
        output.say(f"warning: {warning}")
    for note in plan.notes[:_NOTES]:
        output.say(f"note: {note}")
    if len(plan.notes) > _NOTES:
        output.say(f"note: {len(plan.notes) - _NOTES} more are in expo.json, and in expo plan")


def warn(results: "Sequence[MergeResult]", plans: "Sequence[Plan]", output: Output) -> None:
    """What only the tensors could tell."""
    known = {warning for plan in plans for warning in plan.warnings}
    found = dict.fromkeys(warning for result in results for warning in result.warnings)
    for warning in (warning for warning in found if warning not in known):
        output.say(f"warning: {warning}")


def report(
    result: "MergeResult",
    plan: "Plan",
    out: Path,
    output: Output,
    value: object = None,
    *,
    is_one: bool = True,
) -> None:
    """What the verification found on stderr, what came out on stdout: with --json `value`, which holds the result."""
    if output.json:
        output.result(value or result, lambda: "")
        return
    if result.checks and (found := findings(VerifyResult(bool(result.verified), result.checks))):
        output.say(found if is_one else f"{out}:\n{found}")
    output.data(result_text(result, plan, str(out)))
    if output.verbose:
        output.data(details(result))


def show_outputs(
    request: Request,
    out: Path | None,
    alphas: Sequence[float],
    options: RunOptions,
    output: Output,
) -> None:
    """Print the plan of OUT, or of an output at every one of `alphas`; exit 1 where merge would refuse."""
    from expo.cli.plan_text import plan_text, plans_text
    from expo.verbs.plan import plan_reports

    plans, places = _planned(request, out or Path("OUT"), alphas)
    reports = plan_reports(
        plans,
        [place if out is not None else None for place in places],
        overwrite=options.overwrite,
        threads=options.threads,
        device=options.device,
    )
    if alphas:
        text = plans_text(reports, places)
        output.data(to_json(reports) if output.json else text)
    else:
        output.result(reports[0], lambda: plan_text(reports[0]))
    if not all(shown.ok for shown in reports):
        raise click.exceptions.Exit(1)


def show_plans(
    stages: "Sequence[Stage]",
    change: Callable[[Request], Request],
    out: Path | None,
    options: RunOptions,
    output: Output,
) -> None:
    """Print the plan of every document, as one JSON list where that is asked for."""
    from expo.cli.plan_text import plan_text
    from expo.verbs.plan import check_measurable, plan_stages

    if options.device is not None:
        check_measurable(len(stages))
    reports = plan_stages(stages, change, out, overwrite=options.overwrite, threads=options.threads)
    if output.json:
        output.data(to_json(reports))
    for place, (stage, shown) in enumerate(zip(stages, reports, strict=False), 1):
        if not output.json:
            name = "OUT" if place == len(stages) else stage.name
            output.data(f"document {place} of {len(stages)}: {name}\n{plan_text(shown)}\n")
    if not all(shown.ok for shown in reports):
        raise click.exceptions.Exit(1)
