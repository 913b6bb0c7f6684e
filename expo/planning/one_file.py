"""An output that is a single file: every tensor in it, nothing around it."""

from dataclasses import replace
from pathlib import Path

from expo.checkpoint.headers import printable
from expo.checkpoint.sidecars import is_legal, is_one_file
from expo.planning.findings import listing
from expo.planning.plan import Plan, ShardPlan

_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""What trainers write of the tensors themselves: of others it would be false."""


def placed(plan: Plan, out: Path) -> Plan:
    """The plan for its place: as it is for a directory; for `out.safetensors` in that one file, which cannot hold
    what a directory can."""
    if not is_one_file(out):
        return plan
    refusals = (*plan.refusals, *_what_it_cannot_hold(plan, out))
    metadata = {
        k: v for shard in plan.shards for k, v in shard.metadata.items() if k not in _HASHES
    }
    shard = ShardPlan(out.name, metadata, tuple(plan.jobs))
    left = {sidecar.name: sidecar.files.sizes[sidecar.name] for sidecar in plan.sidecars}
    left_behind = plan.left_behind | left
    return replace(plan, shards=(shard,), sidecars=(), left_behind=left_behind, index_name=None,
                   refusals=refusals)  # fmt: skip


def _what_it_cannot_hold(plan: Plan, out: Path) -> list[str]:
    cure = f"name a directory, like {printable(out.stem)}"
    if plan.request.foreign is not None:
        return [f"{out.name} is one file, and mergekit's engine writes a directory: {cure}"]
    if plan.request.max_shard_bytes is not None:
        return [f"{out.name} is one file, and --max-shard-size is for several: {cure}"]
    files = [sidecar.name for sidecar in plan.sidecars if not is_legal(sidecar.name)]
    if files:
        return [f"{out.name} is one file, and {plan.donor.label} needs more to load ({listing(map(printable, files))}): {cure}"]  # fmt: skip
    return []
