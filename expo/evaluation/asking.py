"""Every prompt answered, turn by turn, as often as candidates are wanted."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from expo.evaluation.answers import Answer, Question, Reply
from expo.evaluation.journal import Answers
from expo.sampling.prompts import Prompt
from expo.sampling.rewards import Reward
from expo.threads import side_by_side

_SCORED_AT_ONCE = 64  # what an interruption costs

Progress = Callable[[int, int], None]


class Source(Protocol):
    """Where answers come from: a server, or a model in this process.

    It takes `batch_size` prompts at once, from `threads` side by side. `parts` decide the answers.
    """

    @property
    def name(self) -> str: ...
    @property
    def parts(self) -> dict[str, str]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def threads(self) -> int: ...

    def ask(
        self, prompts: Sequence[Prompt], *, settings: Mapping[str, float], seed: int
    ) -> list[Reply]: ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse what cannot be answered before anything is, where that is known."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def ask_all(
    questions: Sequence[Question],
    source: Source,
    *,
    seed: int,
    answers: Answers,
    progress: Progress | None = None,
) -> None:
    """Answer what `answers` does not hold yet. Each is there for good when it is done."""
    wanted = [q for q in questions if (q.prompt.id, q.candidate) not in answers.found]
    if wanted:
        source.check([question.prompt for question in questions if not question.candidate])
    batches = [*_batches(wanted, source.batch_size)]

    def work(batch: tuple[Question, ...]) -> int:
        for answer in answered(batch, source, seed=seed):
            answers.add(answer)
        return len(batch)

    done = 0
    # A model computes in this thread: others are held to one core.
    counts = (
        map(work, batches) if source.threads == 1 else side_by_side(work, batches, source.threads)
    )
    for count in counts:
        done += count
        if progress:
            progress(done, len(wanted))


def answered(batch: Sequence[Question], source: Source, *, seed: int) -> Iterator[Answer]:
    """The conversations of a batch, all of one setting."""
    replies: list[list[Reply]] = [[] for _ in batch]
    while asked := [i for i, q in enumerate(batch) if len(replies[i]) <= len(q.prompt.later)]:
        turns = [batch[i].turn(replies[i]) for i in asked]
        for i, reply in zip(
            asked, source.ask(turns, settings=batch[0].settings, seed=seed), strict=True
        ):
            replies[i].append(reply)
    for question, said in zip(batch, replies, strict=True):
        yield Answer(question.prompt, question.candidate, tuple(said), time.time())


def score_all(answers: Answers, reward: Reward, *, by: str) -> None:
    """Give every answer that has none its reward."""
    wanted = [key for key in answers.found if key not in answers.scored]
    for begin in range(0, len(wanted), _SCORED_AT_ONCE):
        keys = wanted[begin : begin + _SCORED_AT_ONCE]
        of = [answers.found[key] for key in keys]
        values = reward([answer.asked for answer in of], [answer.text for answer in of])
        for key, value in zip(keys, values, strict=True):
            answers.score(key, value, by)


def best(answers: Answers, prompt: Prompt, candidates: int) -> Answer:
    """The answer with the highest reward, the first of equals."""
    of = [answers.rewarded((prompt.id, candidate)) for candidate in range(candidates)]
    return max(of, key=lambda answer: -math.inf if answer.reward is None else answer.reward)


def _batches(questions: Sequence[Question], size: int) -> Iterator[tuple[Question, ...]]:
    """Questions of one setting together."""

    def setting(question: Question) -> list[tuple[str, float]]:
        return sorted(question.settings.items())

    for _, group in groupby(sorted(questions, key=setting), key=setting):
        of = tuple(group)
        yield from (of[begin : begin + size] for begin in range(0, len(of), size))
