"""`expo demo`: plan, extrapolate at several α from one read of the inputs, measure the reward of each, plot it."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from expo.checkpoint.headers import printable
from expo.demo.toy import MODELS, reward
from expo.errors import OutputError
from expo.output.claim import staging_path
from expo.planning.build import build_plan
from expo.planning.findings import listing
from expo.results import DemoPoint, DemoResult
from expo.spec.request import make_request, paper_alpha
from expo.verbs.running import run_plans
from expo.verbs.verify import verify

_PLOT = "reward.png"
ALPHAS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


def run_demo(out: Path, *, say: Callable[[str], None]) -> DemoResult:
    """Write one model for every α below `out`, and the plot beside them.

    Raises:
        OutputError: `out` cannot be written.
    """
    _check_place(out)
    plan = build_plan(make_request(str(MODELS / "sft"), str(MODELS / "aligned")))
    say(
        f"plan: {sum(1 for _ in plan.jobs)} tensors, {plan.read_bytes / 1e6:.2f} MB in, "
        f"{plan.write_bytes / 1e6:.2f} MB out for every alpha"
    )
    folders = [out / name for name in _names()]
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


def _names() -> list[str]:
    return [f"alpha-{alpha:g}" for alpha in ALPHAS]


def _check_place(out: Path) -> None:
    """Refuse a directory that holds something else than an earlier demo."""
    held = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    ours = {*_names(), *(staging_path(Path(name), inside=False).name for name in _names())}
    if ours.intersection(held):
        ours.add(_PLOT)
    if strange := [name for name in held if name not in ours]:
        raise OutputError(
            f"{out} holds what no demo has made: {listing(map(printable, strange))}; name another "
            "directory with --out"
        )


def _plot(points: list[DemoPoint], out: Path) -> Path | None:
    if find_spec("matplotlib") is None:
        return None
    from expo.plots.heatmap import save
    from expo.plots.reward import reward_curve

    path = out / _PLOT
    save(reward_curve([(point.alpha, point.reward) for point in points]), path)
    return path
