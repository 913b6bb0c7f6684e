"""Reward against α: the curve that ExPO is about."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_BESIDE = {
    side: {"xytext": (shift, 7), "textcoords": "offset points", "ha": side}
    for side, shift in (("center", 0), ("right", -5), ("left", 5))
}
"""Where a label is off the curve: above its top, to the left of a rise, to the right of a fall."""


def reward_curve(points: Sequence[tuple[float, float]]) -> "Figure":
    """(α, reward) as a line, with SFT, the aligned model and the best marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    alphas, rewards = zip(*points, strict=True)
    axes.plot(alphas, rewards, "o-", color="tab:blue", markersize=4)
    axes.margins(x=0.14)
    names = {0.0: "SFT", 1.0: "aligned"}
    best = max(range(len(points)), key=lambda n: rewards[n])
    for number, (alpha, reward) in enumerate(points):
        name = names.get(alpha)
        if number == best:
            name = f"{name}, best" if name else f"best, α = {alpha:g}"
        if name is not None:
            rises = number + 1 < len(points) and rewards[number + 1] > reward
            side = "center" if number == best else "right" if rises else "left"
            axes.annotate(name, (alpha, reward), **_BESIDE[side], fontsize=9)
            axes.plot([alpha], [reward], "o", color="tab:red", markersize=6)
    axes.set_xlabel("α  (0 = SFT, 1 = aligned; the paper's α is one less)")
    axes.set_ylabel("mean probability of the preferred answer")
    axes.set_ylim(0, 1.15 * max(rewards))
    axes.set_title("Reward against α on the demo pair")
    axes.grid(alpha=0.3)
    return figure
