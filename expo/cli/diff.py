"""`expo diff`: what changed between two checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.checkpoint.shown import visible
from expo.cli import options
from expo.cli.output import Output, number, percent, table

if TYPE_CHECKING:
    from expo.results import DiffResult

_STRUCTURE_DIFFERS = 3


@click.command(
    short_help="Show how far checkpoint B is from checkpoint A, by module.",
    epilog="""\b
Examples:
  expo diff openchat/openchat-3.5-0106 Nexusflow/Starling-LM-7B-beta --plot delta.png
  expo diff ./sft ./aligned --top 30
  expo diff ./sft ./aligned --json > diff.json
""",
)
@click.argument("a")
@click.argument("b")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a heat map (.png or .svg).")
@click.option("--top", type=click.IntRange(1), default=15, show_default=True, help="Rows to print.")
@click.option(
    "--threads", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers."
)
@options.streaming
@options.device
@options.talk
def diff(
    a: str,
    b: str,
    plot: Path | None,
    top: int,
    threads: int,
    stream_inputs: bool,
    device: str,
    output: Output,
) -> None:
    """Show how far checkpoint B is from checkpoint A, per tensor and per module.

    Exits with 3 where the two have other tensors or shapes.
    """
    from expo.verbs.diff import diff as run

    if plot is not None:
        from expo.plots.heatmap import check_plot

        check_plot(plot)
    with output.progress("diff") as progress:
        result = run(
            a, b, threads=threads, stream_inputs=stream_inputs, device=device, progress=progress
        )
    if plot is not None:
        from expo.plots.heatmap import draw_heatmap

        draw_heatmap(result, plot)
        output.wrote(plot, "heat map of the relative change, layer × module")
    output.result(result, lambda: diff_text(result, top))
    if not result.same_structure:
        raise click.exceptions.Exit(_STRUCTURE_DIFFERS)


def diff_text(result: "DiffResult", top: int) -> str:
    """Total, reference points, and the modules that changed most."""
    total = result.total
    ranked = sorted(result.modules, key=lambda m: -(m.statistics.relative_delta or 0.0))
    rows = [
        (
            m.module,
            "–" if m.layer is None else str(m.layer),
            number(m.statistics.delta_norm),
            number(m.statistics.relative_delta, ".2e"),
            number(m.statistics.delta_rms, ".2e"),
            percent(m.statistics.zero_share),
            number(None if m.statistics.cosine is None else 1 - m.statistics.cosine, ".1e"),
        )
        for m in ranked[:top]
    ]
    header = ("module", "layer", "‖Δ‖", "relative", "RMS", "zero", "1 − cos")
    points = ", ".join(
        f"{total.delta_rms / rms:.2g} × {name} ({rms:.0e})"
        for name, rms in result.references.items()
    )
    lines = [
        f"{result.a} → {result.b}: ‖Δ‖ {number(total.delta_norm)}, relative "
        f"{number(total.relative_delta, '.2e')}, RMS {number(total.delta_rms, '.2e')} per element, "
        f"{percent(total.zero_share)} exactly 0",
        *(
            [
                f"for orientation: {points}; ExPO helps at the first distance and is reported to fail at the second"
            ]
            if points
            else []
        ),
        "",
        table(header, rows),
    ]
    if len(ranked) > top:
        lines.append(f"… and {len(ranked) - top} more (--top, --json)")
    for what, names in (
        (f"only in {result.b}", result.missing),
        (f"only in {result.a}", result.extra),
        ("differs in shape or kind", result.mismatched),
    ):
        lines += [visible(f"{what}: {name}") for name in names]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])
