"""`expo plan`: what a merge would do, from headers alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from expo.errors import OutputError, SpecError
from expo.output.claim import check_out, leftovers
from expo.planning.build import build_plan
from expo.planning.one_file import placed
from expo.planning.plan import Plan
from expo.planning.preview import planned
from expo.planning.report import report
from expo.results import PlanReport
from expo.spec.read import Spec, read_request
from expo.spec.request import Request, make_request
from expo.spec.stages import Stage, read_stages
from expo.threads import DEFAULT_THREADS


def plan(
    spec: Spec,
    aligned: str | PathLike[str] | None = None,
    *,
    alpha: float | None = None,
    paper_alpha: float | None = None,
    interpolate: bool = False,
    stream_inputs: bool = False,
    force: bool = False,
) -> PlanReport:
    """What a merge would do, from headers alone; `refusals` says why it would not run.

    Args:
        spec: a YAML file, a recipe's name, a mapping of the same form; or the SFT model, if `aligned` is given.
            Of a file of several documents the last one's plan is returned, with those before it in `earlier`.
        aligned: the aligned model.
        alpha, paper_alpha, interpolate: as in `extrapolate`, of the two models; a plan needs none.
        stream_inputs: as `merge` would read weights on the Hub by range, without a download.
        force: as `merge` would go on where a gate refuses.

    Raises:
        SpecError, CheckpointError, HubError: an input cannot be used at all.
    """

    def final(request: Request) -> Request:
        request = replace(request, stream_inputs=stream_inputs)
        return request.forced() if force else request

    if aligned is not None:
        if not isinstance(spec, str | PathLike):
            raise SpecError("give a spec alone, or two models")
        chosen = {"alpha": alpha, "paper_alpha": paper_alpha, "interpolate": interpolate}
        return report(build_plan(final(make_request(str(spec), str(aligned), **chosen))))
    if alpha is not None or paper_alpha is not None:
        raise SpecError("alpha belongs into the spec here; alpha= goes with two models")
    if not isinstance(spec, str | PathLike):
        return report(build_plan(final(read_request(spec))))
    *earlier, last = plan_stages(read_stages(Path(spec)), final)
    return replace(last, earlier=tuple(earlier))


def plan_stages(
    stages: Sequence[Stage],
    change: Callable[[Request], Request] = lambda request: request,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    threads: int = DEFAULT_THREADS,
) -> list[PlanReport]:
    """The plan of every document, up to the first that would be refused. Raises as `plan`.

    Args:
        change: what flags make of a request.
        out: where the last one's output is to go.
    """
    reports: list[PlanReport] = []
    with planned(stages, change) as (folder, plans):
        for stage, one in zip(stages, plans, strict=False):
            place = out if stage is stages[-1] else None
            shown = plan_report(one, place, overwrite=overwrite, threads=threads)
            reports.append(_named(folder, shown))
    return reports


def plan_report(
    built: Plan,
    out: Path | None,
    *,
    overwrite: bool = False,
    threads: int = DEFAULT_THREADS,
    outputs: int = 1,
) -> PlanReport:
    """What a plan says, and whether it could be written to `out`, as one of `outputs` of its size."""
    refusals: tuple[str, ...] = ()
    if out is not None:
        built = placed(built, out.resolve())
        try:
            check_out(out, built.request, overwrite=overwrite)
        except OutputError as error:
            refusals = (str(error),)
    shown = report(built, out=out, threads=threads, refusals=refusals, outputs=outputs)
    left = () if out is None else tuple(leftovers(out))
    return replace(shown, notes=(*shown.notes, *left))


def _named(folder: Path, shown: PlanReport) -> PlanReport:
    """The report with the names of earlier documents where it has the places of their previews."""
    sources = {
        role: replace(source, model=Path(source.model).name, kind="of an earlier document")
        if Path(source.model).parent == folder
        else source
        for role, source in shown.sources.items()
    }
    pair = {role: sources[role] for role in ("sft", "aligned") if role in sources}
    return replace(shown, sources=sources, **pair)
