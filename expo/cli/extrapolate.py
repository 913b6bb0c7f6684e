"""`expo extrapolate`: the main job in one line."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.output import Output
from expo.cli.run import Overrides, RunOptions, run_merge


@click.command(
    epilog="""\b
Examples:
  expo extrapolate openchat/openchat-3.5-0106 Nexusflow/Starling-LM-7B-beta out --alpha 1.5
  expo extrapolate ./sft ./aligned ./out --paper-alpha 0.3
  expo extrapolate ./sft ./sft+./dpo-adapter ./out --alpha 1.3 --rounding stochastic
"""
)
@click.argument("sft")
@click.argument("aligned")
@click.argument("out", type=click.Path(path_type=Path))
@options.amount
@options.numbers
@options.matching
@options.running
@options.talk
def extrapolate(
    sft: str,
    aligned: str,
    out: Path,
    alpha: float | None,
    paper_alpha: float | None,
    interpolate: bool,
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
    """Write θ_sft + α·(θ_aligned − θ_sft) to the directory OUT.

    SFT and ALIGNED are directories, Hub ids (org/name, org/name@revision), or model+adapter for a
    LoRA adapter. An interrupted run resumes when the same command is run again.
    """
    from expo.api import make_request
    from expo.errors import SpecError
    from expo.spec.request import resolve_alpha

    value = resolve_alpha(alpha, paper_alpha, interpolate=interpolate)
    if value is None and not dry_run:
        raise SpecError("give --alpha or --paper-alpha (= alpha − 1); neither has a default")
    request = make_request(sft, aligned, alpha=value)
    overrides = Overrides(dtype, rounding, seed, max_shard_size, allow_missing, include)
    run_merge(
        overrides.apply(request),
        out,
        RunOptions(dry_run, overwrite, hash_inputs, threads),
        Output(json=as_json, quiet=quiet),
    )
