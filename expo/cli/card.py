"""`expo card`: the model card."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.output import Output


@click.command(
    short_help="Print the model card of OUT, from its manifest alone.",
    epilog="""\b
Examples:
  expo card out
  expo card out --results results.json --write
  expo card out --license apache-2.0 > README.md
""",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Evaluation results (expo.results/1) to show.",
)
@click.option(
    "--license",
    metavar="ID",
    help="As the Hub calls it. [default: the most restrictive of the parents', none if unclear]",
)
@click.option(
    "--write",
    is_flag=True,
    help="Also write README.md, heat map, .eval_results/ and notices into OUT.",
)
@options.talk
def card(out: Path, results: Path | None, license: str | None, write: bool, output: Output) -> None:
    """Print the model card of OUT, made from its manifest alone.

    What you wrote into OUT's README.md stays: only expo's keys of the front matter and the block
    between its two marks are renewed.
    """
    from expo.verbs.card import card as run

    result = run(out, results=results, license=license, write=write)
    for warning in result.warnings:
        output.say(f"warning: {warning}")
    if result.files:
        output.wrote(out, f"wrote {', '.join(result.files)}")
    output.result(result, lambda: result.text.rstrip("\n"))
