"""`expo spectrum`: where the signal of every matrix ends and its noise begins."""

from typing import TYPE_CHECKING

import click

from expo.cli import options
from expo.cli.output import Output, number, table

if TYPE_CHECKING:
    from expo.engine.spectrum import MatrixSpectrum


@click.command(
    epilog="""\b
Examples:
  expo spectrum Nexusflow/Starling-LM-7B-beta
  expo spectrum ./aligned --minus ./sft
  expo spectrum ./aligned --minus ./sft --target 'self_attn' --json > spectra.json
"""
)
@click.argument("model")
@click.option("--minus", metavar="BASE", help="Look at what changed since this model.")
@click.option("--target", metavar="REGEX", help="Only these tensors. [default: matrices of layers]")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Rows to print.")
@click.option("--threads", type=click.IntRange(1, 64), default=2, show_default=True)
@options.talk
def spectrum(
    model: str, minus: str | None, target: str | None, top: int, threads: int, output: Output
) -> None:
    """Singular values of the matrices of MODEL, summed up: noise level, edge, ranks, SNR.

    The noise of a matrix fills its singular values up to the Marchenko–Pastur edge; what is above is
    signal. Rows are sorted by snr_mp = ΣS² above the edge / ΣS² below.
    """
    from expo.api import spectrum as run

    with output.progress("spectrum", unit="matrices") as progress:
        result = run(model, minus=minus, target=target, threads=threads, progress=progress)
    output.result(result, lambda: spectrum_text(result, top))


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
    lines = [table(header, rows)]
    if len(ranked) > top:
        lines.append(f"… and {len(ranked) - top} more (--top, --json)")
    return "\n".join(lines)
