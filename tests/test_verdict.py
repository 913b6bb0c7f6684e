"""The verdict on made-up rewards: what is chosen, what is claimed, in which words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expo.errors import SpecError
from expo.results import Verdict
from expo.sampling.decoding import Decoding
from expo.sampling.exact import is_right, read_questions
from expo.sampling.prompts import Prompt
from expo.spec.grid import read_values
from expo.sweeping.bench import Bench, Chunk, Row
from expo.sweeping.candidates import Candidates, Point
from expo.sweeping.run import Search as How
from expo.sweeping.run import conclude, halves, once, search
from expo.sweeping.search import RACE_PROMPTS

Rewards = Callable[[float, np.ndarray], np.ndarray]


class Played(Bench):
    """A bench whose rows are made up: reward, likelihood and unfinished share are functions of α."""

    def __init__(self, rewards: Rewards, count: int, **curves: Callable[[float], float]) -> None:
        nothing: Any = None
        candidates = Candidates(("alpha",), (1.0,), nothing, nothing)
        super().__init__(nothing, candidates, Decoding(), 0, {}, nothing, nothing)
        self.rewards, self.curves, self.asked = rewards, curves, []
        noise = np.random.default_rng(7)
        self.own = dict(enumerate(noise.normal(size=(count, 2))))
        prompts = [Prompt(str(n), ()) for n in range(count)]
        self.choosing, self.held_out = halves(prompts, seed=0, batch_size=16)

    def measure(self, points: list[Point], chunks: list[Chunk]) -> None:  # pyright: ignore
        for point in points:
            new = [chunk for chunk in chunks if not self.has(point, [chunk])]
            self.asked += [(point[0], chunk) for chunk in new]
            self._measured |= {(point, chunk[0].id) for chunk in new}
            for prompt in (p for chunk in chunks for p in chunk):
                drawn = self.own[int(prompt.id)]
                self._rows[point, prompt.id] = Row(
                    float(self.rewards(point[0], drawn)), None, 10,
                    self.curves.get("unfinished", lambda _: 0.0)(point[0]) > 0.5, 0.0,
                    self.curves.get("likelihood", lambda _: -1.0)(point[0]),
                )  # fmt: skip

    def verdict(self, alphas: str = "auto") -> Verdict:
        how = How() if alphas == "auto" else How({"alpha": read_values(alphas)})
        common = search(self, how, self.choosing, self.held_out, seed=0)
        return conclude(self, self.choosing, self.held_out, common=common)[1]


def peak(at: float, height: float, *, noise: float = 0.1) -> Rewards:
    """A parabola through 0 at α = 1, with noise that candidates share and noise of their own."""

    def reward(alpha: float, drawn: np.ndarray) -> np.ndarray:
        rise = height * (1 - ((alpha - at) / (1 - at)) ** 2)
        return rise + drawn[0] + noise * np.sin(40 * alpha + 7 * drawn[1]) * (alpha != 1)

    return reward


def test_the_smallest_within_one_standard_error_is_chosen() -> None:
    verdict = Played(peak(1.5, 0.3), 400).verdict("1:2:0.1")
    assert verdict.best["alpha"] == pytest.approx(1.5, abs=0.11)
    assert verdict.candidate["alpha"] <= verdict.best["alpha"]
    assert verdict.beats
    assert verdict.at == verdict.candidate
    assert verdict.difference.low > 0.2
    assert "beats the aligned model: its reward is higher by +0." in verdict.text
    assert "on 200 prompts that it was not chosen on" in verdict.text


def test_a_plateau_is_left_at_its_start() -> None:
    def flat(alpha: float, drawn: np.ndarray) -> np.ndarray:
        height = min((alpha - 1) / 0.3, 1.0) + 1e-3 * alpha
        return drawn[0] + height + 0.3 * np.sin(1000 * alpha * (drawn[1] + 3))

    verdict = Played(flat, 400).verdict("1:2:0.1")
    assert 1.3 <= verdict.candidate["alpha"] < verdict.best["alpha"]
    assert verdict.beats
    assert "the nearest to the aligned model within one standard error" in verdict.text


def test_no_difference_is_no_victory() -> None:
    verdict = Played(peak(1.5, 0.0, noise=1.0), 64).verdict("1:2:0.1")
    assert not verdict.beats
    assert verdict.at == {"alpha": 1.0}
    assert verdict.text.startswith("No alpha beats the aligned model on these prompts: alpha ")
    assert "which would have shown a difference of" in verdict.text
    assert verdict.detectable == pytest.approx(2.8 * verdict.difference.standard_error, rel=0.01)


def test_prompts_that_cannot_tell_are_named() -> None:
    verdict = Played(lambda alpha, drawn: np.ones(()), 64).verdict("1.2,1.4")
    assert not verdict.beats
    assert "are worth the same on every one, so they cannot tell" in verdict.text


def test_a_constant_difference_is_no_tie() -> None:
    """What is worth the same on every prompt is not what is worse on every one by the same."""
    verdict = Played(lambda a, drawn: np.asarray(-0.2 * (a > 1.3)), 64).verdict("1.2,1.4")
    assert "are worth the same on every one" in verdict.text
    assert verdict.candidate == {"alpha": 1.2}
    worse = Played(lambda a, drawn: np.asarray(-0.2 * (a < 1)), 64).verdict("0.5")
    assert worse.detectable == 0
    assert "differs by -0.2 on every one of the other 32." in worse.text


def test_of_equals_the_nearest_to_the_baseline_leads() -> None:
    verdict = Played(lambda a, drawn: drawn[0] + (a != 1), 64).verdict("-1,1.5")
    assert verdict.best == verdict.candidate == {"alpha": 1.5}


def test_what_does_better_but_was_not_chosen_is_told_so() -> None:
    """Within one standard error on the half that chooses, clearly better on the other."""
    bench = Played(lambda a, drawn: drawn[0], 64)
    chosen_on = {prompt.id for chunk in bench.choosing for prompt in chunk}
    bench.own |= {n: np.array([float(str(n) not in chosen_on), (-1.0) ** n]) for n in range(64)}
    bench.rewards = lambda a, drawn: (a > 1) * (drawn[0] + 0.5 * drawn[1] + 1e-3)
    verdict = bench.verdict("1.5")
    assert not verdict.beats
    assert verdict.difference.low > 0
    assert "No alpha beats" not in verdict.text
    assert verdict.text.startswith("The aligned model is kept: it was ")
    assert "Alpha 1.5 (paper alpha 0.5) does better on the other half, by +1" in verdict.text


def test_a_conversation_counts_once() -> None:
    def asked(name: str, text: str) -> Prompt:
        return Prompt(name, ({"role": "user", "content": text},))

    prompts = [asked(str(n), f"q{n % 5}") for n in range(12)]
    assert [prompt.id for prompt in once(prompts)] == ["0", "1", "2", "3", "4"]
    later = Prompt("x", prompts[0].messages, ("and then?",))
    assert once([prompts[0], later]) == (prompts[0], later)


def test_every_alpha_worse_is_said() -> None:
    verdict = Played(lambda a, drawn: drawn[0] - (a - 1) * 5 + 0.1 * drawn[1] * a, 64).verdict()
    assert verdict.at == {"alpha": 1.0}
    assert verdict.candidate == {"alpha": 1.1}
    assert "every alpha above 1 that was tried is worse" in verdict.text
    assert verdict.difference.high < 0


def test_what_won_by_chance_on_one_half_does_not_beat() -> None:
    """100 sweeps of nothing: the held-out half keeps the promise of its interval."""
    won = 0
    for seed in range(100):
        bench = Played(peak(1.5, 0.0, noise=1.0), 40)
        bench.own = dict(enumerate(np.random.default_rng(seed).normal(size=(40, 2))))
        won += bench.verdict("1:2:0.2").beats
    assert won <= 8  # 2.5 expected


def test_a_race_widens_to_the_peak_and_spares_the_losers() -> None:
    bench = Played(peak(4.0, 2.0), 1000, likelihood=lambda a: -1.0 if a < 6 else -3.0)
    verdict = bench.verdict()
    assert verdict.beats
    assert 3 < verdict.candidate["alpha"] < 5
    tried = {alpha for alpha, _ in bench.asked}
    assert max(tried) < 12
    everything = [a for a in tried if bench.has((a,), [*bench.choosing, *bench.held_out])]
    assert len(everything) < len(tried) / 2
    raced = sum(len(chunk) for alpha, chunk in bench.asked if alpha == 1.1)
    assert RACE_PROMPTS - 16 < raced <= RACE_PROMPTS


@pytest.mark.parametrize("curve", ["likelihood", "unfinished"])
def test_the_cliff_bounds_the_choice(curve: str) -> None:
    """A reward that loves what lies beyond the cliff does not decide."""
    cliff = {"likelihood": lambda a: -1.0 if a < 1.45 else -2.0, "unfinished": lambda a: a > 1.45}
    bench = Played(lambda a, drawn: drawn[0] + a, 64, **{curve: cliff[curve]})
    verdict = bench.verdict()
    assert verdict.candidate == {"alpha": 1.4}
    assert {alpha for alpha, _ in bench.asked} == {1.0, 1.1, 1.2, 1.3, 1.4, 1.5}


def test_halves_are_drawn_by_lot_and_stay() -> None:
    prompts = [Prompt(str(n), ()) for n in range(41)]
    choosing, held_out = halves(prompts, seed=3, batch_size=8)
    ids = [[p.id for chunk in half for p in chunk] for half in (choosing, held_out)]
    assert sorted(ids[0] + ids[1]) == sorted(p.id for p in prompts)
    assert {len(ids[0]), len(ids[1])} == {20, 21}
    assert halves(prompts[::-1], seed=3, batch_size=8) == (choosing, held_out)
    assert halves(prompts, seed=4, batch_size=8) != (choosing, held_out)
    with pytest.raises(SpecError, match="7 prompts are too few: 8 at least"):
        halves(prompts[:7], seed=0, batch_size=8)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1.0:1.6:0.1", (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)),
        ("0:1:0.3", (0.0, 0.3, 0.6, 0.9)),
        ("1.5,1,1.5,-2", (-2.0, 1.0, 1.5)),
        ("1.3", (1.3,)),
    ],
)
def test_a_grid(text: str, values: tuple[float, ...]) -> None:
    assert read_values(text) == values


@pytest.mark.parametrize("text", ["", "1:2", "2:1:0.1", "1:2:0", "a", "nan", "1:inf:1", "1:2:-1"])
def test_what_is_no_grid(text: str) -> None:
    with pytest.raises(SpecError, match=r"give first:last:step, like 1\.0:1\.6:0\.1, or 1,1\.2"):
        read_values(text)
    with pytest.raises(SpecError, match="values are more than 200: a larger step"):
        read_values("0:1:0.0001")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("So it is 1,234.", "1234", True),
        ("3 apples and 4 are 7", "7.0", True),
        ("7 is not 8", "7", False),
        ("no number", "7", False),
        ("  The Seine. ", "the seine", True),
        ("The Rhine", "the Seine", False),
        ("about .5", "5", False),
        ("about .5", "0.5", True),
        ("it is 3-5", "5", True),
        ("it is -5", "-5", True),
        ("it is −5.", "-5", True),
        ("version 2.", "2", True),
        ("the end.5", "5", True),
        ("NaN", "nan", True),
        ("inf", "inf", True),
        ("7", "inf", False),
    ],
)
def test_a_right_answer(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) is right


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "a?", "answer": 7}\n{"question": "b?", "answer": "so\\n#### 5"}\n'
    )
    assert [q.answer for q in read_questions(file)] == ["7", "5"]
    file.write_text('{"question": "a?", "answer": 7}\n{"question": "a?", "answer": "7.0"}\n')
    assert len(read_questions(file)) == 2
    file.write_text('{"question": "a?", "answer": 7}\n{"question": "a?", "answer": "8"}\n')
    with pytest.raises(SpecError, match=r"q\.jsonl:2: this question has another answer in a line"):
        read_questions(file)
    file.write_text('{"question": "a?"}')
    with pytest.raises(SpecError, match=r"q\.jsonl:1: no question"):
        read_questions(file)
    file.write_text('{"question": "a?", "answer": 7}')
    with pytest.raises(SpecError, match="holds 1 questions: an accuracy takes two"):
        read_questions(file)
