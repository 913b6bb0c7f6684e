"""What a run has been answered so far: one JSON line an answer, beside the file that it will become.

First what decides the answers, then every answer, then what a reward model gave it. A line counts once
it is complete, so a torn last line costs one answer.
"""

import fcntl
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from expo.errors import OutputError
from expo.evaluation.answers import Answer, FinishReason, Reply
from expo.output.durable import unwritable
from expo.output.journal import Fingerprint
from expo.sampling.prompts import Prompt

Key = tuple[str, int]
"""A prompt's name and the number of the candidate."""


class Answers:
    """The answers that are there. Any thread may add one."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path, self._lock = file, path, threading.Lock()
        self.found: dict[Key, Answer] = {}
        self.scored: dict[Key, float] = {}

    def add(self, answer: Answer) -> None:
        key = (answer.prompt.id, answer.candidate)
        replies = [[reply.text, reply.length, reply.finish_reason] for reply in answer.replies]
        self._write({"key": key, "replies": replies, "time": answer.time})
        self.found[key] = answer

    def score(self, key: Key, reward: float, by: str) -> None:
        self._write({"key": key, "reward": reward, "by": by})
        self.scored[key] = reward

    def load(self, lines: list[bytes], prompts: dict[str, Prompt], by: str | None) -> None:
        """Take over the lines of an earlier run; rewards only by the model that is asked now. What a power
        cut has damaged is asked again."""
        for line in lines:
            with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                self._take(json.loads(line), prompts, by)

    def _take(self, entry: dict, prompts: dict[str, Prompt], by: str | None) -> None:
        prompt, candidate = prompts[entry["key"][0]], int(entry["key"][1])
        if "replies" in entry:
            replies = tuple(_reply(*reply) for reply in entry["replies"])
            if len(replies) == 1 + len(prompt.later):
                answer = Answer(prompt, candidate, replies, float(entry["time"]))
                self.found[prompt.id, candidate] = answer
        elif entry["by"] == by and math.isfinite(entry["reward"]):
            self.scored[prompt.id, candidate] = entry["reward"]

    def rewarded(self, key: Key) -> Answer:
        return replace(self.found[key], reward=self.scored.get(key))

    def _write(self, entry: dict) -> None:
        try:
            with self._lock:
                self._file.write(json.dumps(entry).encode() + b"\n")
                self._file.flush()
        except OSError as error:
            raise unwritable(error, self._path, kept="the answers so far") from error


def journal_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.expo-answers")


@contextmanager
def open_journal(
    out: Path,
    prompts: tuple[Prompt, ...],
    print_: Fingerprint,
    by: str | None,
    *,
    overwrite: bool = False,
) -> Iterator[tuple[Answers, str]]:
    """The answers of an earlier run with this fingerprint, or none; and what there is to say about it.

    Raises:
        OutputError: the file cannot be written, another run is at it, or it holds answers to another
            question that are not to be overwritten.
    """
    path = journal_path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise unwritable(error, out) from error
    with ExitStack() as stack:
        stack.callback(_close, file)
        _claim(file, out)
        try:
            lines, said = _usable(file, print_, out, overwrite=overwrite)
        except OSError as error:
            raise unwritable(error, out) from error
        answers = Answers(file, out)
        answers.load(lines, {prompt.id: prompt for prompt in prompts}, by)
        if answers.found:
            said = f"resuming, answered so far: {len(answers.found)}"
        try:
            yield answers, said
        except BaseException:
            if not answers.found:  # nothing to go on from
                path.unlink(missing_ok=True)
            raise


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # what a full disk did not take was said
        file.close()


def _claim(file: IO[bytes], out: Path) -> None:
    """One run a file, by a lock that dies with the process."""
    said = f"{out}: another run is writing it: wait, or name another file"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(said) from error
    if not os.fstat(file.fileno()).st_nlink:  # that run has ended, and taken it away
        raise OutputError(said)


def _usable(
    file: IO[bytes], print_: Fingerprint, out: Path, *, overwrite: bool
) -> tuple[list[bytes], str]:
    """The lines of an earlier run, if it asked for the same, and what is to say. What is of no use is cut off."""
    file.seek(0)
    content = file.read()
    head, *lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
    known, said = _asked(head), ""
    if known == print_.parts:
        file.truncate(len(head) + sum(map(len, lines)))
        return lines, said
    if lines and known is None:
        said = "the answers so far cannot be read: starting afresh"
    elif lines and known is not None:
        said = f"the answers so far were to other {print_.difference(known)}"
        if not overwrite:
            raise OutputError(f"{out}: {said}: name another file, or add --overwrite")
    file.truncate(0)
    file.write(json.dumps({"answers": print_.parts}).encode() + b"\n")
    file.flush()
    return [], said


def _asked(head: bytes) -> dict[str, str] | None:
    """What the first line says that was asked for."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        known = json.loads(head)["answers"]
        return known if isinstance(known, dict) else None
    return None


def _reply(text: str, length: int | None, finish: FinishReason) -> Reply:
    """One from a journal.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(text, str) or not isinstance(length, int | None):
        raise TypeError(text, length)
    return Reply(text, length, finish)
