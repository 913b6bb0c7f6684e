"""What `extrapolate`, `merge` and `plan` share: plan, show it or run it, report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli.options import RunOptions
from expo.cli.output import STEPS, WRITTEN, Output, speed, to_json
from expo.cli.result_text import details, result_text
from expo.cli.stopping import RESUMABLE
from expo.cli.verify import FOUND_AN_ERROR
from expo.cli.verify_text import findings
from expo.planning.findings import gigabytes
from expo.results import VerifyResult
from expo.spec.request import Request

if TYPE_CHECKING:
    from expo.planning.plan import Plan
    from expo.results import MergeResult
    from expo.spec.stages import Stage

_NOTES = 8  # shown before a run


def run_merge(request: Request, out: Path, options: RunOptions, output: Output) -> None:
    """Plan, and unless it is a dry run, merge."""
    from expo.planning.build import build_plan

    plan = build_plan(request)
    if options.dry_run:
        show_plan(plan, out, options, output)
        return
    from expo.compute.stream import Tuning
    from expo.verbs.merge import run_plan

    if not plan.refusals:
        remark(plan, output)
    RESUMABLE.append(out)
    with (
        output.progress(out.name) as progress,
        output.progress("verifying", unit=STEPS) as checking,
    ):
        result = run_plan(
            plan,
            out,
            overwrite=options.overwrite,
            hash_inputs=options.hash_inputs,
            verify=options.verify,
            tuning=Tuning(threads=options.threads),
            progress=progress,
            checking=checking,
            say=output.say,
        )
    RESUMABLE.remove(out)
    WRITTEN.append(out)
    if progress.done:
        took = f"{progress.seconds:.1f} s, {speed(progress.rate)}"
        output.say(f"wrote {gigabytes(progress.done)} in {took}")
    report(result, plan, out, output)
    if result.verified is False:
        raise click.exceptions.Exit(FOUND_AN_ERROR)


def remark(plan: "Plan", output: Output) -> None:
    """Every warning, and what is copied and dropped, as far as it fits a screen."""
    for warning in plan.warnings:
        output.say(f"warning: {warning}")
    for note in plan.notes[:_NOTES]:
        output.say(f"note: {note}")
    if len(plan.notes) > _NOTES:
        output.say(f"note: {len(plan.notes) - _NOTES} more are in expo.json, and in expo plan")


def report(
    result: "MergeResult", plan: "Plan", out: Path, output: Output, value: object = None
) -> None:
    """What the tensors and the verification told on stderr, what came out on stdout: with --json `value`, which
    holds the result."""
    for warning in result.warnings:
        if warning not in plan.warnings:  # what only the tensors could tell
            output.say(f"warning: {warning}")
    if output.json:
        output.result(value or result, lambda: "")
        return
    if result.checks and (found := findings(VerifyResult(bool(result.verified), result.checks))):
        output.say(found)
    output.data(result_text(result, plan, str(out)))
    if output.verbose:
        output.data(details(result))


def show_plan(plan: "Plan", out: Path | None, options: RunOptions, output: Output) -> None:
    """Print the plan; exit 1 where merge would refuse."""
    from expo.cli.plan_text import plan_text
    from expo.verbs.plan import plan_report

    shown = plan_report(plan, out, overwrite=options.overwrite, threads=options.threads)
    output.result(shown, lambda: plan_text(shown))
    if not shown.ok:
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
    from expo.verbs.plan import plan_stages

    reports = plan_stages(stages, change, out, overwrite=options.overwrite, threads=options.threads)
    if output.json:
        output.data(to_json(reports))
    for place, (stage, shown) in enumerate(zip(stages, reports, strict=False), 1):
        if not output.json:
            name = "OUT" if place == len(stages) else stage.name
            output.data(f"document {place} of {len(stages)}: {name}\n{plan_text(shown)}\n")
    if not all(shown.ok for shown in reports):
        raise click.exceptions.Exit(1)
