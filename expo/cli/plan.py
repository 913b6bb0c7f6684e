"""`expo plan`: what would happen, from headers alone."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.merging import show_plan, show_plans
from expo.cli.output import Output, to_json


@click.command(
    epilog="""\b
Examples:
  expo plan spec.yml
  expo plan openchat/openchat-3.5-0106 Nexusflow/Starling-LM-7B-beta
  expo plan ./sft ./aligned --out ./out --json
  expo plan starling-lm-7b-beta-expo --resolved
  expo plan --schema > expo.schema.json
"""
)
@click.argument("sources", nargs=-1, metavar="SPEC.yml | SFT ALIGNED")
@click.option("--resolved", is_flag=True, help="Print the spec with every default filled in.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of specs, for editors.")
@click.option("--out", type=click.Path(path_type=Path), help="Also check that OUT can be written.")
@options.strictness
@options.amount
@options.overrides
@options.talk
def plan(
    sources: tuple[str, ...],
    resolved: bool,
    schema: bool,
    out: Path | None,
    strict: bool,
    alpha: float | None,
    overrides: options.Overrides,
    output: Output,
) -> None:
    """Print what a merge would do. Reads headers only (of Hub models by range), writes nothing.

    SPEC.yml may be the name of a recipe (expo merge --list). Exits with 1 where the merge would be refused.
    """
    from expo.api import make_request
    from expo.errors import SpecError
    from expo.planning.build import build_plan
    from expo.spec.stages import read_stages

    if schema:
        from expo.spec.schema import json_schema

        output.data(to_json(json_schema()))
        return
    match sources:
        case (spec,):
            if alpha is not None:
                raise SpecError("alpha belongs into the spec here; --alpha goes with SFT ALIGNED")
            stages = read_stages(Path(spec), strict=strict)
            if len(stages) > 1 and not resolved:
                running = options.RunOptions(dry_run=True)
                show_plans(stages, overrides.apply, out, running, output)
                return
            if len(stages) > 1:
                raise stages[1].document.error((), "--resolved takes one document")
            request = stages[0].request({})
        case (sft, aligned):
            request = make_request(sft, aligned, alpha=alpha)
        case _:
            raise SpecError("plan takes one spec, or SFT and ALIGNED")
    request = overrides.apply(request)
    if resolved:
        from expo.spec.resolved import resolved as fill_in
        from expo.spec.resolved import to_yaml

        spec = fill_in(request)
        output.data(to_json(spec) if output.json else to_yaml(spec).rstrip())
        return
    built = build_plan(request)
    show_plan(built, out, options.RunOptions(dry_run=True), output)
