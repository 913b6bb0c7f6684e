"""The directory of a sweep: whose it is, what is kept in it, and what comes out."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from expo.checkpoint.reference import Reference
from expo.errors import OutputError
from expo.output.durable import unwritable
from expo.output.scores import scores_json
from expo.results import Score, SweepResult
from expo.sweeping.journal import Configuration, Journal, difference, is_ours
from expo.sweeping.words import baseline, name

KIND = "expo.sweep/1"
SAMPLES, SCORES = "samples.jsonl", "scores.jsonl"
_OUTCOME = ("sweep.json", "sweep.png", "chosen.yml", "results.json")


def claim(out: Path) -> None:
    """Make the directory, or refuse one that holds something and is no sweep's.

    Raises:
        OutputError: it is a file, or holds others' files.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a directory for the sweep")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, out) from error
    known = out / SAMPLES
    if any(out.iterdir()) and not (known.is_file() and is_ours(known, KIND)):
        raise OutputError(f"{out} holds files that no sweep wrote: name another OUT_DIR")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """The directory as `claim` leaves it; made for nothing, it goes again.

    Raises:
        OutputError: as `claim`.
    """
    is_new = not out.exists()
    claim(out)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # there is something in it
                out.rmdir()
        raise


def resume(
    journal: Journal,
    wanted: Configuration,
    out: Path,
    *,
    is_entry: Callable[[dict], bool],
    overwrite: bool,
    say: Callable[[str], None],
) -> list[dict]:
    """What a journal holds that this sweep may go on from.

    Raises:
        OutputError: it is of another sweep, and not to be overwritten.
    """
    known, entries = journal.read(is_entry)
    if known == wanted:
        if entries:
            say(f"resuming: {len(entries)} answers are there")
        return entries
    if known is not None:
        changed = difference(known, wanted)
        if not overwrite:
            raise OutputError(
                f"{out} holds a sweep that differs in: {changed}: name another OUT_DIR, or add "
                "--overwrite to begin anew"
            )
        say(f"{out} differs in: {changed}: its {len(entries)} answers go, the sweep begins anew")
    _forget(out)
    journal.start(wanted)
    return []


def _forget(out: Path) -> None:
    """Remove what came of other answers or rewards: a run that is killed early would leave it beside them."""
    for file in _OUTCOME:
        try:
            (out / file).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(error, out) from error


def rescored(
    journal: Journal,
    wanted: Configuration,
    out: Path,
    *,
    is_entry: Callable[[dict], bool],
    say: Callable[[str], None],
) -> list[dict]:
    """The scores that a journal holds; none where the rewards are others: answers are kept, they are not.

    Raises:
        OutputError: what came of others cannot be removed.
    """
    known, entries = journal.read(is_entry)
    if known == wanted:
        return entries
    if known is not None and entries:
        say(f"differs in: {difference(known, wanted)}: the answers are kept and scored anew")
    _forget(out)
    journal.start(wanted)
    return []


def sweep_json(result: SweepResult, about: dict[str, object]) -> str:
    """The whole sweep: what was asked, every candidate, the verdict."""
    outcome = {
        "baseline": result.baseline,
        "points": [asdict(point) for point in result.points],
        "verdict": asdict(result.verdict),
    }
    return _json({"schema": KIND, **about, **outcome})


def results_json(result: SweepResult, dataset: str, reward: str) -> str:
    """What `expo publish --results` takes, of the half of the prompts that nothing was chosen on.

    Each row names whose it is: the file may come to lie beside a merge of another α.
    """
    verdict = result.verdict
    of = name(verdict.at) if verdict.beats else baseline(verdict)
    rows = [("mean", verdict.reward)]
    if verdict.beats:
        rows.append((f"over {baseline(verdict)}", verdict.difference))
    return scores_json(
        [
            Score(
                dataset,
                f"{reward}, {what}, {verdict.prompts} prompts",
                one.mean,
                interval=(one.low, one.high),
                model=of,
            )
            for what, one in rows
        ]
    )


def lasting(reference: Reference) -> str:
    """A model's name in a spec that holds wherever it is run: a path from the root."""
    places = [place for place in (reference.model, reference.adapter) if place is not None]
    return "+".join(str(p if p.path is None else p.path.absolute()) for p in places)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
