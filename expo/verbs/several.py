"""One merge at several α: the plan of each, and where its output goes."""

from collections.abc import Sequence
from pathlib import Path

from expo.checkpoint.sidecars import ONE_FILE, is_one_file
from expo.errors import SpecError
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.spec.request import Request, resolve_alphas


def plans_at(
    request: Request, alphas: Sequence[float], out: Path, *, interpolate: bool = False
) -> tuple[list[Plan], list[Path]]:
    """The plan of every α, rising, and the place of its output beside `out`. The models are opened once.

    Args:
        alphas: in place of what the request says itself, for every model and tensor that is not left alone.

    Raises:
        SpecError: there is none, the method is not ExPO, or as `resolve_alpha`; others as `build_plan`.
    """
    if not alphas:
        raise SpecError("alphas: none is given, like 1.2,1.3,1.5")
    if request.method != "expo":
        raise SpecError(f"{request.method} has no alpha: several alphas go with merge_method: expo")
    values = sorted(set(resolve_alphas(alphas, interpolate=interpolate)))
    plan = build_plan(request.at(values[0]))
    return [plan.at(value) for value in values], [place_at(out, value) for value in values]


def place_at(out: Path, alpha: float) -> Path:
    """`OUT-alpha-1.2`, beside OUT; of `OUT.safetensors` `OUT-alpha-1.2.safetensors`."""
    named = out if out.name not in ("", "..") else out.resolve()
    end = ONE_FILE if is_one_file(out) else ""
    name = f"{named.name.removesuffix(end)}-alpha-{alpha!r}".removesuffix(".0")
    return named.with_name(name + end)
