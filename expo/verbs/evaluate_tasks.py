"""`expo evaluate --lm-eval`: tasks of lm-evaluation-harness, their results in our file."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from expo.checkpoint.reference import parse_loadable
from expo.errors import OutputError
from expo.evaluation.harness import run_tasks
from expo.output.scores import write_scores
from expo.results import Score


def evaluate_tasks(
    model: str | PathLike[str],
    tasks: Sequence[str],
    *,
    out: str | PathLike[str],
    tasks_path: str | PathLike[str] | None = None,
    apply_chat_template: bool = False,
    device: str | None = None,
    overwrite: bool = False,
) -> tuple[Score, ...]:
    """Run tasks of lm-evaluation-harness on a model and write their results to `out` (`expo.results/1`).

    Args:
        model: a directory or a Hub id.
        tasks_path: a folder with tasks beside the harness's own.
        device: as in `evaluate`.

    Raises:
        SpecError: no such model or task, or lm-eval is not installed.
        CheckpointError: the harness cannot run the model.
        OutputError: `out` exists or cannot be written.
    """
    place = parse_loadable(str(model), role="MODEL")
    if Path(out).exists() and not overwrite:
        raise OutputError(f"{out} exists: choose another file, or add --overwrite")
    scores = run_tasks(
        str(place.path or place.repo_id),
        tasks,
        revision=place.revision,
        tasks_path=None if tasks_path is None else Path(tasks_path),
        apply_chat_template=apply_chat_template,
        device=device,
    )
    write_scores(Path(out), scores)
    return scores
