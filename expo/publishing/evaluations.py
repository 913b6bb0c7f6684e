"""Results of evaluations, `expo.results/1`: what a card shows, and what the Hub reads as `.eval_results/`.

    {"schema": "expo.results/1", "results": [
      {"dataset": "tatsu-lab/alpaca_eval", "task": "alpaca_eval_2", "metric": "LC win rate, %", "value": 26.4,
       "interval": [24.9, 27.9], "source": "https://…"},
      {"dataset": "tatsu-lab/alpaca_eval", "task": "alpaca_eval_2", "metric": "LC win rate, %", "value": 25.8,
       "model": "Nexusflow/Starling-LM-7B-beta"}]}

`dataset`, `metric` and `value` are required. `task` is the dataset's own id of a part of it, `interval` [low,
high] of the value, `source` a link to the run, `model` another model that was measured alike: it gets a
column beside this one's. A `dataset` that is a Hub id, with a `task`, goes to `.eval_results/` too.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from expo.errors import SpecError
from expo.publishing.markdown import code, table

SCHEMA = "expo.results/1"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Result:
    """One measured number; `model` is None where it is of the model that the card is for."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    dataset: str
    metric: str
    value: float
    task: str | None = None
    interval: tuple[float, float] | None = None
    source: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class _File:
    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    schema: str
    results: tuple[Result, ...]


def read_results(file: Path) -> tuple[Result, ...]:
    """Read a file of results.

    Raises:
        SpecError: it cannot be read, or is of another form.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        read = TypeAdapter(_File).validate_json(file.read_bytes())
    except OSError as error:
        raise SpecError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpecError(f"{file}: {where}: {first['msg']} (it should be {SCHEMA})") from error
    if read.schema != SCHEMA:
        raise SpecError(f"{file} is of schema {read.schema!r}, not {SCHEMA}")
    for result in read.results:
        if result.source is not None and not re.fullmatch(r"https?://[^\s()<>]+", result.source):
            raise SpecError(f"{file}: source {result.source!r} is no link (https://…)")
    return read.results


def results_table(results: tuple[Result, ...], own: str) -> list[str]:
    """One row for every metric, one column for every model; this model's comes last, in bold."""
    models = list(dict.fromkeys(r.model for r in results if r.model is not None))
    rows: dict[tuple[str, str], dict[str | None, Result]] = {}
    for result in results:
        rows.setdefault((_dataset(result), result.metric), {})[result.model] = result
    header = ("dataset", "metric", *map(code, models), f"**{own}**")
    return table(
        header,
        [
            (dataset, metric, *(_value(row.get(name)) for name in models), _value(row.get(None), "**"))
            for (dataset, metric), row in rows.items()
        ],
    )  # fmt: skip


def _dataset(result: Result) -> str:
    shown = result.dataset
    if _HUB_ID.fullmatch(shown):
        shown = f"[{shown}](https://huggingface.co/datasets/{shown})"
    return f"{shown}, {code(result.task)}" if result.task else shown


def _value(result: Result | None, mark: str = "") -> str:
    if result is None:
        return "–"
    value = f"{mark}{result.value:.10g}{mark}"
    if result.source is not None:
        value = f"[{value}]({result.source})"
    if result.interval is None:
        return value
    return f"{value} ({result.interval[0]:.4g} … {result.interval[1]:.4g})"


def eval_results(results: tuple[Result, ...]) -> dict[str, str]:
    """`.eval_results/NAME.yaml` with its text, one for each dataset of the Hub."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for r in results:
        if r.model is None and r.task is not None and _HUB_ID.fullmatch(r.dataset):
            entry = EvalResultEntry(
                dataset_id=r.dataset,
                task_id=r.task,
                value=r.value,
                source_url=r.source,
                notes=r.metric,
            )
            entries.setdefault(r.dataset.replace("/", "--"), []).append(entry)
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True
        )
        for name, found in entries.items()
    }
