"""`expo plan`: what would happen, from headers alone."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.output import Output
from expo.cli.run import show_plan


@click.command(
    epilog="""\b
Examples:
  expo plan spec.yml
  expo plan openchat/openchat-3.5-0106 Nexusflow/Starling-LM-7B-beta
  expo plan ./sft ./aligned --out ./out --json
"""
)
@click.argument("sources", nargs=-1, required=True, metavar="SPEC.yml | SFT ALIGNED")
@click.option("--out", type=click.Path(path_type=Path), help="Also check that OUT can be written.")
@options.amount
@options.overrides
@options.talk
def plan(
    sources: tuple[str, ...],
    out: Path | None,
    alpha: float | None,
    overrides: options.Overrides,
    output: Output,
) -> None:
    """Print what a merge would do. Reads headers only (of Hub models by range), writes nothing.

    Exits with 1 where the merge would be refused.
    """
    from expo.api import make_request
    from expo.errors import SpecError
    from expo.planning.build import build_plan
    from expo.spec.read import read_spec

    match sources:
        case (spec,):
            if alpha is not None:
                raise SpecError("alpha belongs into the spec here; --alpha goes with SFT ALIGNED")
            request = read_spec(Path(spec))
        case (sft, aligned):
            request = make_request(sft, aligned, alpha=alpha)
        case _:
            raise SpecError("plan takes one spec, or SFT and ALIGNED")
    built = build_plan(overrides.apply(request))
    show_plan(built, out, options.RunOptions(dry_run=True), output)
