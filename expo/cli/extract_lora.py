"""`expo extract-lora`: what a model learned, as an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli import options as flags
from expo.cli.output import Output, percent, table
from expo.cli.verify import FOUND_AN_ERROR
from expo.cli.verify_text import NOT_VERIFIED, VERIFIED, findings
from expo.errors import SpecError
from expo.planning.findings import gigabytes
from expo.results import VerifyResult
from expo.spec.request import ADAPTER_DTYPES

if TYPE_CHECKING:
    from expo.results import ExtractResult

_ROWS = 10


@click.command(
    "extract-lora",
    short_help="Write ALIGNED − SFT as a PEFT adapter.",
    epilog="""\b
Examples:
  expo extract-lora Nexusflow/Starling-LM-7B-beta --minus openchat/openchat-3.5-0106 --rank 64
  expo extract-lora ./aligned adapter --minus ./sft --energy 0.9 --dtype bfloat16
  expo extract-lora ./aligned expo-adapter --minus ./sft --rank 64 --alpha 1.5
""",
)
@click.argument("aligned")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--minus", metavar="SFT", required=True, help="The model that the adapter is for.")
@click.option("--rank", type=click.IntRange(1), help="Of every module.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of every module, the smallest rank that holds this share of ΣS².",
)
@click.option(
    "--save-whole",
    is_flag=True,
    help="Save norms, embeddings and head whole (modules_to_save; vLLM does not load those).",
)
@click.option(
    "--dtype",
    type=flags.Dtype(ADAPTER_DTYPES),
    default="float32",
    show_default=True,
    help="Of the adapter.",
)
@click.option("--overwrite", is_flag=True, help="Replace the adapter in OUT, once all is done.")
@click.option(
    "--threads", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers."
)
@flags.forcing
@flags.device
@flags.amount
@flags.talk
def extract_lora(
    aligned: str,
    out: Path | None,
    minus: str,
    rank: int | None,
    energy: float | None,
    save_whole: bool,
    dtype: str,
    overwrite: bool,
    force: bool,
    threads: int,
    device: str,
    alpha: float | None,
    output: Output,
) -> None:
    """Write ALIGNED − SFT as a PEFT adapter to the directory OUT [default: NAME-lora].

    With --alpha the adapter is the ExPO model's: θ_sft + α·Δ at the size of an adapter.
    """
    from expo.verbs.extract_lora import extract_lora as run

    if (rank is None) == (energy is None):
        raise SpecError("give --rank or --energy, one of them")
    target = out or Path(f"{aligned.rstrip('/').rpartition('/')[2].partition('@')[0]}-lora")
    with output.progress(target.name, unit="tensors") as progress:
        result = run(
            aligned,
            target,
            minus=minus,
            rank=rank,
            energy=energy,
            alpha=1.0 if alpha is None else alpha,
            interpolate=True,  # the flags have been checked
            dtype=dtype,
            save_whole=save_whole,
            overwrite=overwrite,
            force=force,
            threads=threads,
            device=device,
            progress=progress,
        )
    report_adapter(result, lambda: _text(result), output)


def report_adapter(result: "ExtractResult", text: Callable[[], str], output: Output) -> None:
    """The result on stdout; on stderr warnings, its size and what the verification found."""
    for warning in result.warnings:
        output.say(f"warning: {warning}")
    verdict = {True: f"{VERIFIED}, ", False: f"{NOT_VERIFIED}, ", None: ""}[result.verified]
    size = gigabytes(result.written_bytes)
    output.wrote(result.out, f"{verdict}{size} in {result.seconds:.1f} s")
    found = findings(VerifyResult(bool(result.verified), result.checks)) if result.checks else ""
    if found and not output.json:
        output.say(found)
    output.result(result, text)
    if result.verified is False:
        raise click.exceptions.Exit(FOUND_AN_ERROR)


def _text(result: "ExtractResult") -> str:
    ranks = sorted(module.rank for module in result.modules)
    span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    lines = [
        f"{len(result.modules)} modules of rank {span} hold {percent(result.energy)} of the change's "
        f"energy; times {result.scale:g}",
        "",
        "what is missed most:",
        table(
            ("module", "rank", "‖Δ − s·B·A‖/‖Δ‖", "‖Δ‖/‖W‖"),
            [
                (m.module, str(m.rank), percent(m.error), percent(m.relative_delta))
                for m in sorted(result.modules, key=lambda m: -m.error)[:_ROWS]
            ],
        ),
    ]
    for saved, what in ((True, "saved whole"), (False, "left as in SFT")):
        others = [other for other in result.others if other.saved is saved]
        if others:
            rows = [
                (o.tensor, percent(o.relative_delta), o.why)
                for o in sorted(others, key=lambda o: -(o.relative_delta or 0.0))[:_ROWS]
            ]
            more = f", the {_ROWS} that changed most" if len(others) > _ROWS else ""
            lines += ["", f"{what}, {len(others)} tensors that changed{more}:"]
            lines.append(table(("tensor", "‖Δ‖/‖W‖", "why"), rows))
    return "\n".join(lines)
