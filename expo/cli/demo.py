"""`expo demo`: the main job on a small trained pair, offline."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli import options
from expo.cli.output import Output, number, table

if TYPE_CHECKING:
    from expo.results import DemoResult


@click.command(
    short_help="Try it on an embedded pair of tiny models.",
    epilog="\b\nExample:\n  expo demo --out demo-output\n",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where the models and the plot go; replaced if an earlier demo made it.",
)
@options.talk
def demo(out: Path, output: Output) -> None:
    """Extrapolate an embedded pair of tiny trained models at several α, and plot their reward."""
    from expo.verbs.demo import run_demo

    result = run_demo(out, say=output.say)
    output.wrote(out, f"{len(result.points)} models")
    output.result(result, lambda: demo_text(result))


def demo_text(result: "DemoResult") -> str:
    """The table, and what to run next."""
    best = result.best
    rows = [
        (
            f"{point.alpha:g}",
            f"{point.paper_alpha:g}",
            number(point.effective_alpha),
            f"{point.reward:.3f}" + (" best" if point is best else ""),
            {0.0: "SFT", 1.0: "aligned"}.get(point.alpha, "extrapolated"),
        )
        for point in result.points
    ]
    lines = [
        table(("alpha", "paper alpha", "effective", "reward", "model"), rows),
        "",
        "The reward rises beyond the aligned model, then falls off a cliff. The scale belongs to this",
        "toy: on real models the best alpha is mostly 1.1 to 1.5 (paper alpha 0.1 to 0.5).",
    ]
    if result.plot is not None:
        lines.append(f"plot: {result.plot}")
    lines += [
        "",
        "The same on your own models:",
        "  expo plan SFT ALIGNED",
        "  expo diff SFT ALIGNED --plot delta.png",
        "  expo extrapolate SFT ALIGNED OUT --alpha 1.5",
    ]
    return "\n".join(lines)
