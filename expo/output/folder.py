"""The small files of an output: the donor's, byte for byte, the index, and the configuration."""

import json
from pathlib import Path

from expo.output.durable import copy_file, write_file
from expo.planning.configuration import configuration
from expo.planning.plan import Plan


def write_small_files(plan: Plan, folder: Path) -> dict[str, str]:
    """Copy the donor's files byte for byte and write index and configuration; SHA-256 by name."""
    hashes = {}
    for sidecar in plan.sidecars:
        target = folder / sidecar.name
        if sidecar.name == "config.json" and sidecar.files is plan.donor.files:
            hashes[sidecar.name] = write_file(target, configuration(plan))
        else:
            hashes[sidecar.name] = copy_file(sidecar.files.local_path(sidecar.name), target)
    if plan.index_name is not None:
        hashes[plan.index_name] = write_file(folder / plan.index_name, _index(plan))
    return hashes


def _index(plan: Plan) -> bytes:
    """The index of the shards, keeping the donor's other metadata."""
    weight_map = {job.name: shard.file for shard in plan.shards for job in shard.jobs}
    total_size = sum(shard.data_bytes for shard in plan.shards)
    index = {
        "metadata": plan.donor.index_metadata | {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()
