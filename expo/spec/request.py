"""The request: what a merge is asked to compute, from flags or from a spec, defaults filled in."""

import math
from dataclasses import dataclass
from typing import Literal

from expo.checkpoint.reference import Reference
from expo.errors import SpecError

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Request:
    """One ExPO merge. `alpha` is None only where nothing is to be written (`expo plan A B`)."""

    base: Reference
    aligned: Reference
    alpha: float | None
    dtype: str | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    max_shard_bytes: int | None = None
    allow_missing: str | None = None
    include: tuple[str, ...] = ()


def paper_alpha(alpha: float) -> float:
    """The paper's a = α − 1, without the binary dust of the subtraction."""
    return float(f"{alpha - 1.0:.12g}")


def both_conventions(alpha: float) -> str:
    return f"alpha {alpha:.12g} (paper alpha {paper_alpha(alpha):.12g})"


def resolve_alpha(
    alpha: float | None, paper: float | None, *, interpolate: bool = False
) -> float | None:
    """α by the formula θ_sft + α·Δ, from whichever of the two conventions was given.

    Raises:
        SpecError: both are given, one is not finite, or 0 < α < 1 without `interpolate`.
    """
    if alpha is not None and paper is not None:
        raise SpecError("give alpha or paper alpha, not both (alpha = paper alpha + 1)")
    if alpha is None and paper is None:
        return None
    value = float(f"{1.0 + paper:.15g}") if paper is not None else float(alpha or 0.0)
    if not math.isfinite(value):
        raise SpecError(f"alpha must be a finite number, not {value}")
    if 0.0 < value < 1.0 and not interpolate:
        given = value if alpha is not None else paper_alpha(value)
        raise SpecError(_two_readings(given, is_paper=alpha is None))
    return value


def _two_readings(given: float, *, is_paper: bool) -> str:
    if is_paper:
        return (
            f"paper alpha {given:.12g} is alpha {1.0 + given:.12g}: a point between SFT and aligned, "
            "not beyond; add --interpolate (in a spec: interpolate: true) if you mean it"
        )
    return (
        f"alpha {given:.12g} lies between SFT and aligned; cards that say {given:.12g} mean "
        f"--paper-alpha {given:.12g} (= alpha {1.0 + given:.12g}); for the point between, add "
        f"--interpolate (in a spec: paper_alpha: {given:.12g}, or interpolate: true)"
    )
