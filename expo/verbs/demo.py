"""Plan, extrapolate at several α, measure the reward of each, plot it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from expo.api import make_request, verify
from expo.demo.toy import MODELS, reward
from expo.planning.build import build_plan
from expo.spec.request import paper_alpha
from expo.verbs.merge import run_plan

ALPHAS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True)
class DemoPoint:
    """One model of the demo. `reward` is the mean probability of the preferred answer."""

    alpha: float
    paper_alpha: float
    effective_alpha: float | None
    reward: float


@dataclass(frozen=True)
class DemoResult:
    out: Path
    points: tuple[DemoPoint, ...]
    plot: Path | None

    @property
    def best(self) -> DemoPoint:
        return max(self.points, key=lambda point: point.reward)


def run_demo(out: Path, *, say: Callable[[str], None]) -> DemoResult:
    """Write one model for every α below `out`, and the plot beside them.

    Raises:
        OutputError: `out` cannot be written.
    """
    sft, aligned = MODELS / "sft", MODELS / "aligned"
    plan = build_plan(make_request(str(sft), str(aligned)))
    say(
        f"plan: {sum(1 for _ in plan.jobs)} tensors, {plan.read_bytes / 1e6:.2f} MB in, "
        f"{plan.write_bytes / 1e6:.2f} MB out for every alpha"
    )
    points = []
    for alpha in ALPHAS:
        folder = out / f"alpha-{alpha:g}"
        request = make_request(str(sft), str(aligned), alpha=alpha)
        result = run_plan(build_plan(request), folder, overwrite=True)
        points.append(
            DemoPoint(alpha, paper_alpha(alpha), result.statistics.effective_alpha, reward(folder))
        )
        say(f"alpha {alpha:g}: reward {points[-1].reward:.3f}")
    result = DemoResult(out, tuple(points), _plot(points, out))
    best = out / f"alpha-{result.best.alpha:g}"
    found = verify(best, against=aligned)
    say(f"{best.name}: {'verified' if found.ok else 'does not verify: run expo verify on it'}")
    return result


def _plot(points: list[DemoPoint], out: Path) -> Path | None:
    if find_spec("matplotlib") is None:
        return None
    from expo.plots.heatmap import save
    from expo.plots.reward import reward_curve

    path = out / "reward.png"
    save(reward_curve([(point.alpha, point.reward) for point in points]), path)
    return path
