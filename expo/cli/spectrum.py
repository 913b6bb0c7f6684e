"""`expo spectrum`: where the signal of every matrix ends and its noise begins."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli import options
from expo.cli.output import Output, number, table
from expo.planning.findings import fell_back

if TYPE_CHECKING:
    from torch import Tensor

    from expo.output.training import By
    from expo.results import MatrixSpectrum

BYS = ("snr_mp", "snr_compat", "effective_rank")


@click.command(
    short_help="Show the singular values of the matrices of MODEL.",
    epilog="""\b
Examples:
  expo spectrum Nexusflow/Starling-LM-7B-beta
  expo spectrum ./aligned --minus ./sft
  expo spectrum ./aligned --minus ./sft --target 'self_attn' --json > spectra.json
  expo spectrum ./aligned --plot spectra.png --train-top 25 --train-dir unfrozen
""",
)
@click.argument("model")
@click.option("--minus", metavar="BASE", help="Look at what changed since this model.")
@click.option("--target", metavar="REGEX", help="Only these tensors. [default: matrices of layers]")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw spectra and a map (.png, .svg)."
)
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Rows to print.")
@click.option(
    "--train-top",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="Write the files that trainers read to train the top of each module type.",
)
@click.option(
    "--by", type=click.Choice(BYS), default="snr_mp", show_default=True, help="What counts as top."
)
@click.option(
    "--train-dir",
    type=click.Path(path_type=Path),
    default="train-top",
    show_default=True,
    help="Where to write them.",
)
@click.option(
    "--threads", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers."
)
@options.streaming
@options.device
@options.talk
def spectrum(
    model: str,
    minus: str | None,
    target: str | None,
    plot: Path | None,
    top: int,
    train_top: float | None,
    by: "By",
    train_dir: Path,
    threads: int,
    stream_inputs: bool,
    device: str,
    output: Output,
) -> None:
    """Singular values of the matrices of MODEL, summed up: noise level, edge, ranks, SNR.

    The noise of a matrix fills its singular values up to the Marchenko–Pastur edge; what is above is
    signal. Rows are sorted by snr_mp = ΣS² above the edge / ΣS² below.
    """
    from expo.verbs.spectrum import spectrum as run

    if plot is not None:
        from expo.plots.heatmap import check_plot

        check_plot(plot)
    values: dict[str, Tensor] | None = None if plot is None else {}
    with output.progress("spectrum", unit="matrices") as progress:
        result = run(
            model,
            minus=minus,
            target=target,
            threads=threads,
            stream_inputs=stream_inputs,
            device=device,
            progress=progress,
            say=output.say,
            values=values,
        )
    if plot is not None and values is not None:
        _draw(result, values, plot, model if minus is None else f"{model} − {minus}", output)
    if train_top is not None:
        _write(result, train_top, by, train_dir, model, output)
    for warning in fell_back(one.tensor for one in result if one.fell_back):
        output.say(f"warning: {warning}")
    output.result(result, lambda: spectrum_text(result, top))


def _draw(
    result: "tuple[MatrixSpectrum, ...]",
    values: "dict[str, Tensor]",
    plot: Path,
    title: str,
    output: Output,
) -> None:
    from expo.plots.heatmap import save
    from expo.plots.spectra import spectra_figure

    save(spectra_figure(result, values, title), plot)
    output.wrote(plot, "spectra with the fitted bulk, and SNR by layer × module")


def _write(
    result: "tuple[MatrixSpectrum, ...]",
    percent: float,
    by: "By",
    folder: Path,
    model: str,
    output: Output,
) -> None:
    from expo.output.training import choose, write_training_files

    chosen = choose(result, percent, by)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", model).strip("_.") or "model"
    files = write_training_files(chosen, folder, slug)
    names = ", ".join(file.name for file in files)
    output.wrote(
        folder, f"{len(chosen.trained)} of {len(chosen.scores)} tensors to train ({names})"
    )


def _of_change(one: "MatrixSpectrum") -> tuple[str, ...]:
    """What a change has beside: σ over the noise of one rounding."""
    ratio = vars(one).get("ulp_ratio", "")
    return () if ratio == "" else (number(ratio, ".3g"),)


def spectrum_text(result: "tuple[MatrixSpectrum, ...]", top: int) -> str:
    ranked = sorted(result, key=lambda one: -(one.snr_mp if one.snr_mp is not None else 1e300))
    rows = [
        (
            one.tensor,
            f"{one.shape[0]}×{one.shape[1]}",
            number(one.noise_sigma, ".2e"),
            number(one.mp_edge, ".3g"),
            str(one.rank_mp),
            str(one.rank_gavish_donoho),
            str(one.rank_laser_rmt),
            number(one.snr_mp, ".3g"),
            number(one.snr_compat, ".3g"),
            number(one.effective_rank, ".1f"),
            number(one.bulk_fit, ".3f"),
            *_of_change(one),
        )
        for one in ranked[:top]
    ]
    header = (
        "tensor",
        "shape",
        "σ noise",
        "MP edge",
        "rank MP",
        "GD",
        "laserRMT",
        "SNR",
        "compat",
        "eff. rank",
        "bulk fit",
    )
    if any(map(_of_change, result)):
        header = (*header, "σ/σ_ulp")
    lines = [table(header, rows)]
    if len(ranked) > top:
        lines.append(f"… and {len(ranked) - top} more (--top, --json)")
    return "\n".join(lines)
