"""`expo plan`: what would happen, from headers alone."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.output import Output
from expo.cli.run import Overrides, RunOptions, show_plan


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
@options.numbers
@options.matching
@options.talk
def plan(
    sources: tuple[str, ...],
    out: Path | None,
    alpha: float | None,
    paper_alpha: float | None,
    interpolate: bool,
    dtype: str | None,
    rounding: str | None,
    seed: int | None,
    allow_missing: str | None,
    include: tuple[str, ...],
    max_shard_size: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Print what a merge would do. Reads headers only (of Hub models by range), writes nothing.

    Exits with 1 where the merge would be refused.
    """
    from expo.api import make_request
    from expo.errors import SpecError
    from expo.planning.build import build_plan
    from expo.planning.chunks import DEFAULT_THREADS
    from expo.spec.request import resolve_alpha
    from expo.spec.schema import read_spec

    value = resolve_alpha(alpha, paper_alpha, interpolate=interpolate)
    match sources:
        case (spec,):
            if value is not None:
                raise SpecError("alpha belongs into the spec here; --alpha goes with SFT ALIGNED")
            request = read_spec(Path(spec))
        case (sft, aligned):
            request = make_request(sft, aligned, alpha=value)
        case _:
            raise SpecError("plan takes one spec, or SFT and ALIGNED")
    overrides = Overrides(dtype, rounding, seed, max_shard_size, allow_missing, include)
    show_plan(
        build_plan(overrides.apply(request)),
        out,
        RunOptions(dry_run=True, overwrite=False, hash_inputs=False, threads=DEFAULT_THREADS),
        Output(json=as_json, quiet=quiet),
    )
