"""The one place that uses the mergekit library: for what only its engine can do."""

from pathlib import Path

from expo.errors import CheckpointError, SpecError
from expo.planning.plan import Plan
from expo.spec.request import Foreign
from expo.spec.surgery import renamed

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
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
    except ImportError as error:
        raise SpecError(
            "this spec needs the mergekit library: pip install 'expo-merge[mergekit]'"
        ) from error
    from transformers import set_seed

    try:
        config = MergeConfiguration.model_validate(renamed(foreign.spec, _pins(plan, foreign)))
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise SpecError(f"mergekit does not accept the spec: {first}") from error
    options = MergeOptions(quiet=True, write_model_card=False, lazy_unpickle=True)
    if plan.request.max_shard_bytes is not None:
        options = options.model_copy(update={"out_shard_size": plan.request.max_shard_bytes})
    set_seed(plan.request.seed)
    try:
        run_merge(config, str(folder), options)
    except Exception as error:  # a library that raises whatever its tasks raise
        said = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        raise CheckpointError(f"mergekit failed: {said}") from error
    (folder / _CONFIG).unlink(missing_ok=True)


def _pins(plan: Plan, foreign: Foreign) -> dict[str, str]:
    """Every Hub model at the commit that was planned."""
    files = {checkpoint.reference: checkpoint.files for checkpoint in plan.sources.values()}
    return {
        text: f"{reference.model.repo_id}@{files[reference].commit}"
        for text, reference in foreign.models.items()
        if reference.adapter is None and files[reference].commit
    }
