"""Reward and length against α, with their bands, the cliff and the choice."""

from typing import TYPE_CHECKING

from expo.plots.heatmap import caption
from expo.spec.request import paper_alpha

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from expo.results import SweepPoint, SweepResult

_BLUE, _GREY, _RED, _GREEN = "#1b4965", "#8a8a8a", "#c1121f", "#2a7f3f"


def sweep_figure(result: "SweepResult", reward: str) -> "Figure":
    """The mean reward of every point with its 95 % interval, above the length of its answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
    (name,) = result.baseline if len(result.baseline) == 1 else ("number of the candidate",)
    points = list(result.points)
    places = [one.at.get(name, n) for n, one in enumerate(points)]
    _draw_reward(upper, places, points, reward)
    _draw_length(lower, places, points)
    for axes in (upper, lower):
        _mark(axes, places, points, result)
        axes.grid(alpha=0.25)
        axes.margins(x=0.03)
    upper.legend(fontsize=8, loc="best")
    if name == "alpha":
        lower.set_xlabel("α  (0 = SFT, 1 = aligned)")
        above = upper.secondary_xaxis("top", functions=(lambda a: a - 1.0, lambda a: a + 1.0))
        above.set_xlabel("the paper's α = α − 1", fontsize=9)
    else:
        lower.set_xlabel(name)
        if len(result.baseline) > 1:
            lower.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_reward(
    axes: "Axes", places: list[float], points: "list[SweepPoint]", reward: str
) -> None:
    means, most = [p.reward.mean for p in points], max(p.prompts for p in points)
    axes.plot(places, means, "o-", color=_BLUE, markersize=4)
    few = [(x, y) for x, y, p in zip(places, means, points, strict=True) if p.prompts < most]
    if few:  # their means are of other prompts: the differences in the table are not
        axes.plot(
            *zip(*few, strict=True), "o", color=_BLUE, mfc="white", ms=4, label="fewer prompts"
        )
    low, high = [p.reward.low for p in points], [p.reward.high for p in points]
    axes.fill_between(places, low, high, color=_BLUE, alpha=0.15, label="95 % interval", lw=0)
    axes.set_ylabel(f"reward ({caption(reward)})" if len(reward) < 34 else "reward")


def _draw_length(axes: "Axes", places: list[float], points: "list[SweepPoint]") -> None:
    axes.plot(places, [p.length for p in points], "s-", color=_GREY, markersize=3)
    axes.set_ylabel("length, tokens")
    axes.set_ylim(0, 1.2 * max(p.length for p in points) + 0.1)


def _mark(
    axes: "Axes", places: list[float], points: "list[SweepPoint]", result: "SweepResult"
) -> None:
    """Lines at the baseline and the choice, and shade where the cliff begins."""
    verdict = result.verdict
    baseline = "aligned" if "alpha" in result.baseline else "the spec as it is"
    at = {tuple(p.at.items()): place for place, p in zip(places, points, strict=True)}
    axes.axvline(at[tuple(result.baseline.items())], color=_GREY, lw=1, ls=":", label=baseline)
    if verdict.beats:
        chosen = verdict.at.get("alpha")
        label = "chosen" if chosen is None else f"chosen, α = {chosen:g} ({paper_alpha(chosen):g})"
        axes.axvline(at[tuple(verdict.at.items())], color=_GREEN, lw=1.4, label=label)
    beyond = [place for place, p in zip(places, points, strict=True) if p.beyond_cliff]
    for n, place in enumerate(beyond):
        axes.axvline(place, color=_RED, lw=1, ls="--", label=None if n else "beyond the cliff")
