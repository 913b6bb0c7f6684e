"""Two files of answers to the same prompts, with their rewards, pair by pair."""

import json
import math
from collections import Counter
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
    names, values = read_rewards(rewards)
    if len(values) != len(outputs):
        raise SpecError(
            f"{rewards} has {len(values)} rewards, {path} {len(outputs)} answers: one a line, "
            "in the order of the answers"
        )
    by_name = dict(zip(names, values, strict=True))
    if None not in by_name and by_name.keys() == {
        o.name for o in outputs
    }:  # whatever the order of either file
        return tuple(replace(o, reward=by_name[o.name]) for o in outputs)
    return tuple(replace(o, reward=v) for o, v in zip(outputs, values, strict=True))


def read_rewards(path: Path) -> tuple[tuple[str | None, ...], tuple[float, ...]]:
    """(names, rewards): a number a line, as ExPO's own script writes them, or objects with a `reward` and the
    `id` of the prompt.

    Raises:
        SpecError: the file cannot be read, or a line has no finite number.
    """
    rows = [*rows_of(path)]
    names = tuple(
        str(row["id"]) if isinstance(row, dict) and "id" in row else None for _, row in rows
    )
    return names, tuple(_reward(row, place, path) for place, row in rows)


def _reward(row: object, place: int, path: Path) -> float:
    value = row.get("reward") if isinstance(row, dict) else row
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # of digits without end
        pass
    raise SpecError(f"{path}:{place}: no reward: give a finite number, or an object with one")


def pair(a: Sequence[Output], b: Sequence[Output], *, names: tuple[str, str]) -> Pairs:
    """The two sides by prompt, in the order of a.

    Raises:
        SpecError: a prompt is on one side only, or more often.
    """
    same = _same_names(a, b)
    left, right = _by_prompt(a, same), _by_prompt(b, same)
    for one, other, where in ((left, right, names[1]), (right, left, names[0])):
        if only := next((key for key in one if key not in other), None):
            key, before = only
            which = "no answer" if not before else f"only {before} of the answers"
            raise SpecError(
                f"{where} has {which} to {_shown(key)}: a comparison needs the same prompts "
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


def _same_names(a: Sequence[Output], b: Sequence[Output]) -> frozenset[str]:
    """What both sides were asked under the same names, each given once."""
    left, right = _names(a), _names(b)
    return frozenset(
        key
        for key, names in left.items()
        if names == right.get(key) and None not in names and max(names.values()) == 1
    )


def _names(outputs: Sequence[Output]) -> dict[str, Counter[str | None]]:
    found: dict[str, Counter[str | None]] = {}
    for output in outputs:
        found.setdefault(output.key, Counter())[output.name] += 1
    return found


def _by_prompt(
    outputs: Sequence[Output], same: frozenset[str]
) -> dict[tuple[str, str | int | None], Output]:
    """By what is answered, and of those a benchmark asks twice by name, or how often it was before."""
    asked: Counter[str] = Counter()
    found: dict[tuple[str, str | int | None], Output] = {}
    for output in outputs:
        key = output.key
        found[key, output.name if key in same else asked[key]] = output
        asked[key] += 1
    return found


def _shown(key: str) -> str:
    return json.dumps(key if len(key) <= _SHOWN else f"{key[:_SHOWN]}…", ensure_ascii=False)
