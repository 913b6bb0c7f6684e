"""`expo extrapolate --as-adapter`: ExPO of base+adapter over that base is the adapter with its scale times α.

θ_base + α·(s·B·A) is what LoRA (2106.09685) computes with lora_alpha·α in place of lora_alpha, whatever
divides it (r, or √r with rsLoRA, 2312.03732). So the matrices are copied byte for byte: it is exact.
"""

import time
from os import PathLike
from pathlib import Path

from expo.checkpoint.adapter import WEIGHTS, Adapter, read_config
from expo.checkpoint.checkpoint import Checkpoint, header_identity
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo, printable
from expo.checkpoint.reference import HUB_ID
from expo.errors import CheckpointError, SpecError
from expo.output.durable import copy_file
from expo.output.journal import identities
from expo.output.manifest import AdapterManifest, source_entry, versions
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.results import ExtractResult
from expo.spec.request import make_request
from expo.verbs.adapters import (
    adapter_staging,
    between,
    extract_result,
    finish,
    plain,
    write_beside,
)


def extrapolate_adapter(
    base: str | PathLike[str],
    adapted: str | PathLike[str],
    out: str | PathLike[str],
    *,
    alpha: float,
    interpolate: bool = False,
    overwrite: bool = False,
) -> ExtractResult:
    """Write the adapter of `adapted` (`base+adapter`) with its scale times `alpha`: megabytes, and exact.

    Raises:
        SpecError: `adapted` has no adapter, or `base` is not the model that it is added to.
        CheckpointError: the adapter is one that no factor extrapolates (DoRA, `modules_to_save`, biases), or
            does not fit the base.
        HubError, OutputError: one line, with the cure.
    """
    started = time.monotonic()
    plan = build_plan(make_request(str(base), str(adapted), alpha=alpha, interpolate=interpolate))
    adapter = _plain_adapter(plan)
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    config = read_config(adapter.files)
    config |= _scaled(config, alpha) | _base_of(plan.sources["sft"], config)
    known = identities(plan)
    own = [sidecar for sidecar in plan.sidecars if sidecar.files is adapter.files]
    with adapter_staging(plan, Path(out), known, overwrite=overwrite) as staging:
        folder = staging.folder
        hashes = {WEIGHTS: copy_file(adapter.files.local_path(WEIGHTS), folder / WEIGHTS)}
        hashes |= write_beside(folder, config, own)
        manifest = AdapterManifest(
            sources={role: source_entry(checkpoint) for role, checkpoint in plan.sources.items()},
            scale=alpha,
            energy=1.0,
            modules=(),
            others=(),
            versions=versions("safetensors"),
            files=dict(sorted(hashes.items())),
            inputs=known,
            command=("extrapolate", "--as-adapter", "--alpha", f"{alpha:.12g}", *between(alpha)),
        )
        manifest = finish(folder, manifest, plan.sources["sft"])
    return extract_result(staging.out, manifest, time.monotonic() - started)


def _plain_adapter(plan: Plan) -> Adapter:
    """The adapter, if a factor extrapolates it."""
    sft, aligned = plan.sources["sft"], plan.donor
    whole = "leave --as-adapter out to write the whole model"
    if aligned.adapter is None:
        raise SpecError(
            f"--as-adapter: {aligned.label} is a whole model, write BASE+ADAPTER; expo extract-lora makes an "
            "adapter of a change"
        )
    if sft.adapter is not None or not _is_same(sft, aligned):
        raise SpecError(
            f"--as-adapter: the adapter is added to {aligned.files.label}, SFT is {sft.label}: name the same model "
            f"twice, or {whole}"
        )
    for name, tensor in aligned.adapter.replaced.items():
        # PEFT saves an adapted embedding too, as it is in the base.
        if not _is_equal(sft.files, sft.weights[name].stored, aligned.adapter.files, tensor):
            raise CheckpointError(
                f"adapter {aligned.adapter.files.label} saves {printable(name)} whole (modules_to_save, or a bias), "
                f"which no factor extrapolates: {whole}"
            )
    return aligned.adapter


def _is_equal(files: Files, tensor: TensorInfo, others: Files, other: TensorInfo) -> bool:
    """Whether two stored tensors are the same, bit for bit."""
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    mine, theirs = (
        place.read(info.file, info.begin, info.begin + info.nbytes)
        for place, info in ((files, tensor), (others, other))
    )
    return mine == theirs


def _is_same(sft: Checkpoint, aligned: Checkpoint) -> bool:
    """Whether both are the same files, however they were named."""
    if sft.reference.model == aligned.reference.model:
        return True
    files = [[header_identity(one.files, shard) for shard in one.shards] for one in (sft, aligned)]
    return files[0] == files[1]


def _scaled(config: dict, alpha: float) -> dict:
    patterns = config.get("alpha_pattern") or {}
    return {
        "lora_alpha": plain(config["lora_alpha"] * alpha),
        "alpha_pattern": {name: plain(value * alpha) for name, value in patterns.items()},
    }


def _base_of(base: Checkpoint, config: dict) -> dict:
    """Where peft finds the model: on the Hub if that is known, never a path of this machine."""
    said = config.get("base_model_name_or_path")
    of_hub = isinstance(said, str) and HUB_ID.fullmatch(said) and not Path(said).exists()
    if base.files.commit is None and of_hub:
        return {}
    return {"base_model_name_or_path": base.files.label, "revision": base.files.commit}
