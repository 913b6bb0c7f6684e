"""`expo merge`: the main job from a YAML spec."""

from pathlib import Path

import click

from expo.cli import options as flags
from expo.cli.merging import run_merge
from expo.cli.output import Output
from expo.spec.request import Request


def _list(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from expo.spec.recipes import recipes

    found = list(recipes())
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        click.echo(f"{recipe.name:<{width}}  {recipe.title}")
    context.exit()


@click.command(
    epilog="""\b
Examples:
  expo merge --list
  expo merge starling-lm-7b-beta-expo starling-expo
  expo merge spec.yml out --rounding stochastic --seed 7 --dry-run
"""
)
@click.argument("spec", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="List the recipes that come with expo, and exit.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Cut changes at their noise level even where that is not rounding noise.",
)
@flags.overrides
@flags.running
@flags.talk
def merge(
    spec: Path,
    out: Path,
    force: bool,
    overrides: flags.Overrides,
    options: flags.RunOptions,
    output: Output,
) -> None:
    """Run the merge spec SPEC (a file, or the name of a recipe) and write the directory OUT.

    Flags win over the spec.
    """
    from dataclasses import replace

    from expo.spec.stages import read_stages

    def final(request: Request) -> Request:
        if force and request.low_rank is not None:
            request = replace(request, low_rank=replace(request.low_rank, force=True))
        return overrides.apply(request)

    stages = read_stages(spec)
    if len(stages) == 1:
        run_merge(final(stages[0].request({})), out, options, output)
        return
    if options.dry_run:
        raise stages[1].document.error(
            (), "needs the first one's output: --dry-run takes one document"
        )
    from expo.verbs.stages import run_stages

    def run(request: Request, place: Path, is_part: bool) -> None:
        how = replace(options, overwrite=True, verify=False) if is_part else options
        run_merge(final(request), place, how, output)

    run_stages(stages, out, run)
