"""Plans of several merges in a row: the later ones are planned on what the earlier ones will give."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from expo.checkpoint.checkpoint import INDEX, Checkpoint
from expo.checkpoint.headers import layout
from expo.checkpoint.sidecars import is_tokenizer_file
from expo.errors import CheckpointError
from expo.planning.build import build_plan
from expo.planning.configuration import configuration
from expo.planning.modules import module_of
from expo.planning.plan import Plan
from expo.spec.request import Request
from expo.spec.stages import Stage
from expo.temporary import temporary_folder

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every tensor, by its name."""


@contextmanager
def planned(
    stages: Sequence[Stage], change: Callable[[Request], Request]
) -> Iterator[tuple[Path, list[Plan]]]:
    """A plan for each stage, up to the first that would be refused, and where the outputs are previewed.

    A preview has all headers and holes for data, so it takes no room; it is gone afterwards.

    Args:
        change: what flags make of a request.
    Raises:
        SpecError, CheckpointError, HubError, TokenizerError: as `build_plan`.
    """
    with temporary_folder() as temporary:
        outputs: dict[str, Path] = {}
        plans: list[Plan] = []
        for stage in stages:
            plan = build_plan(change(stage.request(outputs)))
            plans.append(plan)
            if plan.refusals:
                break
            if stage.name is not None:
                outputs[stage.name] = temporary / stage.name
                _preview(plan, outputs[stage.name])
        yield temporary, plans


def check_all(stages: Sequence[Stage], change: Callable[[Request], Request]) -> None:
    """Plan every stage before the first one runs.

    Raises:
        CheckpointError: a later merge would be refused; others as `build_plan`.
    """
    with planned(stages, change) as (_, plans):
        if plans[-1].refusals:
            raise CheckpointError("; ".join(plans[-1].refusals))


def _preview(plan: Plan, folder: Path) -> None:
    """A directory that looks like the output to whoever reads headers."""
    folder.mkdir()
    donor = plan.donor
    files = dict.fromkeys(donor.tokenizer_files.sizes, donor.tokenizer_files)
    files = {name: at for name, at in files.items() if is_tokenizer_file(name)}
    files |= {sidecar.name: sidecar.files for sidecar in plan.sidecars}
    for name, at in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(at.read(name))
    if "config.json" in donor.files.sizes:
        (folder / "config.json").write_bytes(configuration(plan))
    shards = {shard.file: _of_jobs(plan, shard.file) for shard in plan.shards}
    if plan.request.foreign is not None:
        shards = {"model.safetensors": dict(_restacked(plan))}
    for file, tensors in shards.items():
        _write_holes(folder / file, tensors)
    if len(shards) > 1:
        places = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _of_jobs(plan: Plan, file: str) -> Shapes:
    (shard,) = (shard for shard in plan.shards if shard.file == file)
    return {job.name: (job.dtype, job.shape) for job in shard.jobs}


def _write_holes(path: Path, tensors: Shapes) -> None:
    rows = ((name, dtype, shape) for name, (dtype, shape) in tensors.items())
    header, nbytes = layout(rows, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)


def _restacked(plan: Plan) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """The tensors that mergekit would write: the donor's, with its layers in the order of the slices.

    Where it makes a new vocabulary or a mixture, that is unknown before it runs: the donor's stand in.
    """
    foreign = plan.request.foreign
    assert foreign is not None
    opened = {checkpoint.reference: checkpoint for checkpoint in plan.sources.values()}
    slices = [(opened[foreign.models[model]], span) for model, span in _first_sources(foreign.spec)]
    for name, weight in plan.donor.weights.items():
        if module_of(name)[0] is None or not slices:
            yield name, (weight.dtype, weight.shape)
    number = 0
    for checkpoint, (first, end) in slices:
        for layer in range(first, end):
            yield from _layer(checkpoint, layer, number)
            number += 1


def _first_sources(spec: dict) -> Iterator[tuple[str, tuple[int, int]]]:
    """The first model of every slice, and its layers."""
    modules = spec.get("modules") or {}
    parts = spec.get("slices") or [s for m in modules.values() for s in m.get("slices") or []]
    for part in parts:
        source = part["sources"][0]
        model, (first, end) = source["model"], source["layer_range"]
        yield (model["model"] if isinstance(model, dict) else model), (int(first), int(end))


def _layer(
    checkpoint: Checkpoint, layer: int, number: int
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """The tensors of one layer under another number."""
    for name, weight in checkpoint.weights.items():
        if module_of(name)[0] == layer:
            yield (
                re.sub(rf"\.{layer}\.", f".{number}.", name, count=1),
                (weight.dtype, weight.shape),
            )
