"""`expo compare`: how much better one file of answers is than another, and how sure that is."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from expo.cli import options
from expo.cli.output import Output, number, percent
from expo.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from expo.results import CompareResult, Paired


@click.command(
    short_help="Say how much better one file of answers is than another.",
    epilog="""\b
Examples:
  expo compare aligned.jsonl expo.jsonl
  expo compare aligned.json expo.json --reward-file aligned.rewards --reward-file expo.rewards
  expo compare aligned.jsonl expo.jsonl --json
""",
)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--reward-file",
    "rewards",
    type=click.Path(path_type=Path),
    multiple=True,
    help="The rewards of A, and again for those of B: one a line. [default: those of evaluate]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of the random draws behind the interval.",
)
@options.talk
def compare(a: Path, b: Path, rewards: tuple[Path, ...], seed: int, output: Output) -> None:
    """Show how much better the answers B are than the answers A, by their rewards.

    Both are files of expo evaluate, in any of its formats, of answers to the same prompts.
    """
    if len(rewards) not in (0, 2):
        raise SpecError("give --reward-file twice, for A and for B, or not at all")
    from expo.verbs.compare import compare as run

    left, right = rewards or (None, None)
    result = run(a, b, rewards_a=left, rewards_b=right, seed=seed)
    output.result(result, lambda: compare_text(result))


def compare_text(result: "CompareResult") -> str:
    """The verdict first, then what it rests on."""
    unit = result.length_unit
    lines = [
        _verdict(result),
        f"mean reward {number(result.mean_a)} → {number(result.mean_b)} over {result.prompts} prompts",
        f"difference {_interval(result.difference, number)}",
        f"win rate {_interval(result.win_rate, percent)}",
        f"mean length {number(result.length_a, '.1f')} → {number(result.length_b, '.1f')} {unit}",
    ]
    if result.matched_difference is not None and result.matched_win_rate is not None:
        lines += [
            f"at matched length: difference {_interval(result.matched_difference, number)}",
            f"at matched length: win rate {_interval(result.matched_win_rate, percent)}",
        ]
    return "\n".join(lines)


def _verdict(result: "CompareResult") -> str:
    if not result.difference.excludes_zero:
        if result.detectable == 0:
            return "no difference: every prompt has the same reward on both sides"
        return (
            f"no difference shown: {result.prompts} prompts see differences from about "
            f"{number(result.detectable, '.2g')} on"
        )
    word = "better" if result.difference.mean > 0 else "worse"
    matched = result.matched_difference
    if matched is None or (matched.excludes_zero and matched.mean * result.difference.mean > 0):
        return f"{result.b} is {word} than {result.a}"
    return f"{result.b} is {word} than {result.a}, but at matched length no difference is shown"


def _interval(value: "Paired", shown: "Callable[[float], str]") -> str:
    return f"{shown(value.mean)}, 95 % interval {shown(value.low)} to {shown(value.high)}"
