"""What a run waits for most: the disk, the bus, what is computed, or the hash of the output."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from expo.compute import rates
from expo.compute.stream import Tuning
from expo.operators.rules import Keep
from expo.planning.jobs import Blend, MatrixJob, TensorJob
from expo.planning.plan import Plan
from expo.results import Bound, Part

Amounts = Mapping[str, float]
"""How much there is to do, by the names of `Bound.rates`."""

_COMPUTED = ("elements", "elements_here", "spectrum", "small_rank")


def measured_bound(plans: Sequence[Plan], tuning: Tuning) -> Bound:
    """What bounds the run of one merge, at one α or at several from one read of the inputs, by rates that are measured
    now, in about a second.

    A matrix counts as one of 1024² would, scaled by m²n or m·n·rank. On a device that is too much: larger ones use
    more of it. Of several models the pair's formula is counted once each, not what their method does beside.

    Raises:
        CheckpointError: an input cannot be read.
    """
    amounts = _amounts(plans, tuning)
    known = _measures(plans[0], tuning)
    found = {name: known[name]() for name in amounts}
    took = Counter({name: amount / found[name] for name, amount in amounts.items()})
    every: dict[Part, float] = {
        "disk": took["disk"],
        "bus": max(took["to_device"], took["from_device"]),
        "compute": sum(took[name] for name in _COMPUTED),
        "hash": took["hash"],
    }
    seconds: dict[Part, float] = {part: value for part, value in every.items() if value}
    limit = max(every, key=every.__getitem__)
    says = _says(limit, is_elementwise=not amounts.keys() & {"spectrum", "small_rank"})
    if "disk" not in seconds:
        says = f"the inputs are not all on this disk, and how fast they come was not measured; of the rest, {says}"
    device = "cpu" if tuning.device is None else str(tuning.device.place)
    return Bound(device, tuning.backend, limit, seconds, found, says)


def _says(limit: Part, *, is_elementwise: bool) -> str:
    match limit:
        case "disk" if is_elementwise:
            return "the disk bounds an elementwise merge: no device makes it faster"
        case "disk":
            return "the disk bounds this run"
        case "bus":
            return "the bus to the device bounds this run: --device cpu does without it"
        case "hash":
            return "the hash of the output bounds this run, on one core: no device makes it faster"
        case "compute":
            return "what is computed bounds this run"


def _amounts(plans: Sequence[Plan], tuning: Tuning) -> Amounts:
    plan, written = plans[0], sum(one.write_bytes for one in plans)
    found = Counter(hash=written)
    if _local_files(plan):
        found["disk"] = plan.read_bytes + written
    for job in plan.jobs:
        if isinstance(job.rule, Blend):
            found.update(_of_job(job, job.rule, len(plans), tuning))
    return {name: amount for name, amount in found.items() if amount}


def _of_job(job: TensorJob, rule: Blend, outputs: int, tuning: Tuning) -> Counter[str]:
    elements = outputs * job.count * len(rule.terms)
    cuts = [(matrix, keep) for matrix in job.matrices for keep in _keeps(matrix, len(rule.terms))]
    found = sum((_of_cut(*cut, outputs) for cut in cuts), Counter[str]())
    if tuning.device is None:
        return found + Counter(elements=elements)
    from expo.compute.device_worker import is_for_device

    if is_for_device(job):  # inputs cross the bus once, whatever the number of outputs
        read = sum(weight.stored.nbytes for weight in rule.weights)
        return Counter(elements=elements, to_device=read, from_device=outputs * job.nbytes)
    lent = outputs * sum(4 * matrix.count for matrix, _ in cuts)
    return found + Counter(elements_here=elements, to_device=lent, from_device=lent)


def _of_cut(matrix: MatrixJob, keep: Keep, outputs: int) -> Counter[str]:
    from expo.operators.decompose import small_rank

    m, n = sorted(matrix.shape)
    rank = small_rank(keep, m, n)
    work = outputs * m * n
    return Counter(spectrum=work * m) if rank is None else Counter(small_rank=work * rank)


def _keeps(matrix: MatrixJob, terms: int) -> list[Keep]:
    """The rule of every cut that is made of it."""
    return [*matrix.result, *([matrix.delta.keep] * terms if matrix.delta else [])]


def _measures(plan: Plan, tuning: Tuning) -> dict[str, Callable[[], float]]:
    """How each rate is found."""
    device, cores = tuning.device, min(tuning.threads, os.cpu_count() or 1)
    blends = [job for job in plan.jobs if isinstance(job.rule, Blend)]
    largest = max(blends, key=lambda job: job.count, default=None)
    side_by_side = cores if device is None else 1
    known = {
        "disk": lambda: rates.disk_rate(_local_files(plan), tuning.threads),
        "hash": rates.hash_rate,
        "spectrum": lambda: rates.matrix_rate(device, small=False) * side_by_side,
        "small_rank": lambda: rates.matrix_rate(device, small=True) * side_by_side,
    }
    if largest is not None:
        known["elements"] = known["elements_here"] = lambda: rates.pair_rate(largest) * cores
    if largest is not None and device is not None:
        known["elements"] = lambda: rates.pair_rate_on(device, largest)
        known["to_device"] = lambda: rates.copy_rate(device, to_device=True)
        known["from_device"] = lambda: rates.copy_rate(device, to_device=False)
    return known


def _local_files(plan: Plan) -> list[Path]:
    """The weight files that are read; none where any of them is not on this disk."""
    inputs = [one for checkpoint in plan.sources.values() for one in checkpoint.inputs()]
    if not all(files.is_local(shard.file) for files, shard in inputs):
        return []
    return list(dict.fromkeys(files.local_path(shard.file) for files, shard in inputs))
