"""`expo plan`: what a merge would do, from headers and a sample of what is quantized."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from expo.errors import OutputError, SpecError
from expo.output.claim import check_out, leftovers
from expo.planning.build import build_plan
from expo.planning.chunks import CHUNK_BYTES
from expo.planning.one_file import placed
from expo.planning.plan import Plan
from expo.planning.preview import planned
from expo.planning.report import report
from expo.results import PlanReport
from expo.spec.read import Spec, read_request
from expo.spec.request import Request, make_request
from expo.spec.stages import Stage, read_stages
from expo.threads import DEFAULT_THREADS

if TYPE_CHECKING:
    from expo.compute.stream import Tuning


def plan(
    spec: Spec,
    aligned: str | PathLike[str] | None = None,
    *,
    alpha: float | None = None,
    paper_alpha: float | None = None,
    interpolate: bool = False,
    stream_inputs: bool = False,
    device: str | None = None,
    force: bool = False,
) -> PlanReport:
    """What a merge would do, from headers alone; `refusals` says why it would not run. Of quantized inputs a sample is
    read too, which tells how much of the change is noise, and with `device` one of all.

    Args:
        spec: a YAML file, a recipe's name, a mapping of the same form; or the SFT model, if `aligned` is given.
            Of a file of several documents the last one's plan is returned, with those before it in `earlier`.
        aligned: the aligned model.
        alpha, paper_alpha, interpolate: as in `extrapolate`, of the two models; a plan needs none.
        stream_inputs: as `merge` would read weights on the Hub by range, without a download.
        device: "cpu", "cuda" or "cuda:1": also find what bounds the run there (`bound`), which takes about a second and
            reads a sample of the weights.
        force: as `merge` would go on where a gate refuses.

    Raises:
        SpecError, CheckpointError, HubError: an input cannot be used at all.
        ExpoError: the device is not there.
    """

    def final(request: Request) -> Request:
        request = replace(request, stream_inputs=stream_inputs)
        return request.forced() if force else request

    if aligned is not None:
        if not isinstance(spec, str | PathLike):
            raise SpecError("give a spec alone, or two models")
        chosen = {"alpha": alpha, "paper_alpha": paper_alpha, "interpolate": interpolate}
        return _one(final(make_request(str(spec), str(aligned), **chosen)), device)
    if alpha is not None or paper_alpha is not None:
        raise SpecError("alpha belongs into the spec here; alpha= goes with two models")
    if not isinstance(spec, str | PathLike):
        return _one(final(read_request(spec)), device)
    stages = read_stages(Path(spec))
    if device is not None:
        check_measurable(len(stages))
        return _one(final(stages[0].request({})), device)
    *earlier, last = plan_stages(stages, final)
    return replace(last, earlier=tuple(earlier))


def _one(request: Request, device: str | None) -> PlanReport:
    (shown,) = plan_reports([build_plan(request)], [None], device=device)
    return shown


def check_measurable(documents: int) -> None:
    """Raises SpecError: of several documents, whose later ones read what is not there yet."""
    if documents > 1:
        raise SpecError(
            f"--device: the spec has {documents} documents, and what bounds a run is measured of one: make the others "
            "first, and name what they gave in a spec of one document"
        )


def plan_reports(
    plans: Sequence[Plan],
    outs: Sequence[Path | None],
    *,
    overwrite: bool = False,
    threads: int = DEFAULT_THREADS,
    device: str | None = None,
) -> list[PlanReport]:
    """What the plans of one merge say, at one α or several, and whether they could be written to their places.

    Args:
        device: also find what bounds the run there.

    Raises:
        SpecError: mergekit would not hear of the device.
        ExpoError: the device is not there.
    """
    tuning = None if device is None else _tuning(plans[0], device, threads)
    chunk_bytes = CHUNK_BYTES if tuning is None else tuning.chunk_bytes
    shown = [
        plan_report(
            plan,
            out,
            overwrite=overwrite,
            threads=threads,
            chunk_bytes=chunk_bytes,
            outputs=len(plans),
        )
        for plan, out in zip(plans, outs, strict=True)
    ]
    if tuning is None or not all(one.ok for one in shown):
        return shown
    from expo.compute.bounds import measured_bound

    bound = measured_bound(plans, tuning)
    return [replace(one, bound=bound) for one in shown]


def _tuning(plan: Plan, device: str, threads: int) -> "Tuning":
    from expo.compute.stream import Tuning
    from expo.verbs.running import check_engine

    check_engine(plan)
    return Tuning.on(device, threads)


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
    chunk_bytes: int = CHUNK_BYTES,
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
    shown = report(
        built,
        out=out,
        threads=threads,
        chunk_bytes=chunk_bytes,
        refusals=refusals,
        outputs=outputs,
    )
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
