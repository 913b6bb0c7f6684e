"""Two files of answers to the same prompts, with their rewards, pair by pair."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from expo.errors import SpecError
from expo.evaluation.formats import Output, read_outputs, rewards_path
from expo.sampling.prompts import rows_of

_SHOWN = 60


@dataclass(frozen=True)
class Pairs:
    """Rewards and lengths of both sides, prompt by prompt."""

    rewards_a: tuple[float, ...]
    rewards_b: tuple[float, ...]
    lengths_a: tuple[float, ...]
    lengths_b: tuple[float, ...]
    length_unit: Literal["tokens", "characters"]


def read_scored(path: Path, rewards: Path | None) -> tuple[Output, ...]:
    """The answers of a file with their rewards: from `rewards`, from the file, or from the one beside it.

    Raises:
        SpecError: a file cannot be read, there are no rewards, or other numbers of them.
    """
    outputs = read_outputs(path)
    beside = rewards_path(path)
    if rewards is None and beside.exists():
        rewards = beside
    if rewards is None:
        if any(output.reward is None for output in outputs):
            raise SpecError(
                f"{path} has no rewards: give --reward-file for both, or evaluate with --reward"
            )
        return outputs
    values = read_rewards(rewards)
    if len(values) != len(outputs):
        raise SpecError(
            f"{rewards} has {len(values)} rewards, {path} {len(outputs)} answers: one a line, "
            "in the order of the answers"
        )
    return tuple(replace(o, reward=v) for o, v in zip(outputs, values, strict=True))


def read_rewards(path: Path) -> tuple[float, ...]:
    """A number a line, as ExPO's own script writes them, or objects with a `reward`.

    Raises:
        SpecError: the file cannot be read, or a line has no number.
    """
    return tuple(_reward(row, place, path) for place, row in rows_of(path))


def _reward(row: object, place: int, path: Path) -> float:
    value = row.get("reward") if isinstance(row, dict) else row
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{path}:{place}: no reward: give a number, or an object with one")
    return float(value)


def pair(a: Sequence[Output], b: Sequence[Output], *, names: tuple[str, str]) -> Pairs:
    """The two sides by prompt, in the order of a.

    Raises:
        SpecError: a prompt is on one side only, or twice.
    """
    left, right = (_by_prompt(outputs, name) for outputs, name in zip((a, b), names, strict=True))
    for one, other, where in ((left, right, names[1]), (right, left, names[0])):
        if only := next((key for key in one if key not in other), None):
            raise SpecError(
                f"{where} has no answer to {_shown(only)}: a comparison needs the same prompts "
                "on both sides"
            )
    pairs = [(one, right[key]) for key, one in left.items()]
    has_tokens = all(o.length is not None for both in pairs for o in both)

    def column(side: int, value: str) -> tuple[float, ...]:
        return tuple(getattr(both[side], value) for both in pairs)

    def lengths(side: int) -> tuple[float, ...]:
        return (
            column(side, "length") if has_tokens else tuple(float(len(p[side].text)) for p in pairs)
        )

    return Pairs(
        column(0, "reward"),
        column(1, "reward"),
        lengths(0),
        lengths(1),
        "tokens" if has_tokens else "characters",
    )


def _by_prompt(outputs: Sequence[Output], name: str) -> dict[str, Output]:
    found: dict[str, Output] = {}
    for output in outputs:
        if output.key in found:
            raise SpecError(f"{name} answers {_shown(output.key)} twice: leave one out")
        found[output.key] = output
    return found


def _shown(key: str) -> str:
    return json.dumps(key if len(key) <= _SHOWN else f"{key[:_SHOWN]}…", ensure_ascii=False)
