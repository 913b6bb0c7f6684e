"""`--join` and `--worker I/N`: several processes make one output, on one machine or on many that see the same disk."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from expo.compute.inputs import fetch
from expo.compute.stream import Progress, Tuning
from expo.distribution.share import Share
from expo.distribution.shared import SharedStaging, Turns, placing
from expo.distribution.working import Team
from expo.errors import BusyError, CheckpointError, OutputError, SpecError
from expo.output.claim import check_out, staging_of
from expo.output.durable import is_of_the_process, unwritable
from expo.output.journal import Fingerprint, fingerprint
from expo.output.manifest import Identities, Manifest
from expo.output.staging import Hold, Staging
from expo.planning.one_file import placed
from expo.planning.plan import Plan
from expo.results import MergeResult, WorkerResult
from expo.verbs.producing import check_space, needed_bytes
from expo.verbs.running import (
    check_plan,
    known_identities,
    merge_result,
    placed_manifest,
    run_plans,
)

Say = Callable[[str], None]
Place = Callable[[Sequence["Part"]], object]
"""Verifies and places outputs whose shards are all there."""

Turn = Callable[[Path], AbstractContextManager[bool]]
"""Whether it is this process that places what a staging directory becomes."""

_POLL_SECONDS = 0.2
_GONE_SECONDS = 60.0
"""So long may a network filesystem show an old state; a staging directory that is gone longer did not become OUT."""


@dataclass(frozen=True)
class Part:
    """One output, what its inputs are known by, and the fingerprint that all who make it have in common."""

    plan: Plan
    out: Path
    known: Identities
    print_: Fingerprint

    @property
    def manifest(self) -> Manifest | None:
        """OUT's, once it is the output of this very plan."""
        try:
            return placed_manifest(self.out, self.print_)
        except BusyError:
            return None  # it is on its way


def join_plans(
    plans: Sequence[Plan],
    outs: Sequence[Path],
    *,
    share: Share | None = None,
    overwrite: bool = False,
    hash_inputs: bool = False,
    verify: bool = False,
    tuning: Tuning = Tuning(),
    progress: Progress | None = None,
    checking: Progress | None = None,
    say: Say | None = None,
) -> tuple[MergeResult, ...] | WorkerResult:
    """As `run_plans`, together with every other process that does the same.

    Without a `share` shards are claimed by locks, and all processes come back when OUT is placed, by one of them.
    With one no locks are needed: a process comes back when its share is computed, and those that find all
    shares computed when one of them has placed OUT. Any may die and be run again; the bytes are those of one process.

    Raises:
        SpecError: the merge takes mergekit's engine, which knows no shards.
        CheckpointError, OutputError: as `run_plans`; the staging directory holds the work of another plan, or
            another process gave the merge up.
    """
    started = time.monotonic()
    say = say or (lambda _: None)
    parts = _parts(plans, outs, tuning.backend, hash_inputs=hash_inputs)

    def place(left: Sequence[Part], hold: Hold = Hold.UNLOCKED) -> None:
        run_plans(
            [part.plan for part in left],
            [part.out for part in left],
            overwrite=overwrite,
            known=left[0].known,
            verify=verify,
            tuning=tuning,
            progress=progress,
            checking=checking,
            hold=hold,
        )

    for part in _left(parts):
        _check_out(part, overwrite=overwrite)
    with _faults(parts, removes=share is None):
        if share is None:
            with _team(parts, None, overwrite, tuning, progress) as team:
                team.work_to_the_end(lambda n: say(f"waiting for {_shards(n)} of other workers"))
            _place_in_turn(parts, placing, partial(place, hold=Hold.IN_TURN), say)
        else:
            with _team(parts, share, overwrite, tuning, progress) as team:
                team.work(filter(share.has, team.left()))
                missing = len(team.left())
            if missing:
                return WorkerResult(tuple(outs), str(share), len(plans[0].shards), missing)
            _place_in_turn(parts, Turns(str(share)).turn, place, say)
    seconds = time.monotonic() - started
    return tuple(_result(part, seconds) for part in parts)


def _parts(
    plans: Sequence[Plan], outs: Sequence[Path], backend: str, *, hash_inputs: bool
) -> list[Part]:
    outs = [out.resolve() for out in outs]
    plans = [placed(plan, out) for plan, out in zip(plans, outs, strict=True)]
    for plan in plans:
        check_plan(plan, hash_inputs=hash_inputs)
        if plan.request.foreign is not None:
            why = plan.request.foreign.reasons[0]
            raise SpecError(
                f"several processes share the work by shards, and this merge takes mergekit's engine ({why}), which "
                "makes all at once: leave out --join or --worker"
            )
    fetch(plans[0])
    known = known_identities(plans[0], hash_inputs=hash_inputs)
    return [
        Part(plan, out, known, fingerprint(plan, known, backend))
        for plan, out in zip(plans, outs, strict=True)
    ]


