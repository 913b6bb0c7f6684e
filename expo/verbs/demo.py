"""`expo demo`: plan, extrapolate at several α from one read of the inputs, measure the reward of each, plot it."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from expo.demo.toy import MODELS, reward
from expo.planning.build import build_plan
from expo.results import DemoPoint, DemoResult
from expo.spec.request import make_request, paper_alpha
from expo.verbs.merge import run_plans
from expo.verbs.verify import verify

ALPHAS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


def run_demo(out: Path, *, say: Callable[[str], None]) -> DemoResult:
    """Write one model for every α below `out`, and the plot beside them.

    Raises:
        OutputError: `out` cannot be written.
    """
    plan = build_plan(make_request(str(MODELS / "sft"), str(MODELS / "aligned")))
    say(
        f"plan: {sum(1 for _ in plan.jobs)} tensors, {plan.read_bytes / 1e6:.2f} MB in, "
        f"{plan.write_bytes / 1e6:.2f} MB out for every alpha"
    )
    folders = [out / f"alpha-{alpha:g}" for alpha in ALPHAS]
    merged = run_plans([plan.at(alpha) for alpha in ALPHAS], folders, overwrite=True)
    points = []
    for alpha, folder, result in zip(ALPHAS, folders, merged, strict=True):
        points.append(
            DemoPoint(alpha, paper_alpha(alpha), result.statistics.effective_alpha, reward(folder))
        )
        say(f"alpha {alpha:g}: reward {points[-1].reward:.3f}")
    result = DemoResult(out, tuple(points), _plot(points, out))
    best = out / f"alpha-{result.best.alpha:g}"
    found = verify(best, against=MODELS / "aligned")
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
