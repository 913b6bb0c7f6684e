"""What a node of a Ray cluster does: one shard of a merge that is planned again there. Imports no Ray."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import expo
from expo.checkpoint.sidecars import JOURNAL
from expo.compute.inputs import fetch
from expo.compute.stream import Tuning, stream
from expo.distribution.shared import SharedStaging
from expo.errors import CheckpointError, ExpoError, OutputError
from expo.output.claim import staging_of
from expo.output.journal import Fingerprint, fingerprint, identities
from expo.output.sink import FinishedShard
from expo.planning.build import build_plan
from expo.planning.one_file import placed
from expo.planning.plan import Plan
from expo.spec.request import Request

_TELL_SECONDS = 0.5

Tell = Callable[[int, int], object]
"""Called with the number of a shard, and how many of its bytes are written."""


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common: requests, places and fingerprints of its outputs.

    Names of models may be paths from `directory`. `tuning` has no device: a task opens its own of the kind `device`.
    """

    version: str
    directory: Path
    requests: tuple[Request, ...]
    outs: tuple[Path, ...]
    prints: tuple[Fingerprint, ...]
    tuning: Tuning
    device: str | None = None


@dataclass(frozen=True)
class Task:
    """A shard, by its number, and the outputs, by theirs, that lack it."""

    number: int
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """What has failed on a node; of its system where it may succeed on another."""

    text: str
    is_of_system: bool


def compute(job: Job, task: Task, tell: Tell) -> list[FinishedShard] | Fault:
    """Compute one shard into the staging directory of every output that lacks it."""
    try:
        return _computed(job, task, tell)
    except (ExpoError, OSError, MemoryError) as error:
        cause = error.__cause__ if isinstance(error, ExpoError) else error
        text = f"node {socket.gethostname()}: {str(error) or type(error).__name__}"
        return Fault(text, isinstance(cause, OSError | MemoryError))


def _computed(job: Job, task: Task, tell: Tell) -> list[FinishedShard]:
    if job.version != expo.__version__:
        raise OutputError(
            f"has expo {expo.__version__}, the driver {job.version}: install one version"
        )
    tuning, plans = _begun(job)
    told = 0.0

    def tick(written: int, _total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            tell(task.number, written)

    with _entered(job, task) as sinks:
        done = stream(
            [plans[output] for output in task.wanted],
            sinks,
            shards=[task.number],
            tuning=tuning,
            progress=tick,
        )
    return [shard for shards in done for shard in shards]


_BEGUN: dict[tuple[str, ...], tuple[Tuning, list[Plan]]] = {}
"""Of the last merge: a process computes several of its shards, and reads its headers once."""


def _begun(job: Job) -> tuple[Tuning, list[Plan]]:
    """How to run here, and the driver's plans, of inputs that are the driver's."""
    key = tuple(print_.digest for print_ in job.prints)
    if key not in _BEGUN:
        _BEGUN.clear()
        opened = Tuning.on(job.device).device
        tuning = replace(job.tuning, device=opened)
        _BEGUN[key] = tuning, _planned(job, tuning.backend)
    return _BEGUN[key]


def _planned(job: Job, backend: str) -> list[Plan]:
    with suppress(OSError):  # a node may lack it, and need it only for what is named from there
        os.chdir(job.directory)
    first = build_plan(job.requests[0])
    others = (first.at(r.alpha) for r in job.requests[1:] if r.alpha is not None)
    plans = [placed(plan, out) for plan, out in zip((first, *others), job.outs, strict=True)]
    fetch(first)
    for plan, print_ in zip(plans, job.prints, strict=True):
        if changed := fingerprint(plan, identities(plan), backend).difference(print_.parts):
            raise CheckpointError(
                f"sees other inputs than the driver ({changed} differ): give all nodes the same"
            )
    return plans


@contextmanager
def _entered(job: Job, task: Task) -> Iterator[list[SharedStaging]]:
    """This task's part in the making of every output that lacks the shard."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(_part(job.outs[output], job.prints[output], f"ray-{task.number}"))
            for output in task.wanted
        ]


def _part(out: Path, print_: Fingerprint, worker: str) -> SharedStaging:
    folder = staging_of(out)
    if folder is None or not (folder / JOURNAL).exists():
        raise OutputError(
            f"does not see what the driver has begun for {out}: name an OUT on a disk that all nodes share"
        )
    sink = SharedStaging(out, worker=worker)
    sink.enter(print_)
    return sink