def _left(parts: Sequence[Part]) -> list[Part]:
    """Those that are not placed."""
    return [part for part in parts if part.manifest is None]


def _check_out(part: Part, *, overwrite: bool) -> None:
    try:
        check_out(part.out, part.plan.request, overwrite=overwrite)
    except OutputError as error:
        # it may have been placed just now, or be on its way
        if part.manifest is None and not isinstance(error, BusyError):
            raise


@contextmanager
def _team(
    parts: Sequence[Part],
    share: Share | None,
    overwrite: bool,
    tuning: Tuning,
    progress: Progress | None,
) -> Iterator[Team]:
    """This process's place in the staging directory of every output that is not placed."""
    worker = None if share is None else share.name
    with ExitStack() as stack:
        left = []
        for part in parts:
            if (sink := _entered(part, overwrite, worker)) is not None:
                left.append((part.plan, stack.enter_context(sink)))
        try:
            check_space([(sink, _not_begun(plan, sink)) for plan, sink in left])
        except OutputError:
            stack.close()
            _discard_unless_begun(part.out for part in parts)
            raise
        yield Team(left, tuning=tuning, progress=progress)


def _entered(part: Part, overwrite: bool, worker: str | None) -> SharedStaging | None:
    """This process's part in the making of an output; None when that is placed."""
    while part.manifest is None:
        with suppress(BusyError), ExitStack() as stack:
            sink = stack.enter_context(SharedStaging(part.out, overwrite=overwrite, worker=worker))
            if (
                part.manifest is not None
            ):  # it was placed meanwhile, and this directory is a new one
                sink.leave_empty()
            elif sink.enter(part.print_):
                stack.pop_all()
                return sink
        time.sleep(_POLL_SECONDS)  # without the lock, for which the one that places it waits
    return None


def _not_begun(plan: Plan, sink: SharedStaging) -> int:
    """The bytes of what nobody has begun."""
    done = {shard.file for shard in plan.shards if sink.holds(shard)}
    return needed_bytes(plan, done) - sink.begun_bytes()


@contextmanager
def _faults(parts: Sequence[Part], *, removes: bool) -> Iterator[None]:
    """Say what a fault means. After one of the inputs, the last process to leave `removes` the staging directories.

    A file that is gone is none where OUT has been placed meanwhile: what was computed again is there.
    """
    try:
        yield
    except (CheckpointError, SpecError) as error:
        if removes and not isinstance(error.__cause__, OSError):
            for part in _left(parts):
                with suppress(OutputError), Staging(part.out) as staging:
                    staging.discard()
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and _has_appeared(parts):
            return
        if is_of_the_process(error):
            raise
        raise unwritable(error, parts[0].out, kept="finished shards") from error


def _has_appeared(parts: Sequence[Part]) -> bool:
    """Whether the directories that are gone have become their OUT, which may show only after a while."""
    until = time.monotonic() + _GONE_SECONDS
    while left := _left(parts):
        if all(map(staging_of, (part.out for part in left))) or time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _place_in_turn(parts: Sequence[Part], turn: Turn, place: Place, say: Say) -> None:
    """Place what is not placed, unless another process is at it; then wait, since it may die."""
    waits, gone_since = False, None
    while left := _left(parts):
        try:
            with ExitStack() as stack:
                mine = [part for part in left if stack.enter_context(turn(_folder(part)))]
                if mine:
                    place(mine)
                    continue
            gone_since = None
        except (FileNotFoundError, OutputError) as error:
            if isinstance(error, OutputError) and not isinstance(
                error.__cause__, FileNotFoundError
            ):
                raise
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > _GONE_SECONDS:
                raise OutputError(
                    f"{left[0].out} was given up by the worker that was to place it, whose last line says why: run the "
                    "same command again"
                ) from None
        if not waits:
            say(f"another worker verifies and places {left[0].out.name}")
            waits = True
        time.sleep(_POLL_SECONDS)


def _folder(part: Part) -> Path:
    """The staging directory. Raises FileNotFoundError: it is gone."""
    found = staging_of(part.out)
    if found is None:
        raise FileNotFoundError(part.out)
    return found


def _discard_unless_begun(outs: Iterable[Path]) -> None:
    """Remove staging directories in which there is no shard, and nobody at work."""
    for out in outs:
        with suppress(OutputError, FileNotFoundError), Staging(out, makes=False) as staging:
            if not staging.has_shards:
                staging.discard()


def _result(part: Part, seconds: float) -> MergeResult:
    _discard_unless_begun([part.out])  # who was killed had no time to remove what OUT was before
    manifest = part.manifest
    if manifest is None:
        raise OutputError(
            f"{part.out} was changed by another program after it was placed: run again"
        )
    return merge_result(part.plan, part.out, manifest, seconds)


def _shards(count: int) -> str:
    return "a shard" if count == 1 else f"{count} shards"
