"""`expo publish`: a verified output to the Hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli import options
from expo.cli.output import Output, to_json
from expo.cli.stopping import RESUMABLE
from expo.errors import SpecError

if TYPE_CHECKING:
    from expo.results import PublishPlan, PublishResult


@click.command(
    short_help="Verify OUT and publish it on the Hub as one commit.",
    epilog="""\b
Examples:
  expo publish out org/Starling-LM-7B-beta-ExPO --dry-run
  expo publish out org/Starling-LM-7B-beta-ExPO --public --license apache-2.0
  expo publish out org/Starling-LM-7B-beta-ExPO --yes --json --receipt receipt.json
""",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="ORG/NAME")
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Results of evaluate or sweep, for the card.",
)
@click.option(
    "--sign",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="Sign OUT with this private EC key (PEM): adds model.sig, needs the extra sign.",
)
@options.publishing
@click.option("--dry-run", is_flag=True, help="Print what would be done, send nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before sending.")
@options.talk
def publish(
    out: Path,
    repo_id: str,
    results: Path | None,
    sign: Path | None,
    to: options.PublishOptions,
    dry_run: bool,
    yes: bool,
    output: Output,
) -> None:
    """Verify the model directory OUT and publish it as one commit to ORG/NAME on the Hub.

    A new repository is private unless --public is given. What is there already is not sent again; other weights
    there are deleted in the same commit, other files stay. Interrupted, the same command goes on.
    """
    from expo.cli.publish_text import publish_text
    from expo.publishing.receipt import check_receipt_path
    from expo.verbs.publish import prepare, send

    if not (yes or dry_run or _has_terminal()):
        raise SpecError("there is no terminal to ask on: add --yes, or --dry-run to see the plan")
    if to.receipt is not None:
        check_receipt_path(to.receipt)
    with output.progress("verify") as progress:
        ready = prepare(
            out,
            repo_id,
            results=results,
            sign=sign,
            public=to.public,
            revision=to.revision,
            create_pr=to.create_pr,
            licence=to.licence,
            name_ok=to.name_ok,
            progress=progress,
        )
    if not _agreed(ready.plan, output, dry_run=dry_run, yes=yes):
        return
    RESUMABLE.append(out)
    with output.progress(repo_id) as progress:
        result = send(ready, sign=sign, progress=progress)
    output.result(result, lambda: publish_text(result))
    write_receipt(result, to.receipt)


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _agreed(plan: "PublishPlan", output: Output, *, dry_run: bool, yes: bool) -> bool:
    """Show the plan, as data where that is all that is wanted, and ask unless `yes`."""
    from expo.cli.publish_text import publish_plan_text

    if dry_run:
        output.result(plan, lambda: publish_plan_text(plan))
        return False
    if yes:
        output.say(publish_plan_text(plan))
        return True
    print(publish_plan_text(plan), file=sys.stderr)
    if not click.confirm("Publish?", err=True):
        raise click.exceptions.Exit(1)
    return True


def write_receipt(result: "PublishResult", path: Path | None) -> None:
    """The last thing to do: one that cannot be written hides nothing."""
    from expo.output.durable import unwritable

    try:
        if path is not None:
            path.write_text(to_json(result) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(error, path) from error  # pyright: ignore[reportArgumentType]
