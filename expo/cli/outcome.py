"""What came out of a merge, in words that hold: what was asked, what was left of it, and why."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expo.cli.output import number, percent
from expo.spec.request import both_conventions

if TYPE_CHECKING:
    from expo.output.manifest import Manifest
    from expo.results import EditReport, MergeResult, Statistics

_CUT = 1e-4  # of α: the sums of many blocks have less dust


def outcome(result: "MergeResult | Manifest") -> str:
    """What is known of a finished merge, in one line."""
    if result.engine == "mergekit":
        return "merged by mergekit's engine, which says nothing about what came out"
    if result.method != "expo":
        return _merged(result)
    total, other = result.statistics, result.alternative
    first = f"asked {asked(result)}"
    if nothing := without_effect(total):
        return f"{first}; {nothing}"
    parts = [
        first,
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


def without_effect(total: "Statistics") -> str | None:
    """Why α changed nothing, None where it did."""
    if not total.elements:
        return "nothing was extrapolated: every tensor is a copy of the aligned model's"
    if total.effective_alpha is None:
        return "SFT and aligned do not differ, so alpha changed nothing"
    return None


def asked(result: "MergeResult | Manifest") -> str:
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


def _merged(result: "MergeResult | Manifest") -> str:
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
