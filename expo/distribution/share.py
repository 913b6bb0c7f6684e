"""Which shards are a worker's, where the work is divided beforehand: `i/n`, or what a scheduler says of itself."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from expo.errors import SpecError

AUTO = "auto"

_SCHEDULERS = "a SLURM array or step, torchrun, or an indexed Kubernetes job"


@dataclass(frozen=True)
class Share:
    """Worker number `index` of `count`, from 0 on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """What its directory is called."""
        return f"{self.index}-of-{self.count}"

    def has(self, shard: int) -> bool:
        """Whether a shard, by its number, is this worker's."""
        return shard % self.count == self.index


def read_share(text: str, environment: Mapping[str, str] = os.environ) -> Share:
    """`3/8`; `auto`, which asks the environment for both; `auto/8` for the first only.

    Raises:
        SpecError: it is neither, or the environment does not say.
    """
    index, _, count = text.partition("/")
    if index == AUTO:
        return _found(int(count) if _is_number(count) else None, text, environment)
    if not (_is_number(index) and _is_number(count)):
        raise SpecError(f"worker {text!r}: say I/N, like 0/8 … 7/8, or {AUTO}, or {AUTO}/8")
    return _checked(Share(int(index), int(count)))


def _found(count: int | None, text: str, environment: Mapping[str, str]) -> Share:
    """What a scheduler says: the innermost first, since each starts the next."""
    if (count is None and text != AUTO) or count == 0:
        raise SpecError(f"worker {text!r}: say {AUTO}, or {AUTO}/8 for one of 8")
    known = next(filter(None, (find(environment) for find in (_torchrun, _slurm))), None)
    if known is None and "JOB_COMPLETION_INDEX" in environment:
        index = _number(environment, "JOB_COMPLETION_INDEX")
        if count is None:
            raise SpecError(
                f"worker {AUTO}: Kubernetes gives an index and no count: say {AUTO}/N, N being the job's completions"
            )
        known = Share(index, count)
    if known is None:
        raise SpecError(
            f"worker {text!r}: nothing here says which worker this is: {AUTO} knows {_SCHEDULERS}; else say I/N"
        )
    return _checked(Share(known.index, count or known.count))


def _torchrun(environment: Mapping[str, str]) -> Share | None:
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    return Share(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"))


def _slurm(environment: Mapping[str, str]) -> Share | None:
    """An array's tasks, whose numbers may start anywhere and go in steps, times the processes that `srun` starts in
    each. What a batch script itself has (SLURM_PROCID, SLURM_NTASKS) tells of no process beside it."""
    array = step = None
    if "SLURM_ARRAY_TASK_ID" in environment:
        number, first, count = (
            _number(environment, f"SLURM_ARRAY_TASK_{what}") for what in ("ID", "MIN", "COUNT")
        )
        by = "SLURM_ARRAY_TASK_STEP"
        steps = max(_number(environment, by) if environment.get(by) else 1, 1)
        array = Share((number - first) // steps, count)
        if (number - first) % steps or array.index >= count:
            raise SpecError(
                f"worker {AUTO}: the array's numbers are not evenly spaced, so task {number} cannot tell which of "
                f"{count} it is: give an array like 0-{count - 1}, or say I/N"
            )
    if "SLURM_STEP_NUM_TASKS" in environment:
        step = Share(
            _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        )
    if array is None or step is None:
        return array or step
    return Share(array.index * step.count + step.index, array.count * step.count)


def _checked(share: Share) -> Share:
    if share.count == 0:
        raise SpecError(f"worker {share}: there has to be one worker at least, 0/1")
    if not 0 <= share.index < share.count:
        raise SpecError(
            f"worker {share}: of {share.count} workers the numbers are 0 … {share.count - 1}"
        )
    return share


def _number(environment: Mapping[str, str], name: str) -> int:
    found = environment.get(name, "")
    if not _is_number(found):
        what = f"is {found!r}, which is no number" if found else "is not set"
        raise SpecError(f"worker {AUTO}: {name} {what}: say I/N")
    return int(found)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,6}", text) is not None
