"""lm-evaluation-harness, run in this process. The one module that uses it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from expo.compute.devices import for_models
from expo.errors import CheckpointError, SpecError
from expo.results import Score

_Z95 = 1.959963984540054
_HOME = "https://github.com/EleutherAI/lm-evaluation-harness"


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    revision: str | None = None,
    tasks_path: Path | None = None,
    apply_chat_template: bool = False,
    device: str | None = None,
) -> tuple[Score, ...]:
    """What the harness says of a model: every metric of every task, with the interval of its error.

    Args:
        model: a directory, or a repository on the Hub.
        tasks: names of tasks or groups.
        tasks_path: a folder with more of them.
        device: like "cuda:0"; by default CUDA where there is one.

    Raises:
        SpecError: the harness is not installed, or there is no such task.
        CheckpointError: it cannot run the model.
    """
    try:
        import lm_eval
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SpecError(
            "--lm-eval needs lm-evaluation-harness: pip install 'expo-merge[eval]'"
        ) from error
    where = str(for_models(device))
    known = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
    if unknown := [task for task in tasks if not known.match_tasks([task])]:
        raise SpecError(
            f"lm-evaluation-harness has no task {unknown[0]}: lm-eval ls tasks lists them"
        )
    arguments = {"pretrained": model, "revision": revision or "main", "dtype": "auto"}
    try:
        found = simple_evaluate(  # pyright: ignore[reportCallIssue] - its decorator hides its parameters
            model="hf",  # pyright: ignore
            model_args=arguments,  # pyright: ignore
            tasks=[*tasks],  # pyright: ignore
            task_manager=known,  # pyright: ignore
            device=where,
            apply_chat_template=apply_chat_template,
            log_samples=False,
        )
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise CheckpointError(f"lm-evaluation-harness cannot run {model}: {first}") from error
    assert found is not None
    how = ", chat template" if apply_chat_template else ""
    return tuple(_scores(found, how, f"{_HOME}/tree/v{lm_eval.__version__}"))


def _scores(found: Mapping, how: str, source: str) -> Iterator[Score]:
    """The numbers of every task: `metric,filter` and the standard error beside it."""
    for task, values in found["results"].items():
        shots = found.get("n-shot", {}).get(task)
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            yield Score(
                task,
                metric
                + ("" if filtered == "none" else f" ({filtered})")
                + ("" if shots is None else f", {shots}-shot")
                + how,
                float(value),
                interval=_interval(value, values.get(f"{metric}_stderr,{filtered}")),
                source=source,
            )


def _interval(value: float, error: object) -> tuple[float, float] | None:
    """Of a mean with this standard error; None where the harness has none ("N/A"), or where all answers
    are alike: that they are does not show that all would be."""
    if not isinstance(error, int | float) or error == 0:
        return None
    return value - _Z95 * error, value + _Z95 * error
