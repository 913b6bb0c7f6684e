"""`expo merge`: the main job from a YAML spec."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.output import Output
from expo.cli.run import Overrides, RunOptions, run_merge


@click.command(
    epilog="""\b
Examples:
  expo merge merge_configs/starling-lm-7b-beta-expo.yml starling-expo
  expo merge spec.yml out --rounding stochastic --seed 7 --dry-run
"""
)
@click.argument("spec", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@options.numbers
@options.matching
@options.running
@options.talk
def merge(
    spec: Path,
    out: Path,
    dtype: str | None,
    rounding: str | None,
    seed: int | None,
    allow_missing: str | None,
    include: tuple[str, ...],
    max_shard_size: int | None,
    dry_run: bool,
    overwrite: bool,
    no_verify: bool,
    hash_inputs: bool,
    threads: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Run the merge spec SPEC and write the directory OUT. Flags win over the spec."""
    from expo.spec.schema import read_spec

    overrides = Overrides(dtype, rounding, seed, max_shard_size, allow_missing, include)
    run_merge(
        overrides.apply(read_spec(spec)),
        out,
        RunOptions(dry_run, overwrite, hash_inputs, threads),
        Output(json=as_json, quiet=quiet),
    )
