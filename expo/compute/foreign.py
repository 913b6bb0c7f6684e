"""The one place that uses the mergekit library: for what only its engine can do."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from expo.checkpoint.dtypes import FLOATS, TORCH_NAMES
from expo.errors import CheckpointError, ExpoError, SpecError
from expo.planning.plan import Plan
from expo.spec.request import Foreign
from expo.spec.surgery import renamed

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

Schema = TypeVar("Schema", bound=BaseModel)

_CONFIG = "mergekit_config.yml"  # names models by their local paths; the manifest has the spec


def merge_with_mergekit(plan: Plan, folder: Path) -> None:
    """Let mergekit write its output into `folder`. Files that it loses are the caller's matter.

    Raises:
        SpecError: mergekit is not installed, or does not accept the spec.
        CheckpointError: mergekit fails.
    """
    foreign = plan.request.foreign
    assert foreign is not None
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
    (folder / _CONFIG).unlink(missing_ok=True)


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
    dtypes = {weight.dtype for weight in plan.donor.weights.values()}
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
