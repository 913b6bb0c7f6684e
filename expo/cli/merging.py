"""What `extrapolate`, `merge` and `plan` share: plan, show it or run it, report."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli.options import RunOptions
from expo.cli.output import Output, gigabytes, number, percent, to_json
from expo.cli.verify import FOUND_AN_ERROR
from expo.cli.verify_text import findings
from expo.results import VerifyResult
from expo.spec.request import Request, both_conventions

if TYPE_CHECKING:
    from expo.planning.plan import Plan
    from expo.results import EditReport, MergeResult, PlanReport
    from expo.spec.stages import Stage

_NOTES = 8  # shown before a run
_CUT = 1e-4  # of α: the sums of many blocks have less dust

RESUMABLE: list[Path] = []
"""The outputs that this process has begun to write, for the message on an interruption."""


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
        _remark(plan, output)
    RESUMABLE.append(out)
    with output.progress(out.name) as progress:
        result = run_plan(
            plan,
            out,
            overwrite=options.overwrite,
            hash_inputs=options.hash_inputs,
            verify=options.verify,
            tuning=Tuning(threads=options.threads),
            progress=progress,
            say=output.say,
        )
    for warning in result.warnings:
        if warning not in plan.warnings:  # what only the tensors could tell
            output.say(f"warning: {warning}")
    _report(result, output)
    if result.verified is False:
        raise click.exceptions.Exit(FOUND_AN_ERROR)


def _remark(plan: "Plan", output: Output) -> None:
    """Every warning, and what is copied and dropped, as far as it fits a screen."""
    for warning in plan.warnings:
        output.say(f"warning: {warning}")
    for note in plan.notes[:_NOTES]:
        output.say(f"note: {note}")
    if len(plan.notes) > _NOTES:
        output.say(f"note: {len(plan.notes) - _NOTES} more are in expo.json, and in expo plan")


def _report(result: "MergeResult", output: Output) -> None:
    """The result on stdout, and on stderr how fast it came and what the verification found."""
    if output.json:
        output.result(result, lambda: "")
        return
    rate = result.written_bytes / max(result.seconds, 1e-9) / 1e9
    output.say(
        f"{result.out}: {gigabytes(result.written_bytes)} in {result.seconds:.1f} s ({rate:.2f} GB/s)"
    )
    if result.verified is not None:
        found = VerifyResult(result.verified, result.checks)
        output.say(findings(found, str(result.out)))
    if result.edits and result.method != "passthrough":
        output.say(edits_text(result.edits))
    output.data(outcome(result))


def edits_text(edits: "tuple[EditReport, ...]") -> str:
    """One line about the matrices that were cut."""
    ranks = sorted(edit.rank for edit in edits)
    removed = sorted(edit.removed_energy for edit in edits)
    fits = sorted(edit.bulk_fit for edit in edits if edit.bulk_fit is not None)
    cut = sum(edit.removed_energy > 0 for edit in edits)
    text = (
        f"cut {cut} of {len(edits)} matrices: rank {_spread(ranks, 'd')} of up to "
        f"{max(edit.full_rank for edit in edits)}, {_spread([100 * r for r in removed], '.3g')} % of "
        "the energy removed"
    )
    if fits:
        text += f"; the bulk is {_spread(fits, '.2g')} from pure noise (0 to 1)"
    return text


def _spread(ordered: Sequence[float], form: str) -> str:
    low, middle, high = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
    if low == high:
        return f"{low:{form}}"
    return f"{low:{form}} to {high:{form}} (median {middle:{form}})"


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
    from expo.planning.preview import planned
    from expo.verbs.plan import plan_report

    reports: list[PlanReport] = []
    with planned(stages, change) as (folder, plans):
        for number, plan in enumerate(plans, 1):
            place = out if number == len(stages) else None
            shown = plan_report(plan, place, overwrite=options.overwrite, threads=options.threads)
            reports.append(_without(folder, shown))
    if output.json:
        output.data(to_json(reports))
    for number, (stage, shown) in enumerate(zip(stages, reports, strict=False), 1):
        if not output.json:
            name = "OUT" if number == len(stages) else stage.name
            output.data(f"document {number} of {len(stages)}: {name}\n{plan_text(shown)}\n")
    if not all(shown.ok for shown in reports):
        raise click.exceptions.Exit(1)


def _without(folder: Path, shown: "PlanReport") -> "PlanReport":
    """The report with the names of earlier documents where it has the places of their previews."""
    sources = {
        role: replace(source, model=Path(source.model).name, kind="of an earlier document")
        if Path(source.model).parent == folder
        else source
        for role, source in shown.sources.items()
    }
    pair = {role: sources[role] for role in ("sft", "aligned") if role in sources}
    return replace(shown, sources=sources, **pair)


def outcome(result: "MergeResult") -> str:
    """The one line that a run ends with."""
    if result.engine == "mergekit":
        return "merged by mergekit's engine, which says nothing about what came out"
    if result.method != "expo":
        return _merged(result)
    total, other = result.statistics, result.alternative
    asked = f"asked {_asked(result)}"
    if not total.elements:
        return f"{asked}; nothing was extrapolated: every tensor is a copy of the aligned model's"
    if total.effective_alpha is None:
        return f"{asked}; SFT and aligned do not differ, so alpha changed nothing"
    parts = [
        asked,
        f"effective alpha {number(total.effective_alpha)}",
        f"rounding noise {number(total.rounding_noise, '.2g')} of the increment",
        f"{percent(total.zero_share)} of the deltas are 0",
        f"{percent(total.unmoved_share)} of the weights did not move",
    ]
    if other is not None:
        parts.append(
            f"{other.rounding} rounding would give about {number(other.effective_alpha)} "
            f"(noise {number(other.rounding_noise, '.2g')}), float32 exactly {number(total.alpha)}"
        )
    return "; ".join(parts)


def _asked(result: "MergeResult") -> str:
    """α as it was asked for, and what is left of it where a part of Δ was cut before."""
    low, high = result.alpha_range or (result.alpha, result.alpha)
    exact = result.statistics.alpha
    if low is None or high is None:
        return both_conventions(None)
    if low != high:
        average = "" if exact is None else f", on average {number(exact)}"
        return f"{both_conventions(low)} to {both_conventions(high)}{average}"
    is_cut = exact is not None and abs(exact - low) > _CUT
    return both_conventions(low) + (f", {number(exact)} after the cut" if is_cut else "")


def _merged(result: "MergeResult") -> str:
    """The line of a method of mergekit's that ran through expo's engine."""
    total = result.statistics
    if result.method == "passthrough" and result.edits:
        return edits_text(result.edits)
    if total.effective_alpha is None:
        why = "" if result.method == "passthrough" else ": the models are equal, or weigh 0"
        return f"{result.method}: nothing was changed{why}"
    return (
        f"{result.method}: {percent(total.effective_alpha)} of the intended change survived rounding; "
        f"rounding noise {number(total.rounding_noise, '.2g')} of it; {percent(total.unmoved_share)} of "
        "the weights did not move"
    )
