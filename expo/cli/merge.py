"""`expo merge`: the main job from a YAML spec."""

from pathlib import Path

import click

from expo.cli import options as flags
from expo.cli.output import Output
from expo.cli.run import run_merge


@click.command(
    epilog="""\b
Examples:
  expo merge merge_configs/starling-lm-7b-beta-expo.yml starling-expo
  expo merge spec.yml out --rounding stochastic --seed 7 --dry-run
"""
)
@click.argument("spec", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@flags.overrides
@flags.running
@flags.talk
def merge(
    spec: Path,
    out: Path,
    overrides: flags.Overrides,
    options: flags.RunOptions,
    output: Output,
) -> None:
    """Run the merge spec SPEC and write the directory OUT. Flags win over the spec."""
    from expo.spec.read import read_spec

    run_merge(overrides.apply(read_spec(spec)), out, options, output)
