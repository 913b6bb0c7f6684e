"""The configuration of an output: the donor's, changed only where the dtype, the vocabulary or the coding did."""

import json

from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.quantized import without_quantization
from expo.planning.plan import Plan


def configuration(plan: Plan) -> bytes:
    """config.json of the output, byte for byte the donor's where nothing in it changes."""
    content, config = plan.donor.files.read("config.json"), plan.donor.config
    changed = without_quantization(config) if plan.donor.coding.codes else config
    if plan.donor.is_of_transformers:  # others' have fields of their own
        changed = changed | _dtype(plan, config) | _vocabulary(plan, config)
    if changed == config:
        return content
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _dtype(plan: Plan, config: dict) -> dict[str, str]:
    """What was asked for; of a quantized donor what most of the output is, where it says something at all."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    dtypes = {job.dtype for job in plan.jobs if job.dtype in FLOATS}
    if plan.request.dtype is not None and dtypes:
        return {key: TORCH_NAMES[sorted(dtypes)[0]]}
    if plan.donor.coding.codes and key in config:
        return {key: most_common_dtype(plan)}
    return {}


def _vocabulary(plan: Plan, config: dict) -> dict[str, int]:
    """The rows of an embedding that the aligned side's adapter has resized."""
    donor = plan.donor
    if donor.adapter is None or "vocab_size" not in config:
        return {}
    before = {name: info.shape for shard in donor.shards for name, info in donor.held(shard)}
    for name, whole in donor.adapter.replaced.items():
        if name.endswith("embed_tokens.weight") and whole.shape != before[name]:
            return {"vocab_size": whole.shape[0]}
    return {}


def most_common_dtype(plan: Plan) -> str:
    """The torch name of what most of the output is written in."""
    sizes: dict[str, int] = {}
    for job in plan.jobs:
        if job.dtype in FLOATS:
            sizes[job.dtype] = sizes.get(job.dtype, 0) + job.nbytes
    return TORCH_NAMES[max(sizes, key=sizes.__getitem__)] if sizes else "float32"
