"""`expo laser`: keep only a part of chosen matrices of one model."""

from pathlib import Path

import click

from expo.cli import options as flags
from expo.cli.merging import run_merge
from expo.cli.output import Output
from expo.errors import SpecError
from expo.operators.rules import RULES


@click.command(
    short_help="Cut matrices of MODEL down to a low rank.",
    epilog="""\b
Examples:
  expo laser Nexusflow/Starling-LM-7B-beta out --target 'layers\\.(2[4-9]|3.)\\.mlp' --keep rho=0.1
  expo laser ./model out --target self_attn --layers 16 32 --keep laser_rmt
  expo laser ./model out --keep mp --accept-if perplexity --texts held_out.txt
""",
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--keep", required=True, metavar="RULE", help=f"{RULES}.")
@click.option(
    "--target", metavar="REGEX", help="Only these matrices. [default: those of the layers]"
)
@click.option(
    "--layers", type=(int, int), metavar="FIRST END", help="Only layers FIRST up to before END."
)
@click.option(
    "--accept-if",
    type=click.Choice(["perplexity"]),
    help="Keep an edit only where the perplexity of --texts does not get worse.",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Held-out texts, one a line: one half decides, the other is for the report.",
)
@flags.overrides
@flags.running
@flags.talk
def laser(
    model: str,
    out: Path,
    keep: str,
    target: str | None,
    layers: tuple[int, int] | None,
    accept_if: str | None,
    texts: Path | None,
    overrides: flags.Overrides,
    options: flags.RunOptions,
    output: Output,
) -> None:
    """Write MODEL with only a part of some matrices kept to the directory OUT.

    Cutting trained weights costs quality as often as it helps: let held-out texts decide with
    --accept-if. What is cut, and how well the noise model fits, is in OUT/expo.json.
    """
    from expo.spec.request import laser_request, matrix_edit

    if (accept_if is None) != (texts is None):
        raise SpecError("--accept-if and --texts go together")
    edit = matrix_edit(keep, target=target, layers=layers)
    request = overrides.apply(laser_request(model, edit))
    if texts is not None:
        options.check_alone("--accept-if", "which decides one edit after the other")
    if texts is not None and not options.dry_run:
        from expo.output.claim import check_out
        from expo.verbs.laser import accept

        check_out(out, request, overwrite=options.overwrite)  # before hours of trying
        with output.progress("matrices tried") as progress:
            found = accept(request, texts, device=options.device, progress=progress)
        output.say(found.summary())
        request = found.request
    run_merge(request, out, options, output)
