"""The one place that uses the mergekit library: what only its engine can do, into our kind of output.

mergekit writes into the staging directory; then come the files that it loses, verification and
manifest. There is no resume: an interrupted run starts afresh.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from expo.checkpoint.checkpoint import read_shard
from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.checkpoint.files import open_directory
from expo.checkpoint.sidecars import CARD, MANIFEST
from expo.errors import CheckpointError, ExpoError, SpecError
from expo.output.outputs import (
    card,
    copy_file,
    foreign_manifest,
    seal_file,
    write_file,
    write_manifest,
)
from expo.output.staging import Staging
from expo.planning.plan import Plan
from expo.spec.request import Foreign
from expo.spec.surgery import renamed
from expo.verification.golden import read_golden
from expo.verification.run import verify_folder

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

Schema = TypeVar("Schema", bound=BaseModel)

_CONFIG = "mergekit_config.yml"  # names models by their local paths; the manifest has the spec


def produce_foreign(
    plan: Plan,
    staging: Staging,
    digest: str,
    known: dict[str, dict[str, str | int]],
    *,
    verify: bool,
) -> dict:
    """Everything up to the placement; returns the manifest.

    Raises:
        SpecError: mergekit is not installed, or does not accept the spec.
        CheckpointError: mergekit fails.
    """
    assert plan.request.foreign is not None
    _merge(plan, plan.request.foreign, staging.path)
    (staging.path / _CONFIG).unlink(missing_ok=True)
    for sidecar in plan.sidecars:
        copy_file(sidecar.files.local_path(sidecar.name), staging.path / sidecar.name)
    content = foreign_manifest(plan, digest, known, _seal(staging), _dtypes(staging.path))
    if verify:  # without the donor: layers and vocabulary may differ from every model's on purpose
        request = plan.request
        golden = None if request.vectors is None else read_golden(request.vectors)
        found = verify_folder(staging.path, golden=golden, quick=True, stop_at=request.stop_at)
        content |= {"verified": found.ok, "verification": [asdict(c) for c in found.checks]}
    content["files"][CARD] = write_file(staging.path / CARD, card(content).encode())
    write_manifest(staging.path, content)
    return content


def _merge(plan: Plan, foreign: Foreign, folder: Path) -> None:
    try:
        from mergekit.options import MergeOptions
    except ImportError as error:
        raise SpecError(
            "this spec needs the mergekit library: pip install 'expo-merge[mergekit]'"
        ) from error
    from transformers import set_seed

    spec = {**renamed(foreign.spec, _pins(plan, foreign)), **_out_dtype(plan)}
    adapters = folder / "adapters"  # where mergekit adds adapters to their models
    options = MergeOptions(
        quiet=True, write_model_card=False, lazy_unpickle=True, lora_merge_cache=str(adapters)
    )
    if plan.request.max_shard_bytes is not None:
        options = options.model_copy(update={"out_shard_size": plan.request.max_shard_bytes})
    set_seed(plan.request.seed)
    try:
        (_mix if "experts" in spec else _run)(spec, folder, options)
    except ExpoError:
        raise
    except (Exception, SystemExit) as error:  # a library that raises whatever its tasks raise
        said = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        raise CheckpointError(f"mergekit failed: {said}") from error
    finally:
        shutil.rmtree(adapters, ignore_errors=True)


def _run(spec: dict, folder: Path, options: "MergeOptions") -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge

    run_merge(_accepted(MergeConfiguration, spec), str(folder), options)


def _mix(spec: dict, folder: Path, options: "MergeOptions") -> None:
    """mergekit-moe, on the CPU."""
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build

    build(_accepted(MoEMergeConfig, spec), str(folder), options, device="cpu")


def _accepted(schema: "type[Schema]", spec: dict) -> "Schema":
    try:
        return schema.model_validate(spec)
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise SpecError(f"mergekit does not accept the spec: {first}") from error


def _out_dtype(plan: Plan) -> dict[str, str]:
    """The dtype to cast to: some methods compute in a wider one and would leave it at that, under a
    configuration that says otherwise."""
    spec = plan.request.foreign.spec if plan.request.foreign else {}
    if "experts" in spec:
        return {}
    dtypes = {tensor.dtype for tensor in plan.donor.tensors.values()}
    stored = TORCH_NAMES[dtypes.pop()] if len(dtypes) == 1 and dtypes <= FLOATS else None
    wanted = spec.get("out_dtype") or spec.get("dtype") or stored
    return {} if wanted is None else {"out_dtype": wanted}


def _pins(plan: Plan, foreign: Foreign) -> dict[str, str]:
    """Every Hub model at the commit that was planned."""
    files = {checkpoint.reference: checkpoint.files for checkpoint in plan.sources.values()}
    return {
        text: f"{reference.model.repo_id}@{files[reference].commit}"
        for text, reference in foreign.models.items()
        if reference.adapter is None and files[reference].commit
    }


def _dtypes(folder: Path) -> list[str]:
    """The dtypes that are in the output."""
    files = open_directory(folder)
    shards = [read_shard(files, name) for name in files.sizes if name.endswith(".safetensors")]
    return sorted({tensor.dtype for shard in shards for tensor in shard.tensors})


def _seal(staging: Staging) -> dict[str, str]:
    """Everything on the disk, SHA-256 by name."""
    hashes = {}
    for path in sorted(staging.path.rglob("*")):
        name = path.relative_to(staging.path).as_posix()
        if path.is_file() and name not in (*staging.own_files, MANIFEST):
            hashes[name] = seal_file(path)
    return hashes
