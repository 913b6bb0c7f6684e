"""`expo merge`: the main job from a YAML spec."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli import options as flags
from expo.cli.merging import check_one, run_merge, show_plans
from expo.cli.output import Output, to_json
from expo.cli.pushing import is_push, run_push
from expo.spec.request import Request

if TYPE_CHECKING:
    from expo.spec.stages import Stage


def _list(output: Output) -> None:
    """The recipes that come with expo."""
    from expo.spec.recipes import recipes

    found = list(recipes())
    if output.json:
        output.data(to_json([{"name": recipe.name, "title": recipe.title} for recipe in found]))
        return
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        output.data(f"{recipe.name:<{width}}  {recipe.title}")


class _Collected(Output):
    """Keeps the results of several merges for one JSON document."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(json=True, quiet=quiet)
        self.results: list[object] = []

    def result(self, value: object, text: Callable[[], str]) -> None:
        self.results.append(value)


@click.command(
    short_help="Run a merge spec, or a recipe by name.",
    epilog="""\b
Examples:
  expo merge --list
  expo merge starling-lm-7b-beta-expo starling-expo
  expo merge spec.yml out --rounding stochastic --seed 7 --dry-run
  expo merge spec.yml out --alphas 1.2,1.3,1.5
  expo merge spec.yml org/name --push --stream-inputs --license apache-2.0
""",
)
@click.argument("spec", type=click.Path(path_type=Path), required=False, metavar="SPEC")
@click.argument("out", type=click.Path(path_type=Path), required=False, metavar="OUT")
@click.option(
    "--list", "lists", is_flag=True, help="List the recipes that come with expo, and exit."
)
@flags.forcing
@flags.alphas
@flags.strictness
@flags.overrides
@flags.running
@flags.pushing
@flags.talk
def merge(
    spec: Path | None,
    out: Path | None,
    lists: bool,
    force: bool,
    alphas: tuple[float, ...],
    strict: bool,
    overrides: flags.Overrides,
    options: flags.RunOptions,
    to: flags.PublishOptions,
    output: Output,
) -> None:
    """Run the merge spec SPEC (a file, or the name of a recipe) and write the directory OUT.

    Flags win over the spec; --alphas over every alpha in it. With --push OUT is a repository on the Hub, and no more
    than two shards of it are on this disk at a time.
    """
    from expo.spec.stages import read_stages

    if lists:
        _list(output)
        return
    if spec is None or out is None:
        raise click.UsageError(f"Missing argument '{'SPEC' if spec is None else 'OUT'}'.")

    pushes = is_push(out, to, alphas)

    def final(request: Request) -> Request:
        return overrides.apply(request.forced() if force else request)

    stages = read_stages(spec, strict=strict)
    check_one(stages, alphas)
    if pushes:
        from expo.verbs.push import check_single

        check_single(len(stages))
        run_push(final(stages[0].request({})), out, to, options, output)
    elif len(stages) == 1:
        run_merge(final(stages[0].request({})), out, options, output, alphas=alphas)
    elif options.dry_run:
        show_plans(stages, final, out, options, output)
    else:
        options.check_alone("a spec of several documents", "which are made one after the other")
        _run_all(stages, final, out, options, output)


def _run_all(
    stages: "list[Stage]",
    final: Callable[[Request], Request],
    out: Path,
    options: flags.RunOptions,
    output: Output,
) -> None:
    """Every merge in turn; with --json one list of their results."""
    from dataclasses import replace

    from expo.planning.preview import check_all
    from expo.verbs.stages import run_stages

    check_all(stages, final)
    collected = _Collected(quiet=output.quiet) if output.json else None

    def run(request: Request, place: Path, is_part: bool) -> None:
        how = replace(options, overwrite=True, verify=False) if is_part else options
        run_merge(final(request), place, how, collected or output)

    try:
        run_stages(stages, out, run, overwrite=options.overwrite)
    finally:
        if collected is not None and collected.results:
            output.data(to_json(collected.results))
