"""The whole way of a sweep, from prompts to a verdict."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expo.errors import SpecError
from expo.results import SweepPoint, Verdict
from expo.sampling.exact import Question, is_right
from expo.sampling.noise import origin
from expo.sampling.prompts import Message, Prompt
from expo.sampling.rewards import Conversation, Reward
from expo.sweeping.bench import Bench, Chunk
from expo.sweeping.candidates import Point, grid
from expo.sweeping.cma import evolve
from expo.sweeping.search import RACE_PROMPTS, survivors, widen
from expo.sweeping.verdict import Answers, choose, judge, rival, summary

LEAST_PROMPTS = 8


def once(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The prompts, of those with the same conversation the first: one that is in both halves would be
    judged by what it was chosen on, one that is twice in a half is no two."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        said = json.dumps([[*map(dict, prompt.messages)], prompt.later], sort_keys=True)
        found.setdefault(said, prompt)
    return tuple(found.values())


def halves(
    prompts: Sequence[Prompt], *, seed: int, batch_size: int
) -> tuple[list[Chunk], list[Chunk]]:
    """The prompts to choose on and those to report on, by lot, in the batches that they are answered in.

    Raises:
        SpecError: there are too few.
    """
    if len(prompts) < LEAST_PROMPTS:
        raise SpecError(
            f"{len(prompts)} prompts are too few: {LEAST_PROMPTS} at least; a hundred show large "
            "differences, a thousand small ones"
        )
    drawn = sorted(prompts, key=lambda prompt: origin(seed, f"half of {prompt.id}"))
    return chunked(drawn[::2], batch_size), chunked(drawn[1::2], batch_size)


def chunked(prompts: Sequence[Prompt], size: int) -> list[Chunk]:
    return [tuple(prompts[n : n + size]) for n in range(0, len(prompts), size)]


@dataclass(frozen=True)
class Search:
    """How candidates are found: `values` by name, every combination of them, or with a `budget` CMA-ES inside
    their ranges; without values α upward from 1."""

    values: Mapping[str, tuple[float, ...]] | None = None
    budget: int | None = None


def search(
    bench: Bench, how: Search, choosing: list[Chunk], held_out: list[Chunk], *, seed: int
) -> list[Chunk]:
    """Try the candidates: a grid on all prompts; otherwise all on some prompts and the survivors on all.

    Returns:
        the prompts that all have been tried on.
    """
    if how.values is not None and how.budget is None:
        bench.measure(sorted({*grid(how.values), bench.baseline}), [*choosing, *held_out])
        return choosing
    few = choosing[: max(1, RACE_PROMPTS // len(choosing[0]))]
    if how.values is None or how.budget is None:
        widen(bench, few)
    else:
        evolve(bench, how.values, few, budget=how.budget, seed=seed)
    bench.measure(survivors(bench, few), [*choosing, *held_out])
    return few


def conclude(
    bench: Bench,
    choosing: list[Chunk],
    held_out: list[Chunk],
    *,
    common: list[Chunk],
    questions: "tuple[Bench, list[Chunk]] | None" = None,
) -> tuple[tuple[SweepPoint, ...], Verdict]:
    """Every point summed up, and the verdict."""
    chosen, best = choose(bench, choosing)
    candidate = rival(bench, chosen, common)
    bench.measure([candidate], held_out)
    points = tuple(summary(bench, p, [*choosing, *held_out]) for p in bench.points())
    verdict = judge(
        bench, points, candidate, chosen=chosen, best=best, held_out=held_out,
        answers=None if questions is None else _answers(*questions, candidate),
    )  # fmt: skip
    return points, verdict


def grader(questions: Sequence[Question]) -> Reward:
    """1 for a right answer, 0 for others, as a reward."""
    by_text = {_text(one.prompt.messages): one.answer for one in questions}

    def grade(asked: Sequence[Conversation], said: Sequence[str]) -> list[float]:
        return [
            float(is_right(text, by_text[_text(messages)]))
            for messages, text in zip(asked, said, strict=True)
        ]

    return grade


def _answers(bench: Bench, chunks: list[Chunk], candidate: Point) -> Answers:
    bench.measure([bench.baseline, candidate], chunks)
    base, other = (
        [r.reward == 1 for r in bench.rows(p, chunks)] for p in (bench.baseline, candidate)
    )
    return base, other


def _text(messages: Sequence[Message]) -> str:
    return messages[-1]["content"]
