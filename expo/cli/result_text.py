"""What came of a merge as a person reads it: three lines, and every figure for who asks."""

from typing import TYPE_CHECKING

from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.sidecars import MANIFEST, is_one_file, manifest_path
from expo.cli.outcome import asked, edits_text, without_effect
from expo.cli.output import facts, number, percent, table
from expo.cli.verify_text import NOT_VERIFIED, VERIFIED
from expo.planning.findings import gigabytes
from expo.spec.request import Request

if TYPE_CHECKING:
    from expo.planning.plan import Plan
    from expo.results import EditReport, MergeResult, Statistics, WorkerResult

_FINE = 0.05
"""How much of the step beyond the aligned model rounding may take or add before it is worth a word."""


def result_text(result: "MergeResult", plan: "Plan", out: str) -> str:
    """What was asked, what came out and whether that is fine, where it is."""
    lines = {
        "asked": _asked(result, plan),
        "got": _got(result, plan.request),
        "out": _place(result, out),
    }
    return facts(lines.items(), width=6)


def worker_text(result: "WorkerResult") -> str:
    """Of one worker among several, what it leaves to others."""
    first, *more = result.outs
    what = f"{first} and {len(more)} more" if more else str(first)
    missing = f"{result.missing} of {result.shards} shards"
    return (
        f"worker {result.worker}: its part of {what} is done; {missing} are still to come from others, and the last of "
        "them places it"
    )


def _asked(result: "MergeResult", plan: "Plan") -> str:
    request, method = plan.request, result.method
    if method == "passthrough" and result.edits:
        method = f"matrices cut to {', '.join(dict.fromkeys(e.keep for e in result.edits))}"
    if method == "expo":
        method = f"ExPO, {asked(result)}"
    if request.foreign is not None:
        return f"{method}, by mergekit's engine"
    rounding = "to nearest" if request.rounding == "nearest" else "at random"
    dtypes = sorted({TORCH_NAMES[job.dtype] for job in plan.jobs if job.dtype in FLOATS})
    return f"{method}, {' and '.join(dtypes)}, rounded {rounding}"


def _got(result: "MergeResult", request: Request) -> str:
    if request.foreign is not None:
        return "what mergekit made, which is not measured"
    total = result.statistics
    cut = [_cut(result.edits)] if result.edits else []
    if result.method == "expo":
        kept = cut if total.elements else []
        return "; ".join([*kept, without_effect(total) or _effective(total, result)])
    if cut and result.method == "passthrough":
        return cut[0]
    if total.effective_alpha is None or result.method == "passthrough":
        return "; ".join([*cut, "no tensor is other than it was"])
    return "; ".join([*cut, f"{percent(total.effective_alpha)} of the change, after rounding"])


def _cut(edits: "tuple[EditReport, ...]") -> str:
    removed = sorted(edit.removed_energy for edit in edits)
    cut = sum(energy > 0 for energy in removed)
    return (
        f"{cut} of {len(edits)} matrices cut: {percent(removed[len(removed) // 2])} of the energy is gone "
        "from the median one"
    )


def _effective(total: "Statistics", result: "MergeResult") -> str:
    """Effective α, as asked, or what rounding made of the step beyond the aligned model and the cure."""
    wanted, came = total.alpha, total.effective_alpha
    if wanted is None or came is None:
        return "effective alpha unknown"
    origin, since = (1.0, "beyond the aligned model") if wanted > 1 else (0.0, "from the SFT model")
    if abs(came - wanted) <= _FINE * abs(wanted - origin):
        return f"effective alpha {came:.4g}, as asked"
    text = f"effective alpha {came:.4g}: rounding kept {100 * (came - origin) / (wanted - origin):.0f} % of the step {since}"
    other = result.alternative
    if other is not None and other.rounding == "stochastic" and other.effective_alpha is not None:
        return f"{text}; --rounding stochastic would give about {other.effective_alpha:.4g}"
    return f"{text}; --dtype float32 would keep all of it"


def _place(result: "MergeResult", out: str) -> str:
    """Where it is, whether it verifies, how large it is, and where the figures are."""
    count = {s: sum(c.status == s for c in result.checks) for s in ("error", "warning")}
    found = ", ".join(f"{n} {s}{'s' if n > 1 else ''}" for s, n in count.items() if n)
    verdict = {True: VERIFIED, False: NOT_VERIFIED, None: "not verified"}[result.verified]
    state = f"{verdict}, {found}" if found else verdict
    size = gigabytes(result.written_bytes)
    manifest = manifest_path(result.out).name if is_one_file(result.out) else f"its {MANIFEST}"
    return f"{out}: {state}, {size}; every figure with -v, and in {manifest}"


def details(result: "MergeResult") -> str:
    """Every figure of a run, in total and by module."""
    total, other = result.statistics, result.alternative
    if not total.elements:
        return "no figures: nothing was computed from a change"
    lines = [edits_text(result.edits)] if result.edits else []
    lines += [
        f"rounding noise {number(total.rounding_noise, '.2g')} of the increment; "
        f"{percent(total.zero_share)} of the deltas are 0; "
        f"{percent(total.unmoved_share)} of the weights did not move",
    ]
    if other is not None:
        lines.append(
            f"{other.rounding} rounding would give about {number(other.effective_alpha)} "
            f"(noise {number(other.rounding_noise, '.2g')}), float32 exactly {number(total.alpha)}"
        )
    header = ("module", "asked", "effective", "noise", "‖Δ‖", "relative", "zero", "unmoved")
    rows = [(name, *_row(module)) for name, module in result.modules.items()]
    return "\n".join([*lines, "", table(header, rows)])


def _row(module: "Statistics") -> tuple[str, ...]:
    return (
        number(module.alpha),
        number(module.effective_alpha),
        number(module.rounding_noise, ".2g"),
        number(module.delta_norm, ".3g"),
        number(module.relative_delta, ".2e"),
        percent(module.zero_share),
        percent(module.unmoved_share),
    )
