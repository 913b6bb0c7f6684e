"""Reward and length against α, with their bands, the cliff and the choice."""

from typing import TYPE_CHECKING

from expo.plots.heatmap import caption
from expo.spec.request import paper_alpha

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    places = [one.at.get(name, n) for n, one in enumerate(points, start=1)]
    joins = len(result.baseline) == 1  # several numbers have no order
    _draw_reward(upper, places, points, reward, joins=joins)
    _draw_length(lower, places, points, joins=joins)
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
    axes: "Axes", places: list[float], points: "list[SweepPoint]", reward: str, *, joins: bool
) -> None:
    for n, (at, some, is_few) in enumerate(_alike(places, points)):
        means = [p.reward.mean for p in some]
        low, high = [p.reward.low for p in some], [p.reward.high for p in some]
        style = {"color": _BLUE, "mfc": "white" if is_few else _BLUE, "ms": 4}
        label = "fewer prompts" if is_few and n == 1 else None
        axes.plot(at, means, _line("o", joins, is_few), **style, label=label)
        band = "" if n else "95 % interval"
        if joins and len(at) > 1:
            axes.fill_between(at, low, high, color=_BLUE, alpha=0.15, label=band, lw=0)
        else:
            axes.vlines(at, low, high, color=_BLUE, alpha=0.3, label=band, lw=2)
    axes.set_ylabel(f"reward ({caption(reward)})" if len(reward) < 34 else "reward")


def _draw_length(
    axes: "Axes", places: list[float], points: "list[SweepPoint]", *, joins: bool
) -> None:
    for at, some, is_few in _alike(places, points):
        style = {"color": _GREY, "mfc": "white" if is_few else _GREY, "ms": 3}
        axes.plot(at, [p.length for p in some], _line("s", joins, is_few), **style)
    axes.set_ylabel("length, tokens")
    axes.set_ylim(0, 1.2 * max(p.length for p in points) + 0.1)


def _alike(
    places: list[float], points: "list[SweepPoint]"
) -> "Iterator[tuple[list[float], list[SweepPoint], bool]]":
    """Places and points of those tried on the same prompts, the most prompts first, and whether they are fewer:
    means over other prompts are not to be joined by a line."""
    counts = sorted({p.prompts for p in points}, reverse=True)
    for count in counts:
        some = [(x, p) for x, p in zip(places, points, strict=True) if p.prompts == count]
        yield [x for x, _ in some], [p for _, p in some], count < counts[0]


def _line(marker: str, joins: bool, is_few: bool) -> str:
    return marker + ("" if not joins else ":" if is_few else "-")


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
    if len(result.baseline) > 1 and beyond:  # they are all over the place
        foot = axes.get_xaxis_transform()
        label = "beyond the cliff"
        axes.plot(beyond, [0.02] * len(beyond), "x", color=_RED, ms=4, transform=foot, label=label)
        return
    for n, place in enumerate(beyond):
        axes.axvline(place, color=_RED, lw=1, ls="--", label=None if n else "beyond the cliff")
