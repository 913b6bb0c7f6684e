"""`expo sweep`: find the α worth publishing."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from expo.cli import options as flags
from expo.cli.output import Output, number, percent, table
from expo.cli.stopping import RESUMABLE

if TYPE_CHECKING:
    from expo.results import Paired, SweepResult


@click.command(
    short_help="Find the α worth publishing, without writing a checkpoint.",
    epilog="""\b
Examples:
  expo sweep ./sft ./aligned out --prompts prompts.jsonl --reward weqweasdas/RM-Mistral-7B
  expo sweep ./sft ./aligned out --prompts prompts.jsonl --reward ./rm --preset expo-paper
  expo sweep spec.yml out --prompts prompts.jsonl --reward rewards:score --alphas 1.0:1.6:0.1
""",
)
@click.argument("models", nargs=-1, required=True, metavar="SPEC|SFT ALIGNED")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT_DIR")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help='JSON lines: {"prompt": …} or {"messages": […]}.',
)
@click.option(
    "--reward",
    required=True,
    metavar="MODEL|module:function",
    help="A sequence classifier with one output, or a function (conversations, answers) → numbers.",
)
@click.option(
    "--alphas",
    default="auto",
    show_default=True,
    help="A grid (1.0:1.6:0.1 or 1.1,1.3), or auto: race, widen upward, stop at the cliff. 1 is always "
    "among them.",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="PATH=VALUES",
    help="Instead of alpha another number of SPEC, like models.0.parameters.weight=0:1:0.25; several are "
    "combined.",
)
@click.option(
    "--search",
    type=click.Choice(["grid", "cma"]),
    default="grid",
    show_default=True,
    help="Of --vary: every combination, or CMA-ES inside the ranges.",
)
@click.option("--budget", type=click.IntRange(2), default=100, show_default=True, help="Of cma.")
@click.option(
    "--second-reward", metavar="MODEL|module:function", help="Reported beside; never decides."
)
@click.option(
    "--exact",
    type=click.Path(path_type=Path),
    help='Questions, JSON lines: {"question": …, "answer": …}; reports the accuracy.',
)
@flags.decoding
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling and halves.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@flags.model_device
@click.option("--overwrite", is_flag=True, help="Begin anew where OUT_DIR holds another sweep.")
@flags.talk
def sweep(
    models: tuple[str, ...],
    out: Path,
    prompts: Path,
    reward: str,
    alphas: str,
    vary: tuple[str, ...],
    search: str,
    budget: int,
    second_reward: str | None,
    exact: Path | None,
    decoding: flags.Decoding,
    seed: int,
    batch_size: int,
    device: str | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Answer prompts at every α with one model in memory, score the answers, and say which α is worth
    publishing.

    Give a spec of merge_method expo, or SFT and ALIGNED. The choice is made on one half of the prompts and
    reported on the other. An interrupted run resumes when the same command is run again.
    """
    from expo.verbs.sweep import sweep as run

    match models:
        case (spec,) if not Path(spec).is_dir():
            source = spec
        case (sft, aligned):
            source = (sft, aligned)
        case _:
            raise click.UsageError("Give SPEC OUT_DIR, or SFT ALIGNED OUT_DIR.")
    _check_used(click.get_current_context())
    RESUMABLE.append(out)
    with output.progress(out.name, unit="answers") as progress:
        result = run(
            source,
            out,
            prompts=prompts,
            reward=reward,
            alphas=alphas,
            vary=_varied(vary),
            method="cma" if search == "cma" else "grid",
            budget=budget,
            second_reward=second_reward,
            exact=exact,
            preset=decoding.preset,
            decoding=decoding.given,
            seed=seed,
            batch_size=batch_size,
            device=device,
            overwrite=overwrite,
            progress=progress,
            say=output.say,
        )
    output.wrote(result.out, f"{result.answers} answers in {result.seconds:.0f} s")
    output.result(result, lambda: sweep_text(result))


def _check_used(context: click.Context) -> None:
    """Refuse flags that would change nothing."""
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if {"vary", "alphas"} <= given:
        raise click.UsageError("--alphas: not with --vary, which sweeps other numbers in its place")
    if "budget" in given and context.params["search"] != "cma":
        raise click.UsageError("--budget: only with --search cma")


def _varied(texts: tuple[str, ...]) -> dict[str, str]:
    for text in texts:
        if not all(text.partition("=")):
            raise click.UsageError(f"--vary {text}: give PATH=VALUES")
    names = [text.partition("=")[0] for text in texts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise click.UsageError(f"--vary {twice} is given twice: name its values once")
    return {text.partition("=")[0]: text.partition("=")[2] for text in texts}


def sweep_text(result: "SweepResult") -> str:
    """The table of candidates, the verdict, and what to run next."""
    baseline = result.baseline
    names = list(baseline)
    number_of = ("number",) if len(names) > 1 else ()  # as the plot has it
    header = (*number_of, *_short(names), "paper alpha", "prompts",
              "reward", "over the baseline", "length", "unfinished", "repetition", "log p")  # fmt: skip
    rows = [
        (
            *(str(place) for _ in number_of),
            *(f"{point.at[name]:g}" for name in names),
            "–" if point.paper_alpha is None else f"{point.paper_alpha:g}",
            str(point.prompts),
            _interval(point.reward),
            _interval(point.difference),
            f"{point.length:.0f}",
            percent(point.unfinished),
            percent(point.repetition),
            number(point.log_likelihood, ".2f") + (" cliff" if point.beyond_cliff else ""),
        )
        for place, point in enumerate(result.points, start=1)
    ]
    lines = [table(header, rows), *_caveat(result), "", result.verdict.text, ""]
    if result.plot is not None:
        lines.append(f"plot: {result.plot}")
    if result.verdict.beats:
        lines.append(f"the model: expo merge {result.chosen} OUT")
    return "\n".join(lines)


def _short(names: list[str]) -> list[str]:
    """Names of numbers without their place in the spec, where that tells them apart."""
    short = [name.rpartition("parameters.")[2] for name in names]
    return short if len({*short}) == len(names) else names


def _caveat(result: "SweepResult") -> list[str]:
    if len({point.prompts for point in result.points}) == 1:
        return []
    return ["Rewards are of as many prompts as stand beside them: compare by the difference."]


def _interval(value: "Paired | None") -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"
