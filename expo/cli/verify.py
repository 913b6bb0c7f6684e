"""`expo verify`: is a model directory whole, does it tokenize and speak as it should."""

from pathlib import Path

import click

from expo.cli import options
from expo.cli.output import Output
from expo.cli.verify_text import verify_text
from expo.errors import OutputError, SpecError

FOUND_AN_ERROR = 3


@click.command(
    short_help="Check that a model is whole, loads and talks as it should.",
    epilog="""\b
Examples:
  expo verify out
  expo verify out --against Nexusflow/Starling-LM-7B-beta
  expo verify out --vectors openchat --quick --json
  expo verify out --signature publisher.pub
  expo verify trusted-model --record vectors.yml
""",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", metavar="ALIGNED", help="The aligned model, to compare with.")
@click.option(
    "--vectors",
    type=click.Path(path_type=Path),
    metavar="FILE|NAME",
    help="Golden vectors that tokenizer and template must give: a file, or the name of a shipped one.",
)
@click.option("--quick", is_flag=True, help="Headers, configuration and tokenizer, no tensors.")
@click.option("--generate", is_flag=True, help="Build the model and let it answer (on the CPU).")
@click.option(
    "--signature",
    type=click.Path(path_type=Path),
    metavar="KEY.pub",
    help="Also check the signature of OUT (model.sig) with this EC public key.",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Write golden vectors from OUT, which you trust, to this file; no check is run.",
)
@options.talk
def verify(
    out: Path,
    against: str | None,
    vectors: Path | None,
    quick: bool,
    generate: bool,
    signature: Path | None,
    record: Path | None,
    output: Output,
) -> None:
    """Check that the model OUT (a directory, or one safetensors file) is whole, tokenizes and speaks as it should.

    Exits with 3 where a check finds an error. Writes nothing to OUT.
    """
    if record is not None:
        if against or vectors or quick or generate or signature:
            raise SpecError("--record only writes vectors: leave the other options out")
        _record(out, record, output)
        return
    from expo.verbs.verify import verify as run

    with output.progress("verify") as progress:
        result = run(
            out,
            against=against,
            vectors=vectors,
            quick=quick,
            generate=generate,
            signature=signature,
            progress=progress,
        )
    output.result(result, lambda: verify_text(result, str(out), verbose=output.verbose))
    if not result.ok:
        raise click.exceptions.Exit(FOUND_AN_ERROR)


def _record(out: Path, file: Path, output: Output) -> None:
    from expo.output.durable import unwritable
    from expo.verification.run import record_vectors

    if file.exists():
        raise OutputError(f"{file} exists: name a new file for the vectors")
    content = record_vectors(out)
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise unwritable(error, file) from error
    output.wrote(file, f"golden vectors of {out}, marked as self-recorded")
