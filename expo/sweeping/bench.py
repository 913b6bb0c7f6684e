"""The bench: answers of candidates to prompts, and what they are worth, each made once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from expo.sampling.decoding import Decoding
from expo.sampling.generate import Sample, generate
from expo.sampling.live import Live
from expo.sampling.measures import log_likelihoods, repetition
from expo.sampling.prompts import Prompt
from expo.sampling.rewards import Reward
from expo.sweeping.candidates import Candidates, Point
from expo.sweeping.journal import Journal

Chunk = tuple[Prompt, ...]
"""Prompts that are answered in one batch, always the same ones: so a resumed run repeats every bit."""

REWARD, SECOND = "reward", "second_reward"


@dataclass(frozen=True)
class Row:
    """What a candidate came to on one prompt. `length` is in tokens, `log_likelihood` of the answer under
    the baseline in nats a token."""

    reward: float
    second_reward: float | None
    length: int
    unfinished: bool
    repetition: float
    log_likelihood: float


@dataclass
class Bench:
    """A live model that is set to one candidate after the other.

    Args:
        candidates: likelihoods are measured under their baseline.
        rewards: by the names REWARD and SECOND.
        samples, scores: started, with what is in them already.
        tick: called with (answers there are, answers asked for so far).
    """

    live: Live
    candidates: Candidates
    decoding: Decoding
    seed: int
    rewards: Mapping[str, Reward]
    samples: Journal
    scores: Journal
    tick: Callable[[int, int], None] = lambda _done, _total: None
    _answers: dict[tuple[Point, str], Sample] = field(default_factory=dict)
    _rows: dict[tuple[Point, str], Row] = field(default_factory=dict)
    _measured: set[tuple[Point, str]] = field(default_factory=set)
    _asked: int = 0

    @property
    def baseline(self) -> Point:
        return self.candidates.baseline

    def named(self, point: Point) -> dict[str, float]:
        """The point's values by what they are of."""
        return dict(zip(self.candidates.names, point, strict=True))

    def load(self, answers: Sequence[dict], scores: Sequence[dict]) -> None:
        """Take what the journals hold."""
        self._answers |= {self._key(entry): _sample(entry) for entry in answers}
        self._rows |= {self._key(entry): _row(entry) for entry in scores}

    def is_answer(self, entry: dict) -> bool:
        """Whether an entry of a journal is what `load` takes as an answer."""
        return _is_read(self._key, entry) and _is_read(_sample, entry)

    def is_score(self, entry: dict) -> bool:
        """Whether an entry of a journal is what `load` takes as a score."""
        return _is_read(self._key, entry) and _is_read(_row, entry)

    def rows(self, point: Point, chunks: Sequence[Chunk]) -> list[Row]:
        """What `point` came to on the prompts of the chunks; measured before."""
        return [self._rows[point, prompt.id] for chunk in chunks for prompt in chunk]

    def points(self) -> list[Point]:
        """Those that have been measured: asked for in this run, whatever else the journals hold."""
        return sorted({point for point, _ in self._measured})

    def has(self, point: Point, chunks: Sequence[Chunk]) -> bool:
        """Whether `point` has been measured on all of the chunks."""
        return all((point, chunk[0].id) in self._measured for chunk in chunks)

    def measure(self, points: Sequence[Point], chunks: Sequence[Chunk]) -> None:
        """Answer and score what is missing: first all answers, then all likelihoods, so that the weights
        change once a candidate."""
        new = [len(chunk) for p in points for chunk in self._missing(self._answers, p, chunks)]
        self._asked = len(self._answers) + sum(new)
        for point in points:
            for chunk in self._missing(self._answers, point, chunks):
                self._answer(point, chunk)
        for point in points:
            for chunk in self._missing(self._rows, point, chunks):
                self._score(point, chunk)
        self._measured |= {(point, chunk[0].id) for point in points for chunk in chunks}

    def _missing(
        self, known: Mapping[tuple[Point, str], object], point: Point, chunks: Sequence[Chunk]
    ) -> list[Chunk]:
        return [c for c in chunks if any((point, prompt.id) not in known for prompt in c)]

    def _answer(self, point: Point, chunk: Chunk) -> None:
        self.live.set(self.candidates.plan_of(point))
        made = generate(
            self.live.model, self.live.tokenizer, chunk,
            decoding=self.decoding, seed=self.seed, batch_size=len(chunk),
        )  # fmt: skip
        new = [
            (prompt, sample)
            for prompt, sample in zip(chunk, made, strict=True)
            if (point, prompt.id) not in self._answers
        ]
        self._answers |= {(point, prompt.id): sample for prompt, sample in new}
        self.samples.append(
            self._entry(point, prompt, **vars(sample), length=sample.length)
            for prompt, sample in new
        )
        self.tick(len(self._answers), max(self._asked, len(self._answers)))

    def _score(self, point: Point, chunk: Chunk) -> None:
        self.live.set(self.candidates.plan_of(self.baseline))
        samples = [self._answers[point, prompt.id] for prompt in chunk]
        likelihoods = log_likelihoods(self.live.model, self.live.tokenizer, chunk, samples)
        asked, said = [p.messages for p in chunk], [s.text for s in samples]
        values = {name: reward(asked, said) for name, reward in self.rewards.items()}
        second = values.get(SECOND, [None] * len(chunk))
        rows = [
            Row(r, s, a.length, a.finish_reason == "length", repetition(a.tokens), likelihood)
            for r, s, a, likelihood in zip(
                values[REWARD], second, samples, likelihoods, strict=True
            )
        ]
        new = [
            (prompt, row)
            for prompt, row in zip(chunk, rows, strict=True)
            if (point, prompt.id) not in self._rows
        ]
        self._rows |= {(point, prompt.id): row for prompt, row in new}
        self.scores.append(self._entry(point, prompt, **vars(row)) for prompt, row in new)

    def _entry(self, point: Point, prompt: Prompt, **values: object) -> dict[str, object]:
        return {**self.named(point), "prompt": prompt.id, **values}

    def _key(self, entry: dict) -> tuple[Point, str]:
        return tuple(float(entry[name]) for name in self.candidates.names), str(entry["prompt"])


def _sample(entry: dict) -> Sample:
    return Sample(str(entry["text"]), tuple(map(int, entry["tokens"])), entry["finish_reason"])


def _row(entry: dict) -> Row:
    second = entry["second_reward"]
    row = Row(**{name: entry[name] for name in Row.__dataclass_fields__})
    numbers = (
        row.reward,
        0.0 if second is None else second,
        row.length,
        row.repetition,
        row.log_likelihood,
    )
    if not all(map(math.isfinite, numbers)):
        raise ValueError(numbers)
    return row


def _is_read(read: Callable[[dict], object], entry: dict) -> bool:
    try:
        read(entry)
    except (LookupError, TypeError, ValueError, OverflowError):
        return False
    return True
