"""`--engine ray`: a task a shard on the nodes of a Ray cluster, which all see the staging directory.

The driver is a run like any other, whose engine this is: it holds OUT, and verifies and places it. Every task enters
what it has finished in a journal of its own, so that all of it outlives the driver: the next run goes on from there.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import NodeDiedError, RayError, RaySystemError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import expo
from expo.compute.stream import Progress, Tuning
from expo.distribution.ray_task import Fault, Job, Task, compute
from expo.errors import CheckpointError, ExpoError, OutputError
from expo.output.journal import fingerprint, identities
from expo.output.sink import FinishedShard
from expo.output.staging import Staging
from expo.planning.plan import Plan

Done = list[dict[str, FinishedShard]]
"""By output, the shards that are finished, by file."""

_POLL_SECONDS = 0.5
_REACHED_SECONDS = 10.0
_NOT_IMPORTED = "The remote function failed to import"
_TRIES = 3
"""Of a shard that the disk, the network or the memory of a node fails. Nodes may be lost any number of times."""


class RayEngine:
    """Runs plans into the staging directories of their outputs, as `stream` does, on the nodes of a cluster.

    Use as a context manager: leaving ends its tasks. Meanwhile stdout is silent: Ray prints there what becomes of
    nodes, thirty lines each, which is said in one here, and stdout is for data.
    """

    def __init__(
        self, address: str | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Connect to a cluster.

        Args:
            address: HOST:PORT of the cluster's head, or "auto"; None starts one on this machine, unless RAY_ADDRESS names one.
            say: called with what happens to nodes.

        Raises:
            ExpoError: there is no such cluster.
        """
        self._say = say
        with ExitStack() as stack:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            _connect(address)
            stack.callback(ray.shutdown)
            self._open = stack.pop_all()

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(
        self,
        plans: Sequence[Plan],
        sinks: Sequence[Staging],
        *,
        finished: Sequence[Sequence[FinishedShard]],
        tuning: Tuning,
        progress: Progress | None,
    ) -> list[list[FinishedShard]]:
        """As `stream`.

        Raises:
            CheckpointError, OutputError: what has failed on a node, and on which.
        """
        done = [{shard.file: shard for shard in shards} for shards in finished]
        job = Job(
            version=expo.__version__,
            directory=Path.cwd(),
            requests=tuple(plan.request for plan in plans),
            outs=tuple(sink.out for sink in sinks),
            prints=tuple(fingerprint(plan, identities(plan), tuning.backend) for plan in plans),
            tuning=replace(tuning, device=None),
            device=None if tuning.device is None else tuning.device.place.type,
        )
        tally = _Tally(sum(plan.write_bytes for plan in plans), done, progress)
        for task, shards in self._run(job, _tasks(plans, done), tally):
            for output, shard in zip(task.wanted, shards, strict=True):
                done[output][shard.file] = shard
        return [[d[shard.file] for shard in p.shards] for p, d in zip(plans, done, strict=True)]

    def _run(
        self, job: Job, tasks: Sequence[Task], tally: "_Tally"
    ) -> Iterator[tuple[Task, list[FinishedShard]]]:
        """Every task with what it gave, as they end."""
        how = {
            "num_cpus": _processors(job.tuning.threads),
            "num_gpus": 0 if job.device is None else 1,
            "scheduling_strategy": "SPREAD",
            "max_retries": 0,
        }
        remote, common = ray.remote(_compute).options(**how), ray.put(job)
        under_way = {remote.remote(common, task, tally.actor): (task, 1) for task in tasks}
        nodes = _nodes()
        try:
            while under_way:
                ready, _ = ray.wait(list(under_way), timeout=_POLL_SECONDS)
                tally.tell()
                before, nodes = nodes, _nodes()
                if gone := before - nodes:
                    self._say(lost(len(gone), len(nodes)))
                for reference in ready:
                    task, tries = under_way.pop(reference)
                    result = _result(reference)
                    if isinstance(result, list):
                        yield task, result
                        continue
                    if result is not None:
                        if tries == _TRIES or not result.is_of_system:
                            raise _error(result)
                        self._say(f"{result.text}; trying again")
                    again = remote.remote(common, task, tally.actor)
                    under_way[again] = task, tries + (result is not None)
        finally:
            _end(list(under_way))


