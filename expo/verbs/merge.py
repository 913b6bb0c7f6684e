"""`expo extrapolate` and `expo merge`: run plans, each into its own OUT, verified before it appears."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, overload

from expo.compute.stream import Progress, Tuning
from expo.errors import SpecError
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.results import MergeResult
from expo.spec.request import Request, Rounding, make_request
from expo.verbs.join import join_plans
from expo.verbs.running import run_plans
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
