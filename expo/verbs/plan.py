"""`expo plan`: what a merge would do, from headers alone."""

from pathlib import Path

from expo.errors import OutputError
from expo.output.claim import check_out
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.planning.report import report
from expo.results import PlanReport
from expo.spec.read import Spec, read_request
from expo.threads import DEFAULT_THREADS


def plan(spec: Spec) -> PlanReport:
    """What a merge would do, from headers alone; `refusals` says why it would not run.

    Raises:
        SpecError, CheckpointError, HubError: an input cannot be used at all.
    """
    return report(build_plan(read_request(spec)))


def plan_report(
    built: Plan, out: Path | None, *, overwrite: bool = False, threads: int = DEFAULT_THREADS
) -> PlanReport:
    """What a plan says, and whether it could be written to `out`."""
    refusals: tuple[str, ...] = ()
    if out is not None:
        try:
            check_out(out, built.request, overwrite=overwrite)
        except OutputError as error:
            refusals = (str(error),)
    return report(built, out=out, threads=threads, refusals=refusals)
