"""The small files of an output: the donor's, byte for byte, the index, and the configuration."""

import json
from pathlib import Path

from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.output.durable import copy_file, write_file
from expo.planning.plan import Plan


def write_small_files(plan: Plan, folder: Path) -> dict[str, str]:
    """Copy the donor's files byte for byte and write index and configuration; SHA-256 by name."""
    hashes = {}
    for sidecar in plan.sidecars:
        target = folder / sidecar.name
        if sidecar.name == "config.json" and sidecar.files is plan.donor.files:
            hashes[sidecar.name] = write_file(target, _configuration(plan))
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


def _configuration(plan: Plan) -> bytes:
    """The donor's config.json, changed only where the dtype or the vocabulary did."""
    content = plan.donor.files.read("config.json")
    config = plan.donor.config
    if not plan.donor.is_of_transformers:
        return content  # others' have fields of their own
    changes: dict[str, str | int] = {}
    dtypes = {job.dtype for job in plan.jobs if job.dtype in FLOATS}
    if plan.request.dtype is not None and dtypes:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        changes[key] = TORCH_NAMES[sorted(dtypes)[0]]
    rows = _embedding_rows(plan)
    if rows is not None and "vocab_size" in config:
        changes["vocab_size"] = rows
    if all(config.get(key) == value for key, value in changes.items()):
        return content
    return (json.dumps(config | changes, indent=2, ensure_ascii=False) + "\n").encode()


def _embedding_rows(plan: Plan) -> int | None:
    """The rows of an embedding that the aligned side's adapter has resized."""
    adapter = plan.donor.adapter
    if adapter is None:
        return None
    for name, whole in adapter.replaced.items():
        if name.endswith("embed_tokens.weight") and whole.shape != plan.donor.tensors[name].shape:
            return whole.shape[0]
    return None


def most_common_dtype(plan: Plan) -> str:
    """The torch name of what most of the output is written in."""
    sizes: dict[str, int] = {}
    for job in plan.jobs:
        if job.dtype in FLOATS:
            sizes[job.dtype] = sizes.get(job.dtype, 0) + job.nbytes
    return TORCH_NAMES[max(sizes, key=sizes.__getitem__)] if sizes else "float32"
