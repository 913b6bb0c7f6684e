"""`expo evaluate`: a benchmark's prompts answered, in the form that its judge reads."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from expo.cli import options
from expo.cli.output import WRITTEN, Output, number, percent, table
from expo.cli.stopping import RESUMABLE, gently
from expo.errors import SpecError

if TYPE_CHECKING:
    from expo.results import EvaluateResult, Score

_HARNESS = {
    "model", "tasks", "tasks_path", "apply_chat_template", "out", "generator", "device", "overwrite",
    "as_json", "quiet", "verbose", "debug",
}  # fmt: skip

FORMS = ("alpaca-eval", "arena-hard", "jsonl", "mt-bench", "ultrafeedback")


@click.command(
    short_help="Answer a benchmark's prompts in the form its judge reads.",
    epilog="""\b
Examples:
  expo evaluate out --format alpaca-eval --prompts alpaca_eval.json
  expo evaluate out --format ultrafeedback --prompts test_gen.parquet --preset expo-paper
  expo evaluate --endpoint http://localhost:8000/v1 --format mt-bench --prompts question.jsonl
  expo evaluate out --prompts prompts.jsonl --temperature 1 --best-of 64 --reward ./reward-model
  expo evaluate out --lm-eval gsm8k,ifeval --apply-chat-template
""",
)
@click.argument("model", required=False)
@click.option("--prompts", type=click.Path(path_type=Path), help="The benchmark's prompts.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMS),
    default="jsonl",
    show_default=True,
    help="Whose form the answers take.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file to write. [default: NAME-FORMAT.json or .jsonl; NAME-results.json with --lm-eval]",
)
@click.option("--endpoint", metavar="URL", help="Ask a server that speaks OpenAI's protocol.")
@click.option("--model", "served", metavar="NAME", help="The model's name on that server.")
@click.option("--generator", metavar="NAME", help="The model's name in the file.")
@click.option("--reward", metavar="MODEL|module:function", help="Score the answers with this.")
@click.option(
    "--best-of",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Answers a prompt, of which the best by --reward is kept.",
)
@click.option(
    "--num-beams",
    type=click.IntRange(1),
    default=1,
    help="Beam search for the likeliest answer, in place of sampling.",
)
@options.decoding
@options.model_device
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Prompts at once in this process.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1024),
    default=8,
    show_default=True,
    help="Requests at once to the server.",
)
@click.option("--lm-eval", "tasks", metavar="TASKS", help="Run lm-evaluation-harness instead.")
@click.option(
    "--tasks-path", type=click.Path(path_type=Path), help="A folder with more tasks for it."
)
@click.option("--apply-chat-template", is_flag=True, help="Let it use the chat template.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@options.talk
def evaluate(
    model: str | None,
    prompts: Path | None,
    form: str,
    out: Path | None,
    endpoint: str | None,
    served: str | None,
    generator: str | None,
    reward: str | None,
    best_of: int,
    num_beams: int,
    decoding: options.Decoding,
    device: str | None,
    seed: int,
    batch_size: int,
    concurrency: int,
    tasks: str | None,
    tasks_path: Path | None,
    apply_chat_template: bool,
    overwrite: bool,
    output: Output,
) -> None:
    """Let MODEL answer PROMPTS, and write the answers as a benchmark's judge reads them.

    MODEL is a directory or a Hub id, run in this process; with --endpoint a server is asked (a key in
    OPENAI_API_KEY goes along). An interrupted run resumes when the same command is run again.
    """
    named = generator or served or ("answers" if model is None else Path(model).resolve().name)
    name = Path(named).name or "answers"  # of a server's organisation/model, or path, the last part
    if tasks is not None:
        if model is None:
            raise SpecError("--lm-eval takes a MODEL")
        _check_harness(click.get_current_context())
        place = out or Path(f"{name}-results.json")
        _tasks(model, tasks, place, tasks_path, apply_chat_template, device, overwrite, output)
        return
    if prompts is None:
        raise SpecError("give the benchmark's --prompts, or tasks with --lm-eval")
    from expo.evaluation.formats import FORMATS
    from expo.verbs.evaluate import evaluate as run

    place = out or Path(f"{name}-{form}{FORMATS[form].suffix}")
    RESUMABLE.append(place)
    with output.progress("evaluate", unit="answers") as progress, gently():
        result = run(
            model,
            prompts,
            out=place,
            format=form,
            endpoint=endpoint,
            served=served,
            generator=generator,
            preset=decoding.preset,
            settings=decoding.given,
            seed=seed,
            best_of=best_of,
            reward=reward,
            num_beams=num_beams,
            batch_size=batch_size,
            concurrency=concurrency,
            device=device,
            overwrite=overwrite,
            progress=progress,
            say=output.say,
        )
    WRITTEN.append(place)
    for warning in result.warnings:
        output.say(f"warning: {warning}")
    output.result(result, lambda: evaluate_text(result))


def _check_harness(context: click.Context) -> None:
    """Refuse flags that the harness would never see."""
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name not in _HARNESS:
            raise SpecError(
                f"{option.opts[0]}: not with --lm-eval, which brings its own prompts and settings"
            )


def evaluate_text(result: "EvaluateResult") -> str:
    """What was written, and what can be said of it."""
    lines = [
        f"{result.out}: {result.prompts} answers of {result.generator} in the form of {result.format}",
        f"mean length {number(result.length, '.1f')} tokens, {percent(result.unfinished_share)} unfinished",
    ]
    if result.reward is not None:
        kept = f"best of {result.candidates}" if result.candidates > 1 else "mean"
        first = (
            ""
            if result.candidates == 1
            else f"; the first answers alone {number(result.first_reward)}"
        )
        lines.append(
            f"reward {number(result.reward.mean)} ({kept}), 95 % interval "
            f"{number(result.reward.low)} to {number(result.reward.high)}{first}"
        )
    return "\n".join(lines)


def _tasks(
    model: str,
    tasks: str,
    out: Path,
    tasks_path: Path | None,
    apply_chat_template: bool,
    device: str | None,
    overwrite: bool,
    output: Output,
) -> None:
    from expo.verbs.evaluate_tasks import evaluate_tasks

    scores = evaluate_tasks(
        model,
        tasks.split(","),
        out=out,
        tasks_path=tasks_path,
        apply_chat_template=apply_chat_template,
        device=device,
        overwrite=overwrite,
    )
    output.wrote(out, "expo publish takes it with --results")
    output.result(scores, lambda: scores_text(scores))


def scores_text(scores: "tuple[Score, ...]") -> str:
    rows = [
        (
            score.dataset,
            score.metric,
            number(score.value),
            "–"
            if score.interval is None
            else f"{score.interval[0]:.4g} to {score.interval[1]:.4g}",
        )
        for score in scores
    ]
    return table(("task", "metric", "value", "95 % interval"), rows)
