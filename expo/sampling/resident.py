"""Both sides of an ExPO pair kept on the device of the model: a change of α is a few kernels there."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from expo.checkpoint.dtypes import TORCH_NAMES
from expo.compute.stream import tensors
from expo.errors import CheckpointError
from expo.operators.extrapolate import extrapolate
from expo.operators.rounding import round_nearest
from expo.planning.jobs import Blend, TensorJob
from expo.planning.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

Resident = dict[str, "tuple[Tensor, Tensor]"]
"""(base, aligned) by name, as they are read."""

_SHARE = 0.5
"""Of the free memory that both sides may take; answers and a reward model need the rest."""


def has_room(plan: Plan, device: torch.device) -> bool:
    """Whether both sides fit beside the model. On the processor the page cache holds them already."""
    if device.type != "cuda":
        return False
    free = torch.cuda.mem_get_info(device)[0]
    return 2 * sum(job.nbytes for job in plan.jobs) < _SHARE * free


def keep_resident(plan: Plan, slots: "Mapping[str, Tensor]") -> Resident:
    """Both sides of every tensor that is plainly extrapolated into a slot, on the slot's device.

    Read as α = 0 and α = 1, which are copies.
    """
    if plan.request.method != "expo" or plan.request.rounding != "nearest":
        return {}
    names = {job.name for job in plan.jobs if _is_plain(job) and _fits(job, slots)}
    others = {job.name for job in plan.jobs} - names
    sides = zip(
        tensors(without(plan.at(0.0), others)), tensors(without(plan.at(1.0), others)), strict=True
    )
    return {
        name: (base.to(slots[name].device), aligned.to(slots[name].device))
        for (name, base), (_, aligned) in sides
    }


def switch(plan: Plan, resident: Resident, slots: "Mapping[str, Tensor]") -> None:
    """Compute what is resident into its slots: the three operations, in float32, rounded once.

    Raises:
        CheckpointError: a result is not finite.
    """
    finite = []
    for job in plan.jobs:
        if job.name in resident and isinstance(job.rule, Blend):
            base, aligned = (side.float() for side in resident[job.name])
            slot = slots[job.name]
            exact = extrapolate(base, aligned, job.rule.alphas[0])
            round_nearest(exact, slot.dtype, out=slot)
            finite.append(slot.isfinite().all())
    if finite and not bool(torch.stack(finite).all()):
        raise CheckpointError(
            "a weight is not finite at this alpha: expo extrapolate says which; try smaller ones"
        )


def without(plan: Plan, names: Collection[str]) -> Plan:
    """The plan less some of its tensors."""
    if not names:
        return plan
    shards = (
        replace(shard, jobs=tuple(job for job in shard.jobs if job.name not in names))
        for shard in plan.shards
    )
    return replace(plan, shards=tuple(shards))


def _is_plain(job: TensorJob) -> bool:
    """Whether the pair's formula over stored tensors of one dtype is all that there is to it."""
    if not isinstance(job.rule, Blend) or not job.rule.is_extrapolation:
        return False
    read = {weight.read_dtype for weight in job.inputs}
    updated = any(weight.update is not None for weight in job.inputs)
    return read == {job.dtype} and not (job.rows or job.matrices or updated)


def _fits(job: TensorJob, slots: "Mapping[str, Tensor]") -> bool:
    known = (torch.bfloat16, torch.float16, torch.float32)
    dtype = getattr(torch, TORCH_NAMES[job.dtype])
    return job.name in slots and dtype in known and slots[job.name].dtype == dtype
