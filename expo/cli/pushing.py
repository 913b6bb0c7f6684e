"""What `extrapolate` and `merge` do with --push: plan, show it or run it, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli.merging import remark, report, warn
from expo.cli.options import PublishOptions, RunOptions
from expo.cli.output import STEPS, Output
from expo.cli.stopping import RESUMABLE
from expo.errors import SpecError
from expo.planning.findings import gigabytes
from expo.spec.request import Request

if TYPE_CHECKING:
    from expo.planning.plan import Plan
    from expo.results import PushPlan, PushResult
    from expo.verbs.push import Publication


_SCHEME = "hf:/"  # a path has one slash of hf://


def is_push(out: Path, to: PublishOptions, alphas: Sequence[float]) -> bool:
    """Whether OUT is on the Hub.

    Raises:
        SpecError: it is not, and a flag is for that; or it is, and there would be several.
    """
    if to.push or str(out).startswith(_SCHEME):
        if alphas:
            raise SpecError(
                "--alphas: not with --push, which makes one commit: push each by itself"
            )
        return True
    given = [name for name, value in vars(to).items() if value not in (None, False, "main")]
    if given:
        flag = given[0].replace("_", "-").replace("licence", "license")
        raise SpecError(f"--{flag} goes with --push")
    return False


def run_push(
    request: Request, out: Path, to: PublishOptions, options: RunOptions, output: Output
) -> None:
    """Plan, and unless it is a dry run, merge to the Hub."""
    from expo.compute.stream import Tuning
    from expo.planning.build import build_plan
    from expo.publishing.receipt import check_receipt_path
    from expo.verbs.push import push_plan

    options.check_alone("--push", "which sends shards as one process finishes them")
    where = _publication(out, to, options)
    if to.receipt is not None:
        check_receipt_path(to.receipt)
    plan = build_plan(request)
    if options.dry_run:
        _show_plan(plan, where, options, output)
        return
    tuning = Tuning.on(options.device, options.threads)
    remark([plan], output)
    RESUMABLE.append(where.place)
    with (
        output.progress(where.target.repo_id) as progress,
        output.progress("verifying", unit=STEPS) as checking,
    ):
        result = push_plan(
            plan,
            where,
            hash_inputs=options.hash_inputs,
            tuning=tuning,
            progress=progress,
            checking=checking,
            say=output.say,
        )
    RESUMABLE.remove(where.place)
    _report(result, plan, to.receipt, output)


def _publication(out: Path, to: PublishOptions, options: RunOptions) -> "Publication":
    from expo.publishing.repository import parse_target
    from expo.verbs.push import Publication

    if options.overwrite:
        raise SpecError("--overwrite: not with --push, whose commit replaces weights on the branch")
    if not options.verify:
        raise SpecError("--no-verify: not with --push, which commits only what verifies")
    name = str(out).removeprefix(_SCHEME)
    target = parse_target(name, revision=to.revision, create_pr=to.create_pr)
    return Publication(target, to.public, to.licence, to.name_ok)


def _show_plan(plan: "Plan", where: "Publication", options: RunOptions, output: Output) -> None:
    from expo.verbs.push import plan_push

    shown = plan_push(plan, where, threads=options.threads)
    output.result(shown, lambda: _plan_text(shown))
    if not shown.merge.ok:
        raise click.exceptions.Exit(1)


def _plan_text(shown: "PushPlan") -> str:
    from expo.cli.plan_text import plan_text
    from expo.cli.publish_text import publish_plan_text

    room = f"{shown.staging}: {gigabytes(shown.staging_bytes)} of weights at most"
    works = f"{'works in':<10} {room}, removed after the commit"
    return "\n".join([plan_text(shown.merge), works, publish_plan_text(shown.publish)])


def _report(result: "PushResult", plan: "Plan", receipt: Path | None, output: Output) -> None:
    from expo.cli.publish import write_receipt
    from expo.cli.publish_text import publish_text

    output.say(publish_text(result.receipt))
    if result.unchecked:
        names = ", ".join(result.unchecked)
        output.say(
            f"not checked, for they read the weights: {names}; expo verify of a download does"
        )
    warn([result.merge], [plan], output)
    report(result.merge, plan, result.merge.out, output, result)
    write_receipt(result.receipt, receipt)
