"""Reward against α: the curve that ExPO is about."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reward_curve(points: Sequence[tuple[float, float]]) -> "Figure":
    """(α, reward) as a line, with SFT, the aligned model and the best marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    alphas, rewards = zip(*points, strict=True)
    axes.plot(alphas, rewards, "o-", color="tab:blue", markersize=4)
    best = max(points, key=lambda point: point[1])
    known = dict(points)
    for alpha, label in ((0.0, "SFT"), (1.0, "aligned"), (best[0], f"best, α = {best[0]:g}")):
        if alpha in known:
            axes.annotate(
                label,
                (alpha, known[alpha]),
                xytext=(8, -13),
                textcoords="offset points",
                fontsize=9,
            )
            axes.plot([alpha], [known[alpha]], "o", color="tab:red", markersize=6)
    axes.set_xlabel("α  (0 = SFT, 1 = aligned; the paper's α is one less)")
    axes.set_ylabel("mean probability of the preferred answer")
    axes.set_ylim(0, 1.15 * max(rewards))
    axes.set_title("Reward against α on the demo pair")
    axes.grid(alpha=0.3)
    return figure