def _compute(job: Job, task: Task, tally: ActorHandle) -> list[FinishedShard] | Fault:
    """On a node: as `ray_task.compute`."""
    return compute(job, task, tally.tell.remote)


def lost(gone: int, left: int) -> str:
    """What is said of nodes that are no longer there."""
    what = "a node is" if gone == 1 else f"{gone} nodes are"
    return f"{what} gone, {left} left: what was computed there is computed again"


def _end(under_way: list[ray.ObjectRef]) -> None:
    """Have no task write any more: the staging directory may go now."""
    for reference in under_way:
        ray.cancel(reference, force=True)
    if under_way:
        ray.wait(under_way, num_returns=len(under_way), timeout=_REACHED_SECONDS)


def _result(reference: ray.ObjectRef) -> list[FinishedShard] | Fault | None:
    """What a task gave; None where its node is lost. A mistake in expo stays what it is."""
    try:
        return ray.get(reference)
    except NodeDiedError:
        return None
    except RayTaskError as error:
        if not (isinstance(error.cause, RaySystemError) or _NOT_IMPORTED in str(error)):
            raise error.as_instanceof_cause() from None
        why = str(error).strip().splitlines()[-1]
        what = f"a node cannot run expo ({why}): install expo {expo.__version__} on all nodes"
        return Fault(what, is_of_system=True)
    except RayError as error:  # its process has died, of memory as a rule
        said = str(error).strip().splitlines() or [type(error).__name__]
        return Fault(f"a process of a node has ended: {said[0]}", is_of_system=True)


def _tasks(plans: Sequence[Plan], done: Done) -> list[Task]:
    """One for every shard that an output lacks."""
    tasks = []
    for number in range(len(plans[0].shards)):
        both = enumerate(zip(plans, done, strict=True))
        wanted = tuple(n for n, (p, d) in both if p.shards[number].file not in d)
        tasks += [Task(number, wanted)] if wanted else []
    return tasks


def _error(fault: Fault) -> ExpoError:
    """Of an input, which discards the run; or of the system, which keeps what is finished."""
    if fault.is_of_system:
        return OutputError(f"{fault.text}; finished shards are kept, run the same command again")
    return CheckpointError(fault.text)


class _Written:
    """An actor: how many bytes of every shard are written."""

    def __init__(self) -> None:
        self._written: dict[int, int] = {}

    def tell(self, number: int, written: int) -> None:
        self._written[number] = written

    def written(self) -> int:
        return sum(self._written.values())


class _Tally:
    """The progress of all nodes."""

    def __init__(self, total: int, done: Done, progress: Progress | None) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        made = ray.remote(_Written).options(num_cpus=0, scheduling_strategy=here)
        self.actor: Any = made.remote()
        self._total, self._done, self._progress = total, done, progress
        self._before = self._finished()

    def tell(self) -> None:
        with suppress(RayError):  # progress is not worth a run
            self._tell()

    def _tell(self) -> None:
        if self._progress:
            told: Any = ray.get(self.actor.written.remote())
            written = self._before + told
            self._progress(min(max(written, self._finished()), self._total), self._total)

    def _finished(self) -> int:
        return sum(shard.file_bytes for shards in self._done for shard in shards.values())


def _connect(address: str | None) -> None:
    if address == "":
        raise ExpoError("--address is empty: give the HOST:PORT of the cluster's head, or `auto`")
    if address and "://" in address:
        raise ExpoError(
            f"--address {address}: this process is to be on a machine of the cluster, not a client of it: give its "
            "head's HOST:PORT, or `auto`"
        )
    host, _, port = (address or "").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for a quarter of an hour
            socket.create_connection((host, int(port)), _REACHED_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"at {address}" if address else "on this machine"
        raise ExpoError(f"no Ray cluster {where} ({said}): see `ray status` there") from None


def _nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _processors(threads: int) -> int:
    """What a task takes of a node: as many as it has threads, where every node has so many."""
    known = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min([threads, *filter(None, known)]))
