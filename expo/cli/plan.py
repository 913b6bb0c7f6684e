"""`expo plan`: what would happen, from headers and a sample of what is quantized."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.merging import check_one, show_outputs, show_plans
from expo.cli.output import Output, to_json
from expo.spec.request import Request


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
@options.forcing
@options.strictness
@options.amounts
@options.overrides
@options.measured
@options.talk
def plan(
    sources: tuple[str, ...],
    resolved: bool,
    schema: bool,
    out: Path | None,
    force: bool,
    strict: bool,
    amounts: options.Amounts,
    overrides: options.Overrides,
    device: str | None,
    output: Output,
) -> None:
    """Print what a merge would do. Reads headers only (of Hub models by range), writes nothing.

    SPEC.yml may be the name of a recipe (expo merge --list). Exits with 1 where the merge would be refused.
    """
    from expo.errors import SpecError
    from expo.spec.request import make_request
    from expo.spec.resolved import resolved as resolved_spec
    from expo.spec.stages import read_stages, resolved_stages

    if schema:
        from expo.spec.schema import json_schema

        output.data(to_json(json_schema()))
        return
    running, alpha, alphas = (
        options.RunOptions(dry_run=True, device=device),
        amounts.alpha,
        amounts.alphas,
    )
    if resolved and alphas:
        raise SpecError("--alphas: not with --resolved, which prints a spec of one alpha")
    if resolved and device is not None:
        raise SpecError("--device: not with --resolved: a spec names none")

    def final(request: Request) -> Request:
        return overrides.apply(request.forced() if force else request)

    match sources:
        case (_,) if alpha is not None:
            raise SpecError("alpha belongs into the spec here; --alpha goes with SFT ALIGNED")
        case (spec,):
            stages = read_stages(Path(spec), strict=strict)
            check_one(stages, alphas)
            if resolved:
                _show_specs(resolved_stages(stages, final), output)
                return
            if len(stages) > 1:
                show_plans(stages, final, out, running, output)
                return
            request = final(stages[0].request({}))
        case (sft, aligned):
            request = final(make_request(sft, aligned, alpha=alpha, interpolate=True))
        case _:
            raise SpecError("plan takes one spec, or SFT and ALIGNED")
    if resolved:
        _show_specs([resolved_spec(request)], output)
    else:
        show_outputs(request, out, alphas, running, output)


def _show_specs(specs: list[dict[str, object]], output: Output) -> None:
    """Specs that say the same with every default filled in."""
    from expo.spec.resolved import to_yaml

    if output.json:
        output.data(to_json(specs if len(specs) > 1 else specs[0]))
    else:
        output.data("---\n".join(map(to_yaml, specs)).rstrip())
