"""The verdict in words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from expo.results import Paired, SweepPoint, Verdict
from expo.spec.request import both_conventions


def in_words(verdict: Verdict, points: Sequence[SweepPoint], *, was_chosen: bool) -> Verdict:
    """The verdict with its text: what to publish, how sure that is, and what else changed."""
    first = _won(verdict) if verdict.beats else _not_won(verdict, points, was_chosen=was_chosen)
    beside = "; ".join(_beside(verdict))
    return replace(verdict, text=" ".join([first, f"Beside it: {beside}.", *_warnings(verdict)]))


def name(at: Mapping[str, float]) -> str:
    """A candidate, an α in both conventions."""
    if at.keys() == {"alpha"}:
        return both_conventions(at["alpha"])
    return ", ".join(f"{key}={value:.6g}" for key, value in at.items())


def _won(verdict: Verdict) -> str:
    text = (
        f"{_capital(name(verdict.candidate))} beats {baseline(verdict)}: its reward is higher by "
        f"{interval(verdict.difference)} on {verdict.prompts} prompts that it was not chosen on."
    )
    if verdict.candidate != verdict.best:
        text += (
            f" It is the nearest to {baseline(verdict)} within one standard error of the best, "
            f"{name(verdict.best)}."
        )
    return text


def _not_won(verdict: Verdict, points: Sequence[SweepPoint], *, was_chosen: bool) -> str:
    kind = "alpha" if "alpha" in verdict.at else "candidate"
    start = f"No {kind} beats {baseline(verdict)}"
    beyond = [p for p in points if p.difference and (p.alpha is None or p.alpha > 1)]
    one = f"{name(verdict.candidate)}, " + (
        "chosen on one half" if was_chosen else "the best of the others"
    )
    by = f"by {interval(verdict.difference)} on the other {verdict.prompts}"
    if beyond and all(p.difference is not None and p.difference.high < 0 for p in beyond):
        which = f"every {kind} {'above 1 ' if kind == 'alpha' else ''}that was tried is worse"
        return f"{start}: {which}; {one}, differs {by} prompts."
    if verdict.difference.low > 0:
        return _kept(verdict, points)
    if not verdict.detectable and verdict.difference.mean:
        return (
            f"{start} on these prompts: {one}, differs by {verdict.difference.mean:+.3g} on every one of the "
            f"other {verdict.prompts}."
        )
    if not verdict.detectable:
        same = f"{name(verdict.candidate)} and {baseline(verdict)} are worth the same on every one"
        return f"{start} on these prompts: {same}, so they cannot tell: ask others, or sample the answers."
    return (
        f"{start} on these prompts: {one}, differs {by}, which would have shown a difference of "
        f"{verdict.detectable:.3g}."
    )


def _kept(verdict: Verdict, points: Sequence[SweepPoint]) -> str:
    """The baseline was chosen on one half, and another does better on the other."""
    is_best = verdict.best == verdict.at
    near = "" if is_best else f"within one standard error of the best, {name(verdict.best)}, "
    why = f"it was {'the best ' if is_best else near}on the half that chooses"
    beyond = any(p.beyond_cliff for p in points if p.at == verdict.candidate)
    end = "but lies beyond the cliff" if beyond else "which more prompts would decide"
    return (
        f"{_capital(baseline(verdict))} is kept: {why}. {_capital(name(verdict.candidate))} does better on the "
        f"other half, by {interval(verdict.difference)} on {verdict.prompts} prompts, {end}."
    )


def _beside(verdict: Verdict) -> list[str]:
    parts = []
    if verdict.second_reward is not None:
        parts.append(f"second reward {interval(verdict.second_reward)}")
    if verdict.at_matched_length is not None:
        parts.append(f"reward at matched length {interval(verdict.at_matched_length)}")
    parts.append("length {:.0f} → {:.0f} tokens".format(*verdict.length))
    parts.append(f"unfinished {_shares(verdict.unfinished)}")
    parts.append(f"repetition {_shares(verdict.repetition)}")
    if verdict.accuracy is not None and verdict.accuracy_difference is not None:
        right = f"accuracy {_shares(verdict.accuracy)}"
        parts.append(f"{right} ({interval(verdict.accuracy_difference)})")
    return parts


def _warnings(verdict: Verdict) -> list[str]:
    """What speaks against a candidate that beats the baseline."""
    said = []
    if verdict.beats and verdict.second_reward is not None and verdict.second_reward.high < 0:
        said.append("The second reward says the opposite.")
    if verdict.beats and verdict.at_matched_length and verdict.at_matched_length.low <= 0:
        said.append("At matched length the gain is not shown.")
    if verdict.accuracy_difference is not None and verdict.accuracy_difference.high < 0:
        said.append("Fewer answers are right.")
    return said


def interval(value: Paired) -> str:
    return f"{value.mean:+.3g} [{value.low:+.3g}, {value.high:+.3g}]"


def _shares(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f} % → {100 * pair[1]:.1f} %"


def baseline(verdict: Verdict) -> str:
    """What all are held against."""
    return "the aligned model" if "alpha" in verdict.at else "the spec as it is"


def _capital(text: str) -> str:
    """For the start of a sentence; the place of a number in a spec stays as it is written there."""
    return text if "=" in text else text[:1].upper() + text[1:]
