"""Results of evaluations (`expo.output.scores`) as a card shows them, and as the Hub reads them:
`.eval_results/`, for every dataset that is a Hub id, with a task."""

from expo.checkpoint.reference import HUB_ID
from expo.checkpoint.sidecars import EVAL_RESULTS
from expo.publishing.markdown import code, table
from expo.results import Score


def results_table(results: tuple[Score, ...], own: str) -> list[str]:
    """One row for every metric, one column for every model; this model's comes last, in bold, where it has any."""
    models = list(dict.fromkeys(r.model for r in results if r.model is not None))
    rows: dict[tuple[str, str], dict[str | None, Score]] = {}
    for result in results:
        rows.setdefault((_dataset(result), result.metric), {})[result.model] = result
    columns: list[str | None] = [
        *models,
        *([None] if any(r.model is None for r in results) else []),
    ]
    header = ("dataset", "metric", *(f"**{own}**" if m is None else code(m) for m in columns))
    return table(
        header,
        [
            (dataset, metric, *(_value(row.get(m), "**" if m is None else "") for m in columns))
            for (dataset, metric), row in rows.items()
        ],
    )


def _dataset(result: Score) -> str:
    shown = result.dataset
    if HUB_ID.fullmatch(shown):
        shown = f"[{shown}](https://huggingface.co/datasets/{shown})"
    return f"{shown}, {code(result.task)}" if result.task else shown


def _value(result: Score | None, mark: str = "") -> str:
    if result is None:
        return "–"
    value = f"{mark}{result.value:.10g}{mark}"
    if result.source is not None:
        value = f"[{value}]({result.source})"
    if result.interval is None:
        return value
    return f"{value} ({result.interval[0]:.4g} … {result.interval[1]:.4g})"


def eval_results(results: tuple[Score, ...]) -> dict[str, str]:
    """`.eval_results/NAME.yaml` with its text, one for each dataset of the Hub."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for r in results:
        if r.model is None and r.task is not None and HUB_ID.fullmatch(r.dataset):
            entry = EvalResultEntry(
                dataset_id=r.dataset,
                task_id=r.task,
                value=r.value,
                source_url=r.source,
                notes=r.metric,
            )
            entries.setdefault(r.dataset.replace("/", "--"), []).append(entry)
    return {
        f"{EVAL_RESULTS}/{name}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True
        )
        for name, found in entries.items()
    }
